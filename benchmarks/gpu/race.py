"""A race on one GPU: bits per byte over time of several models, on the same text, for the same minutes each.

    python benchmarks/gpu/race.py --data FILE                    three models share nine minutes
    python benchmarks/gpu/race.py --data FILE --compile
    python benchmarks/gpu/race.py --data FILE --models preset --each 8

Each is a run of train.py by the settings of the `gpu` preset, with its schedule over those minutes. The flat models
have as many layers as make a byte cost about what it costs the preset. Bits per byte on the way are of the next 5 %
after the 90 % that are learnt from; the last score is of the last 5 %. Writes race.json to the folder $OUT.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# the checkout and benchmarks/ in the place of this folder, whose profile.py would hide the standard library's
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from side_by_side import ROOT

from benchmarks.gpu import common
from benchmarks.gpu.common import PRESET, WINDOW, Bench
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import evaluation_batches, split_bytes
from simple_hierarchical_transformer.training.scores import bits_per_byte
from simple_hierarchical_transformer.training.sources import load_sources

# layers for as many tokens as those of the preset read, as in benchmarks/resolutions.py
DEPTH = math.ceil(
    sum(n / s for n, s in zip(PRESET['model']['depth'], PRESET['model']['hierarchical_stride'], strict=True))
)
MODELS: dict[str, common.Settings] = {
    'preset': common.preset(),
    'flat, window 64': common.flat(WINDOW, depth=DEPTH),
    'flat, full': common.flat(None, depth=DEPTH),
}
# minutes of a run besides training: starting, saving, and scoring
AROUND = 0.75
VALID_BYTES, TEST_BYTES = 1 << 18, 1 << 21
COLUMNS = ('step', 'bytes', 'minutes', 'train_bits_per_byte', 'valid_bits_per_byte', 'valid_streaming_bits_per_byte')


def train(bench: Bench, name: str, args: Any, out: Path) -> dict[str, Any]:
    """A run of train.py: its curve, and the score of its model on text that no run has seen."""
    settings = common.small(MODELS[name]) if bench.toy else MODELS[name]
    sizes = ['--seq-len', '64', '--batch-size', '2', '--grad-accum', '1'] if bench.toy else []
    flags = ['--compile'] if args.compile else []
    valid = 2048 if bench.toy else VALID_BYTES
    command = [
        sys.executable, str(ROOT / 'train.py'), '--preset', 'gpu', '--data', args.data, '--minutes', str(args.each),
        '--seed', str(args.seed), '--checkpoint-every', str(10**9), '--valid-bytes', str(valid), '--out', str(out),
        *sizes, *flags, '--model', *(f'{key}={value!r}' for key, value in settings.items()),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    hidden = dict(CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true') if bench.toy else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': path, **hidden})
    if done.returncode:
        raise RuntimeError(f'train.py ended with {done.returncode}: {done.stderr[-2000:]}')
    with open(out / 'metrics.csv', encoding='utf-8') as file:
        curve = [{key: float(row[key]) for key in COLUMNS if row.get(key)} for row in csv.DictReader(file)]
    model = HierarchicalTransformer.from_pretrained(out / 'final').to(bench.device)
    [corpus], _ = load_sources([args.data], ROOT / 'data', text_key='text', say=print)
    test = split_bytes(len(corpus), seq_len=model.seq_len)['test']
    windows = evaluation_batches(corpus, test, seq_len=model.seq_len, batch_size=8, max_bytes=args.test_bytes)
    return dict(
        model=name, minutes=args.each, compiled=args.compile, **common.parameter_counts(model),
        flops_a_byte=common.step_flops(model, model.seq_len) / model.seq_len, steps=curve[-1]['step'],
        bytes=curve[-1]['bytes'], bytes_a_second=curve[-1]['bytes'] / (60 * curve[-1]['minutes']), curve=curve,
        test_bits_per_byte=bits_per_byte(model.eval(), windows, bench.device),
    )  # fmt: skip


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Bits per byte of the validation split, at the moments of the first model's scores: the last up to then."""
    if not rows:
        return ''

    def at(row: dict[str, Any], minutes: float) -> str:
        scores = [
            each['valid_bits_per_byte'] for each in row['curve']
            if 'valid_bits_per_byte' in each and each['minutes'] <= minutes + 0.02 * row['minutes']
        ]  # fmt: skip
        return f'{scores[-1]:.3f}' if scores else ''

    moments = [each['minutes'] for each in rows[0]['curve'] if 'valid_bits_per_byte' in each]
    head = ('bits per byte after', *(row['model'] for row in rows))
    return common.table(head, [(f'{each:.2f} minutes', *(at(row, each) for row in rows)) for each in moments])


def final_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ('', 'parameters', 'GFLOP a byte', 'kB/s, scoring included', 'MB read', 'bits per byte, test')
    return common.table(
        head,
        [
            (
                row['model'],
                f'{row["parameters"] / 1e6:.1f} M',
                f'{row["flops_a_byte"] / 1e9:.2f}',
                f'{row["bytes_a_second"] / 1e3:.0f}',
                f'{row["bytes"] / 1e6:.1f}',
                f'{row["test_bits_per_byte"]:.4f}',
            )
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument('--data', required=True, help='what train.py --data takes')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--each', type=float, help='minutes of training of each (default: an equal share of --minutes)')
    parser.add_argument('--compile', action='store_true', help='train with torch.compile')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--test-bytes', type=int, default=TEST_BYTES, help='of the test split to score')
    args, given = common.parse(parser, argv)
    args.each = args.each or args.minutes / len(args.models) - AROUND
    if args.each <= 0:
        parser.error(f'--minutes: {args.minutes:g} leave no time for {len(args.models)} models')
    bench = Bench('race', args, given)
    rows: list[dict[str, Any]] = []
    bench.found['runs'] = rows
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            out = Path(folder) / name.replace(', ', '-').replace(' ', '-')
            found = bench.part(
                name, lambda name=name, out=out: train(bench, name, args, out), kind='run',
                expected=60 * (args.each + AROUND),
            )  # fmt: skip
            if found:
                rows.append(found)
    bench.close(curve_table(rows), final_table(rows))


if __name__ == '__main__':
    main()
