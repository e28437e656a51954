"""The time of a training step: kernels, gaps between them, and places where the host waits for the device.

    python benchmarks/gpu/profile.py                                     the preset and the flat model, eager
    python benchmarks/gpu/profile.py --models 'flat, window 64' --modes eager compiled

Writes to the folder $OUT: profile.json, profile.txt with all tables, and a compressed Chrome trace of each model, if it
has less than 15 MB (open it in https://ui.perfetto.dev).
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script, whose profile.py would hide that of the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch.profiler import ProfilerActivity

from benchmarks.common.machine import ROOT
from benchmarks.common.results import write_text
from benchmarks.common.tables import aligned
from benchmarks.gpu.bench import GIGABYTE, Bench, new_gpu_parser, parse_args
from benchmarks.gpu.models import CONTEXT, HEAD, MODELS, MODES, ROWS, WIDTH
from benchmarks.gpu.trace import KINDS, Trace
from benchmarks.gpu.trainer import PHASES, Trainer, steps_within, trainer_of
from simple_hierarchical_transformer.training import cost

TRACE_BYTES = 15_000_000
DEFAULT = ['preset', 'flat, window 64']


@contextmanager
def noting_waits(found: Counter[str], device: torch.device) -> Iterator[None]:
    """Counts the places where the host waits for the device. PyTorch's debug mode warns of them."""

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if 'called a synchronizing' in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = note
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('warn')
        try:
            yield
        finally:
            if device.type == 'cuda':
                torch.cuda.set_sync_debug_mode('default')


def place() -> str:
    """The innermost lines of this checkout on the stack, the last first, and the innermost line of other code."""
    here = Path(__file__).resolve().parent
    stack = [
        frame for frame in traceback.extract_stack()
        if Path(frame.filename).parent != here and Path(frame.filename).name != 'warnings.py'
    ]  # fmt: skip
    inside = [frame for frame in stack if in_checkout(Path(frame.filename))]
    frames = [*inside[-3:][::-1], *([stack[-1]] if stack and stack[-1] not in inside else [])]
    return ' < '.join(f'{Path(frame.filename).name}:{frame.lineno} {frame.name}' for frame in frames)


def in_checkout(path: Path) -> bool:
    """Whether a file belongs to this checkout. Hidden folders, such as .venv, do not."""
    return path.is_relative_to(ROOT) and not path.relative_to(ROOT).parts[0].startswith('.')


def profile_step(bench: Bench, name: str, mode: str, options: Any) -> dict[str, Any]:
    """Times a step of a model, counts its waits, and profiles it. Writes the trace."""
    context, rows = (256, 2) if bench.toy else (options.context, options.rows)
    trainer = trainer_of(
        bench, name, how=mode, compile_mode=options.compile_mode, context=context, rows=rows, width=options.width
    )
    found: dict[str, Any] = dict(model=name, mode=mode, context=context, rows=rows, **trainer.warm_up())
    found |= trainer.timed(steps_within(trainer, 0.0 if bench.toy else 2.0))
    found['host_seconds'] = host_seconds(trainer)
    places: Counter[str] = Counter()
    with noting_waits(places, bench.device):
        trainer.step()
    found['waits_at'] = dict(places.most_common())

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == 'cuda' else [])]
    cost.wait(bench.device)
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(options.steps):
            trainer.step()
        cost.wait(bench.device)
    trainer.clock.spans()
    path = bench.folder / f'trace-{re.sub("[^a-z0-9]+", "-", f"{name} {mode}")}.json.gz'
    profiled.export_chrome_trace(str(path))
    with gzip.open(path, 'rt', encoding='utf-8') as file:
        trace = Trace(json.load(file)['traceEvents'], options.steps)
    if path.stat().st_size > TRACE_BYTES:
        path.unlink()
    kernels = trace.kernels()
    return dict(
        found,
        device_seconds=trace.total(),
        kinds={kind: {phase: trace.total(kind=kind, phase=phase) for phase in PHASES} for kind in (*KINDS, 'other')},
        gaps=trace.gaps(),
        launches=trace.launches(),
        waits=trace.waits(),
        copied_bytes=trace.copied_bytes(),
        kernels=kernels[: options.top],
        distinct_kernels=len(kernels),
    )


def host_seconds(trainer: Trainer) -> float:
    """Seconds that the host takes to issue a step to an idle device."""
    cost.wait(trainer.device)
    start = time.perf_counter()
    trainer.step()
    seconds = time.perf_counter() - start
    trainer.clock.spans()
    return seconds


