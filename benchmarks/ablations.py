"""What each option of the hierarchy is worth: bits per byte at equal time, by train.py, several seeds.

python benchmarks/ablations.py --data enwiki-articles.xml.bz2

Writes ablations.json run by run, and goes on from it; --report makes the table and the picture of what it holds. How
runs are compared: paced.py.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import paced
import torch
from side_by_side import ROOT

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import evaluation_batches, split_bytes
from simple_hierarchical_transformer.training.report import write_text
from simple_hierarchical_transformer.training.scores import bits_per_byte
from simple_hierarchical_transformer.training.sources import load_sources

# losses off, as in the cpu preset, so that each can be told from the others
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


def silence(model: HierarchicalTransformer, args: argparse.Namespace) -> dict[str, float]:
    """Bits per byte with each of the other levels silent, and with all of them."""
    corpus = load_sources([args.data], ROOT / 'data', text_key='text', say=print)[0][0]
    span = split_bytes(len(corpus), seq_len=model.seq_len)['valid']

    def score(*levels: int) -> float:
        batches = evaluation_batches(corpus, span, seq_len=model.seq_len, batch_size=8, max_bytes=args.valid_bytes)
        with model.ablate(*levels):
            return bits_per_byte(model, batches, torch.device('cpu'))

    others = [level.compression for i, level in enumerate(model.levels) if i != model.predict_level]
    return {', '.join(f'{c}x' for c in levels): score(*levels) for levels in (*((c,) for c in others), others)}


def report(held: dict[str, Any], folder: Path) -> None:
    base = held['runs'][DEFAULT]
    silent = [run['silent'] for run in base.values()]
    plain = statistics.mean(run['bits'] for run in base.values())
    lines = [
        '# What each option of the hierarchy is worth',
        '',
        paced.protocol(held, 'ablations.py', BASE, DEFAULT, length=LENGTH, batch=BATCH),
        '',
        *paced.table(held, OPTIONS, DEFAULT),
        '',
        '![difference of each option to the default](ablations.png)',
        '',
        'What the trained default loses where a level falls silent (`model.ablate`):',
        '',
        '| silent | bits per byte |',
        '|---|---|',
        f'| none | {plain:.3f} |',
        *(f'| {levels} | {statistics.mean(s[levels] for s in silent):.3f} |' for levels in silent[0]),
    ]
    write_text(folder / 'ablations.md', '\n'.join(lines) + '\n')
    paced.draw(folder / 'ablations.png', held, DEFAULT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paced.add_arguments(parser, seeds=3, minutes=1.0, options=OPTIONS)
    args = parser.parse_args()

    def look(name: str, model: HierarchicalTransformer) -> dict[str, Any]:
        return dict(silent=silence(model, args)) if name == DEFAULT else {}

    options = {name: {**BASE, **changes} for name, changes in OPTIONS.items()}
    held = paced.run_all(args, options, DEFAULT, args.out / 'ablations.json', length=LENGTH, batch=BATCH, look=look)
    report(held, args.out)


if __name__ == '__main__':
    main()
