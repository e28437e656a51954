"""Generation speed on one GPU: milliseconds per step and bytes per second, for one row and for many.

    python benchmarks/gpu/decode.py
    python benchmarks/gpu/decode.py --models preset --batches 1 16 64 256 --context 4096

Weights are bfloat16. The context is read first. Each way then generates bytes:

generate    `model.generate` with sampling; steps are replays of CUDA graphs
eager       the same without graphs
step        only the model, in a loop that takes the most likely id
compiled    the same with `torch.compile`, which runs eagerly after 8 graphs (see `graphs` in decode.json)

Writes decode.json to the folder $OUT.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == '__main__':
    # this checkout in the place of the folder of the script, whose profile.py would hide that of the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from benchmarks.common.tables import aligned
from benchmarks.gpu.bench import Bench, new_gpu_parser, parse_args
from benchmarks.gpu.models import CONTEXT, HEAD, MODELS, PLAIN, WIDTH, build, parameter_counts
from benchmarks.gpu.trainer import batches
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost

OURS = [name for name in MODELS if name != PLAIN]
WAYS = ('generate', 'eager', 'step', 'compiled')
DEFAULT = ['preset', 'flat, window 64', 'flat, full']
# seconds to allow for the first part of a kind
EXPECTED = {'generate': 25.0, 'eager': 15.0, 'step': 15.0, 'compiled': 150.0}

# generates a number of ids after ids `(batch, 1)` and the state before them
Writer = Callable[[Tensor, Any, int], object]


@torch.no_grad()
def write(step: Any, ids: Tensor, state: Any, count: int) -> None:
    """Greedy generation that only calls the model."""
    for _ in range(count):
        logits, state = step(ids, state=state, return_state=True)
        ids = logits[:, -1:].argmax(dim=-1)


def writer_for(model: HierarchicalTransformer, way: str, toy: bool) -> Writer:
    if way == 'generate':
        return lambda ids, state, count: model.generate(ids, count, state=state)
    if way == 'eager':
        eager = patch('simple_hierarchical_transformer.generation.loop.pays_to_capture', lambda *_: False)
        return eager(lambda ids, state, count: model.generate(ids, count, state=state))
    step = torch.compile(model, **(dict(backend='eager') if toy else {})) if way == 'compiled' else model
    return lambda ids, state, count: write(step, ids, state, count)


@torch.no_grad()
def measure(bench: Bench, model: HierarchicalTransformer, way: str, batch: int, args: Any) -> dict[str, Any]:
    """Seconds per step, as a median over repeats that start from the same state.

    Each call of `generate` captures its graphs, so its time per step comes from the difference of two calls, one with
    four times as many steps. `first_seconds` is the time of a first call of four steps. `start_seconds` is the time of
    a call besides its steps.
    """
    context, seconds, repeats = (32, 0.0, 1) if bench.toy else (args.context, 1.0, 5)
    prompt = next(batches(batch, context, bench.device, count=1))
    _, state = model(prompt[:, :-1], return_state=True)
    ids, writer = prompt[:, -1:], writer_for(model, way, bench.toy)

    def timed(count: int) -> float:
        start_state = state.clone()
        cost.wait(bench.device)
        start = time.perf_counter()
        writer(ids, start_state, count)
        cost.wait(bench.device)
        return (time.perf_counter() - start) / count

    counters = torch._dynamo.utils.counters
    counters.clear()
    first = 4 * timed(4)
    steps, start = min(max(int(seconds / timed(4)), 16), 512), 0.0
    if way == 'generate':
        steps = 16 if bench.toy else 256
        timed(steps)
        pairs = [(steps * timed(steps), 4 * steps * timed(4 * steps)) for _ in range(3)]
        each = statistics.median((long - short) / (3 * steps) for short, long in pairs)
        start = statistics.median(short for short, _ in pairs) - steps * each
    else:
        each = statistics.median(timed(steps) for _ in range(repeats))
    return dict(
        way=way, batch=batch, context=context, seconds=each, bytes_a_second=batch / each, steps=steps,
        first_seconds=first, start_seconds=start, state_bytes=state.nbytes, graphs=counters['stats']['unique_graphs'],
    )  # fmt: skip


def ratios_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes per second of the largest batch against the smallest, and of each way against `generate`."""
    speed = {(row['model'], row['way'], row['batch']): row['bytes_a_second'] for row in rows}
    found = {}
    for model, way, batch in speed:
        sizes = [each for name, other, each in speed if (name, other) == (model, way)]
        if batch == max(sizes) > min(sizes):
            least = min(sizes)
            found[f'{model}, {way}: batch {batch} / {least}'] = speed[model, way, batch] / speed[model, way, least]
        if way != 'generate' and (model, 'generate', batch) in speed:
            other = speed[model, 'generate', batch]
            found[f'{model}, batch {batch}: {way} / generate'] = speed[model, way, batch] / other
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_gpu_parser(__doc__)
    parser.add_argument('--models', nargs='+', choices=OURS, default=DEFAULT)
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS)
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 64])
    parser.add_argument('--context', type=int, default=1024, help='bytes to read first')
    parser.add_argument('--width', type=int, default=WIDTH, help=f'a multiple of {HEAD}')
    args, given = parse_args(parser, argv)
    if min(args.batches) < 1:
        parser.error(f'--batches: must be at least 1, got {min(args.batches)}')
    bench = Bench('decode', args, given)
    rows: list[dict[str, Any]] = []
    bench.found |= dict(rows=rows, ratios={})
    for way in args.ways:
        for name in args.models:
            dtype = torch.float32 if bench.toy else torch.bfloat16
            model = build(name, CONTEXT, args.width, bench.toy).eval().to(bench.device, dtype)
            for batch in args.batches:
                found = bench.part(
                    f'{name}, {way}, batch {batch}',
                    lambda model=model, way=way, batch=batch: measure(bench, model, way, batch, args),
                    kind=way, expected=EXPECTED[way],
                )  # fmt: skip
                if found:
                    rows.append(dict(model=name, **parameter_counts(model), **found))
            torch._dynamo.reset()
    bench.found['ratios'] = ratios = ratios_of(rows)
    bench.close(
        aligned(
            ('generation', 'parameters', 'batch', 'ms a step', 'bytes a second', 'start, s', 'state, MB'),
            [
                (
                    f'{row["model"]}, {row["way"]}',
                    f'{row["parameters"] / 1e6:.1f} M',
                    row['batch'],
                    f'{1000 * row["seconds"]:.3f}',
                    f'{row["bytes_a_second"]:.0f}',
                    f'{row["start_seconds"]:.2f}',
                    f'{row["state_bytes"] / 1e6:.1f}',
                )
                for row in rows
            ],
        ),
        aligned(('bytes a second', 'ratio'), [(label, f'{value:.2f}') for label, value in ratios.items()]),
    )


if __name__ == '__main__':
    main()
