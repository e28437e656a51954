"""The value of each option of the hierarchy: bits per byte after the same training time, with several seeds.

    python benchmarks/quality/ablations.py --data enwiki-articles.xml.bz2

Writes ablations.json after each run, and continues from it. `--report` only makes the table and the figure again. The
docstring of paced.py describes the method.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.common.results import new_parser, write_lines
from benchmarks.common.tables import markdown
from benchmarks.common.training import load_corpus
from benchmarks.quality import comparison, paced
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import evaluation_batches
from simple_hierarchical_transformer.training.scores import bits_per_byte

# without auxiliary losses, as in the cpu preset, so that each option adds one
BASE: dict[str, Any] = dict(
    dim=128, depth=2, heads=2, hierarchies=(1, 4, 16), hierarchical_stride=(1, 4, 16), window_sizes=(64, None, None),
    recon_loss_weight=0.0, next_latent_loss_weight=0.0,
)  # fmt: skip
DEFAULT = 'default'
OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    'one level, full attention': dict(hierarchies=1, hierarchical_stride=1, window_sizes=None),
    'reconstruction loss': dict(recon_loss_weight=0.1),
    'next-latent loss': dict(next_latent_loss_weight=0.25),
    'both, as the constructor has it': dict(recon_loss_weight=0.1, next_latent_loss_weight=0.25),
    'prophet loss': dict(prophet_loss_weight=0.1),
    'quantized loss, compressed': dict(quantized_loss_weight=0.1),
    'quantized loss, output': dict(quantized_loss_weight=0.1, quantize_from='output'),
    'quantized loss, 4 codebooks': dict(quantized_loss_weight=0.1, quantizer_codebooks=4),
    'merge into all': dict(merge_into='all'),
    'merge into 1x and 4x': dict(merge_into=(1, 4)),
    'merge by attention': dict(merge='attention'),
    'merge by attention, 3 before': dict(merge='attention', merge_window=3),
    'shared attention (4x, 16x)': dict(share_attention=True),
    'shared feed-forward': dict(share_feed_forward=True),
    'both shared': dict(share_attention=True, share_feed_forward=True),
    'compressor: attention': dict(compressor='attention'),
    'compressor: mean': dict(compressor='mean'),
    'compressor: linear': dict(compressor='linear'),
    'autoencoder': dict(autoencoder=True),
    'hourglass': dict(arrangement='hourglass'),
    'hourglass, merge by attention': dict(arrangement='hourglass', merge='attention'),
    'windows of half (4x, 16x)': dict(window_sizes=(64, 'auto', 'auto')),
}
LENGTH, BATCH = 512, 2


def ablated(model: HierarchicalTransformer, args: argparse.Namespace) -> dict[str, float]:
    """Bits per byte without each level that does not predict, and without all of them."""
    corpus, spans = load_corpus(args.data, model.seq_len)
    span = spans['valid']

    def score(*levels: int) -> float:
        batches = evaluation_batches(corpus, span, seq_len=model.seq_len, batch_size=8, max_bytes=args.valid_bytes)
        with model.ablate(*levels):
            return bits_per_byte(model, batches, torch.device('cpu'))

    others = [level.compression for i, level in enumerate(model.levels) if i != model.predict_level]
    return {', '.join(f'{c}x' for c in levels): score(*levels) for levels in (*((c,) for c in others), others)}


def report(held: dict[str, Any], folder: Path) -> None:
    base = held['runs'][DEFAULT]
    ablated_bits = [run['silent'] for run in base.values()]
    plain = statistics.mean(run['bits'] for run in base.values())
    lines = [
        '# What each option of the hierarchy is worth',
        '',
        comparison.protocol(held, 'ablations.py', BASE, DEFAULT, length=LENGTH, batch=BATCH),
        '',
        *comparison.table(held, OPTIONS, DEFAULT),
        '',
        '![difference of each option to the default](ablations.png)',
        '',
        'The trained default without some of its levels (`model.ablate`):',
        '',
        *markdown(
            ('ablated', 'bits per byte'),
            [
                ('none', f'{plain:.3f}'),
                *((levels, f'{statistics.mean(s[levels] for s in ablated_bits):.3f}') for levels in ablated_bits[0]),
            ],
        ),
    ]
    write_lines(folder / 'ablations.md', lines)
    comparison.draw(folder / 'ablations.png', held, DEFAULT)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    paced.add_arguments(parser, seeds=3, minutes=1.0, options=OPTIONS)
    args = paced.parse(parser, argv, 'ablations')

    def look(name: str, model: HierarchicalTransformer) -> dict[str, Any]:
        return dict(silent=ablated(model, args)) if name == DEFAULT else {}

    options = {name: {**BASE, **changes} for name, changes in OPTIONS.items()}
    held = paced.run_all(args, options, DEFAULT, args.out / 'ablations.json', length=LENGTH, batch=BATCH, look=look)
    report(held, args.out)


if __name__ == '__main__':
    main()
