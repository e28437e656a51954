"""A race on one GPU: bits per byte over time of several models that train on the same text for the same minutes.

    python benchmarks/gpu/race.py --data FILE                    three models share nine minutes
    python benchmarks/gpu/race.py --data FILE --compile
    python benchmarks/gpu/race.py --data FILE --models 'flat, window 64' words learned
    python benchmarks/gpu/race.py --data FILE --models preset --each 8

Each model is a run of train.py with the settings of the `gpu` preset, and with its schedule over those minutes. The
flat models have as many layers as cost about as much per byte as the preset. Runs train on the first 90 % of the text.
The scores on the way come from the next 5 %, and the final one from the last 5 %. Writes race.json to the folder $OUT.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script, whose profile.py would hide that of the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common.machine import CPU, ROOT
from benchmarks.common.models import Settings, flat_depth
from benchmarks.common.tables import aligned
from benchmarks.common.training import load_corpus, load_final, model_options, read_metrics, train_command
from benchmarks.gpu.bench import Bench, new_gpu_parser, parse_args
from benchmarks.gpu.models import HNET, PRESET, WINDOW, flat, parameter_counts, placed, preset, small, step_flops
from simple_hierarchical_transformer.data.batches import evaluation_batches
from simple_hierarchical_transformer.training.scores import bits_per_byte

DEPTH = flat_depth(PRESET['model']['depth'], PRESET['model']['hierarchical_stride'])
MODELS: dict[str, Settings] = {
    'preset': preset(),
    'flat, window 64': flat(WINDOW, depth=DEPTH),
    'flat, full': flat(None, depth=DEPTH),
    'words': placed('words'),
    'learned': placed('learned', **HNET),
}
# the others take a run of their own
FIRST = ('preset', 'flat, window 64', 'flat, full')
# minutes of a run for starting, saving and scoring
AROUND = 0.75
VALID_BYTES, TEST_BYTES = 1 << 18, 1 << 21
COLUMNS = ('step', 'bytes', 'minutes', 'train_bits_per_byte', 'valid_bits_per_byte', 'valid_streaming_bits_per_byte')


def train(bench: Bench, name: str, args: Any, out: Path) -> dict[str, Any]:
    """The curve of a run of train.py, and the score of its model on text that no run has seen."""
    settings = small(MODELS[name]) if bench.toy else MODELS[name]
    sizes = ['--seq-len', '64', '--batch-size', '2', '--grad-accum', '1'] if bench.toy else []
    flags = ['--compile'] if args.compile else []
    valid = 2048 if bench.toy else VALID_BYTES
    command = train_command(
        'gpu', args.data, out, '--minutes', str(args.each), '--seed', str(args.seed), '--valid-bytes', str(valid),
        *sizes, *flags, *model_options(settings),
    )  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    hidden = CPU if bench.toy else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': path, **hidden})
    if done.returncode:
        raise RuntimeError(f'train.py ended with {done.returncode}: {done.stderr[-2000:]}')
    curve = [{key: float(row[key]) for key in COLUMNS if row.get(key)} for row in read_metrics(out)]
    model = load_final(out).to(bench.device)
    corpus, spans = load_corpus(args.data, model.seq_len)
    windows = evaluation_batches(corpus, spans['test'], seq_len=model.seq_len, batch_size=8, max_bytes=args.test_bytes)
    return dict(
        model=name, minutes=args.each, compiled=args.compile, **parameter_counts(model),
        flops_a_byte=step_flops(model, model.seq_len) / model.seq_len, steps=curve[-1]['step'],
        bytes=curve[-1]['bytes'], bytes_a_second=curve[-1]['bytes'] / (60 * curve[-1]['minutes']), curve=curve,
        test_bits_per_byte=bits_per_byte(model.eval(), windows, bench.device),
    )  # fmt: skip


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Validation bits per byte at the times of the scores of the first model. Other models show their last score."""
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
    return aligned(head, [(f'{each:.2f} minutes', *(at(row, each) for row in rows)) for each in moments])


def final_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ('', 'parameters', 'GFLOP a byte', 'kB/s, scoring included', 'MB read', 'bits per byte, test')
    return aligned(
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
    parser = new_gpu_parser(__doc__)
    parser.add_argument('--data', required=True, help='a value of train.py --data')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(FIRST))
    parser.add_argument(
        '--each', type=float, help='training minutes of each model (default: an equal share of --minutes)'
    )
    parser.add_argument('--compile', action='store_true', help='train with torch.compile')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--test-bytes', type=int, default=TEST_BYTES, help='bytes of the test split to score')
    args, given = parse_args(parser, argv)
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