def summary(rows: Sequence[dict[str, Any]]) -> str:
    head = ('a step', 'wall, ms', 'device, ms', 'idle', 'host issues, ms', 'launches', 'waits', 'copied, GB')
    return aligned(
        head,
        [
            (
                f'{row["model"]}, {row["mode"]}',
                f'{1000 * row["seconds"]:.1f}',
                f'{1000 * row["device_seconds"]:.1f}',
                f'{100 * max(1 - row["device_seconds"] / row["seconds"], 0):.0f} %',
                f'{1000 * row["host_seconds"]:.1f}',
                f'{sum(row["launches"].values()):.0f}',
                f'{sum(each["calls"] for each in row["waits"].values()):.0f}',
                f'{row["copied_bytes"] / GIGABYTE:.2f}',
            )
            for row in rows
        ],
    )


def kind_table(row: dict[str, Any]) -> str:
    """Milliseconds of a step by kind of kernel and phase."""
    kinds = sorted(row['kinds'].items(), key=lambda item: -sum(item[1].values()))
    lines = [
        (kind, *(f'{1000 * each[phase]:.2f}' for phase in PHASES), f'{1000 * sum(each.values()):.2f}',
         f'{100 * sum(each.values()) / max(row["device_seconds"], 1e-12):.1f} %')
        for kind, each in kinds if sum(each.values())
    ]  # fmt: skip
    gaps = row['gaps']
    lines.append(
        ('idle, while profiled', *(f'{1000 * gaps[phase]["seconds"]:.2f}' for phase in PHASES),
         f'{1000 * sum(each["seconds"] for each in gaps.values()):.2f}', '')
    )  # fmt: skip
    return aligned((f'{row["model"]}, {row["mode"]}, ms', *PHASES, 'all', 'of the device'), lines)


def details(row: dict[str, Any]) -> str:
    """All tables of one model."""
    kernels = aligned(
        ('ms', 'of the device', 'calls', 'us a call', 'kind', 'kernel'),
        [
            (
                f'{1000 * each["seconds"]:.2f}',
                f'{100 * each["seconds"] / max(row["device_seconds"], 1e-12):.1f} %',
                f'{each["calls"]:.0f}',
                f'{1e6 * each["seconds"] / each["calls"]:.1f}',
                each['kind'],
                each['name'][:140],
            )
            for each in row['kernels']
        ],
    )
    places = aligned(('waits', 'where'), [(count, where) for where, count in row['waits_at'].items()])
    calls = aligned(
        ('calls', 'ms', 'what waits'),
        [(f'{each["calls"]:.1f}', f'{1000 * each["seconds"]:.2f}', name) for name, each in row['waits'].items()],
    )
    title = f'# {row["model"]}, {row["mode"]}, {row["rows"]} x {row["context"]:,}: one training step'
    rest = f'{row["distinct_kernels"] - len(row["kernels"])} other kernels'
    return '\n\n'.join(filter(None, (title, summary([row]), kind_table(row), kernels, rest, calls, places)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_gpu_parser(__doc__)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=DEFAULT)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['eager'])
    parser.add_argument('--compile-mode', default='default', choices=('default', 'max-autotune-no-cudagraphs'))
    parser.add_argument('--width', type=int, default=WIDTH, help=f'a multiple of {HEAD}')
    parser.add_argument('--context', type=int, default=CONTEXT)
    parser.add_argument('--rows', type=int, default=ROWS, help='sequences in a batch')
    parser.add_argument('--steps', type=int, default=2, help='steps to profile')
    parser.add_argument('--top', type=int, default=60, help='kernels to list')
    args, given = parse_args(parser, argv)
    bench = Bench('profile', args, given)
    bench.measure_card()
    rows: list[dict[str, Any]] = []
    bench.found['profiles'] = rows
    for mode in args.modes:
        for name in args.models:
            found = bench.part(
                f'{name}, {mode}', lambda name=name, mode=mode: profile_step(bench, name, mode, args), kind=mode,
                expected=120.0 if mode == 'compiled' else 45.0,
            )  # fmt: skip
            if found:
                rows.append(found)
                write_text(bench.folder / 'profile.txt', '\n\n\n'.join(map(details, rows)) + '\n')
            torch._dynamo.reset()
    bench.close(*(kind_table(row) for row in rows), summary(rows))


if __name__ == '__main__':
    main()
