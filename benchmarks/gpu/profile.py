"""Where the time of a training step goes: kernels, launch gaps, and where the host waits for the device.

    python benchmarks/gpu/profile.py                                     the preset and the flat model, eager
    python benchmarks/gpu/profile.py --models 'flat, window 64' --modes eager compiled

Writes to the folder $OUT: profile.json, profile.txt with all tables, and a Chrome trace of each model, packed, where it
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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# the checkout and benchmarks/ in the place of this folder, whose profile.py would hide the standard library's
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from side_by_side import ROOT
from torch.profiler import ProfilerActivity

from benchmarks.gpu import common
from benchmarks.gpu.common import CONTEXT, MODELS, MODES, PHASES, ROWS, WIDTH, Bench, Trainer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.report import write_text

# what the name of a kernel contains, in lower case; the first that fits counts
KINDS = {
    'attention': ('attention', 'flash', 'fmha', 'sdpa'),
    'matmul': ('nvjet', 'gemm', 'cutlass', 'cublas', 'splitk', 'gemv', 'triton_tem', '::mm', '::bmm', '::addmm'),
    'norm': ('layer_norm', 'rms_norm', 'gammabeta'),
    'sort, gather, scatter': ('sort', 'embedding', 'gather', 'scatter', 'index_', 'indexs', 'grad_weight', 'scan'),
    'fused elementwise': ('triton_poi',),
    'fused reduction': ('triton_red', 'triton_per'),
    'copy, cast': ('copy', 'memcpy', 'memset', 'catarray', 'fillfunctor', '::cat', '::fill', '::clone', '::zero'),
    'reduction': ('reduce_kernel', '::sum', '::mean', 'norm'),
    'elementwise': ('elementwise', 'multi_tensor_apply', '::mul', '::add', '::sub', '::div', '::pow', '::lerp'),
}
ON_DEVICE = ('kernel', 'gpu_memcpy', 'gpu_memset')
ON_HOST = ('cuda_runtime', 'cuda_driver')
LAUNCHES = ('cudaLaunch', 'cuLaunch', 'cudaGraphLaunch')
# idle times that are longer than what the device needs between two kernels
GAP = 5e-6
TRACE_BYTES = 15_000_000
DEFAULT = ['preset', 'flat, window 64']


@dataclass(frozen=True)
class Work:
    """A kernel, copy or fill on the device, in seconds. On a CPU, an operation that no other one called."""

    name: str
    phase: str
    start: float
    seconds: float
    bytes: int = 0

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), 'other')


def short(name: str) -> str:
    """The name of a kernel without what most have in common."""
    return re.sub(r'^void |at::native::|\(anonymous namespace\)::|std::|c10::', '', name)


class Trace:
    """What a Chrome trace of the profiler says about so many steps."""

    def __init__(self, events: Sequence[dict[str, Any]], steps: int) -> None:
        self.steps = steps
        self.events = [event for event in events if event.get('ph') == 'X']
        self.phases = [
            (event['ts'], event['ts'] + event['dur'], event['name'])
            for event in self.events
            if event.get('cat') == 'user_annotation' and event['name'] in PHASES
        ]
        self.host = [event for event in self.events if event.get('cat') in ON_HOST and self.phase_at(event['ts'])]
        self.work = sorted(self.find_work(), key=lambda work: work.start)

    def phase_at(self, moment: float) -> str:
        """In which phase the host was. A backward pass is issued by other threads, so times alone count."""
        return next((name for start, end, name in self.phases if start <= moment < end), '')

    def find_work(self) -> Iterator[Work]:
        issued = {event['args'].get('correlation'): event['ts'] for event in self.host}
        for event in self.events:
            if event.get('cat') in ON_DEVICE and (at := issued.get(event['args'].get('correlation'))) is not None:
                size = event['args'].get('bytes', 0)
                yield Work(event['name'], self.phase_at(at), event['ts'] / 1e6, event['dur'] / 1e6, size)
        if not issued:
            yield from self.find_operations()

    def find_operations(self) -> Iterator[Work]:
        ends: dict[Any, float] = {}
        operations = (event for event in self.events if event.get('cat') == 'cpu_op')
        for event in sorted(operations, key=lambda event: (event['ts'], -event['dur'])):
            if event['ts'] >= ends.get(event['tid'], 0.0) and (phase := self.phase_at(event['ts'])):
                ends[event['tid']] = event['ts'] + event['dur']
                yield Work(event['name'], phase, event['ts'] / 1e6, event['dur'] / 1e6)

    def total(self, **match: str) -> float:
        """Seconds of a step that the device works, of one `kind` or `phase` where it is given."""
        found = (work for work in self.work if all(getattr(work, name) == value for name, value in match.items()))
        return sum(work.seconds for work in found) / self.steps

    def kernels(self) -> list[dict[str, Any]]:
        """Of each kernel its seconds and calls in a step, the most expensive first."""
        seconds: Counter[tuple[str, str]] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        for work in self.work:
            seconds[work.name, work.kind] += work.seconds
            calls[work.name, work.kind] += 1
        return [
            dict(name=short(name), kind=kind, seconds=total / self.steps, calls=calls[name, kind] / self.steps)
            for (name, kind), total in seconds.most_common()
        ]  # fmt: skip

    def gaps(self) -> dict[str, Any]:
        """Seconds of a step in which the device had nothing to do, and how often, by the phase of what came next."""
        idle: Counter[str] = Counter()
        count: Counter[str] = Counter()
        end = self.work[0].start if self.work else 0.0
        for before, work in pairwise(self.work):
            end = max(end, before.start + before.seconds)
            if work.start - end > GAP:
                idle[work.phase] += work.start - end
                count[work.phase] += 1
        return {
            phase: dict(seconds=idle[phase] / self.steps, count=count[phase] / self.steps) for phase in PHASES
        }  # fmt: skip

    def launches(self) -> dict[str, float]:
        """How many kernels the host launches in a step, by phase."""
        found = Counter(self.phase_at(each['ts']) for each in self.host if each['name'].startswith(LAUNCHES))
        return {phase: found[phase] / self.steps for phase in PHASES}

    def waits(self) -> dict[str, dict[str, float]]:
        """Of each call by which the host waits for the device, how often it is made in a step, and its seconds."""
        found = [event for event in self.host if 'Synchronize' in event['name']]
        return {
            name: dict(
                calls=sum(event['name'] == name for event in found) / self.steps,
                seconds=sum(event['dur'] for event in found if event['name'] == name) / 1e6 / self.steps,
            )
            for name in sorted({event['name'] for event in found})
        }

    def copied_bytes(self) -> float:
        """Bytes that copies and fills of memory move in a step; kernels do not say how many they do."""
        return sum(work.bytes for work in self.work) / self.steps


@contextmanager
def noting_waits(found: Counter[str], device: torch.device) -> Iterator[None]:
    """Counts the places in the code at which the host waits for the device, as PyTorch's debug mode warns of them."""

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
    """The innermost lines of this checkout on the stack, the last first, and the line of any other code within."""
    here = Path(__file__).resolve().parent
    stack = [
        frame for frame in traceback.extract_stack()
        if Path(frame.filename).parent != here and Path(frame.filename).name != 'warnings.py'
    ]  # fmt: skip
    own = [frame for frame in stack if is_own(Path(frame.filename))]
    frames = [*own[-3:][::-1], *([stack[-1]] if stack and stack[-1] not in own else [])]
    return ' < '.join(f'{Path(frame.filename).name}:{frame.lineno} {frame.name}' for frame in frames)


def is_own(path: Path) -> bool:
    """Whether it is a file of this checkout, and not of what is installed in a hidden folder there."""
    return path.is_relative_to(ROOT) and not path.relative_to(ROOT).parts[0].startswith('.')


def profile_step(bench: Bench, name: str, mode: str, options: Any) -> dict[str, Any]:
    """A model's step: timed as it is, with its waits noted, and under the profiler. Writes the trace."""
    context, rows = (256, 2) if bench.toy else (options.context, options.rows)
    trainer = common.trainer_of(
        bench, name, how=mode, compile_mode=options.compile_mode, context=context, rows=rows, width=options.width
    )
    found: dict[str, Any] = dict(model=name, mode=mode, context=context, rows=rows, **trainer.warm_up())
    found |= trainer.timed(common.steps_within(trainer, 0.0 if bench.toy else 2.0))
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
    """How long the host takes to issue a step to a device that has nothing to do."""
    cost.wait(trainer.device)
    start = time.perf_counter()
    trainer.step()
    seconds = time.perf_counter() - start
    trainer.clock.spans()
    return seconds


def summary(rows: Sequence[dict[str, Any]]) -> str:
    head = ('a step', 'wall, ms', 'device, ms', 'idle', 'host issues, ms', 'launches', 'waits', 'copied, GB')
    return common.table(
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
                f'{row["copied_bytes"] / common.GIGABYTE:.2f}',
            )
            for row in rows
        ],
    )


def kind_table(row: dict[str, Any]) -> str:
    """Milliseconds of a step by kind and phase."""
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
    return common.table((f'{row["model"]}, {row["mode"]}, ms', *PHASES, 'all', 'of the device'), lines)


def details(row: dict[str, Any]) -> str:
    """All tables of one model."""
    kernels = common.table(
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
    places = common.table(('waits', 'where'), [(count, where) for where, count in row['waits_at'].items()])
    calls = common.table(
        ('calls', 'ms', 'what waits'),
        [(f'{each["calls"]:.1f}', f'{1000 * each["seconds"]:.2f}', name) for name, each in row['waits'].items()],
    )
    title = f'# {row["model"]}, {row["mode"]}, {row["rows"]} x {row["context"]:,}: one training step'
    rest = f'{row["distinct_kernels"] - len(row["kernels"])} other kernels'
    return '\n\n'.join(filter(None, (title, summary([row]), kind_table(row), kernels, rest, calls, places)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=DEFAULT)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['eager'])
    parser.add_argument('--compile-mode', default='default', choices=('default', 'max-autotune-no-cudagraphs'))
    parser.add_argument('--width', type=int, default=WIDTH, help=f'a multiple of {common.HEAD}')
    parser.add_argument('--context', type=int, default=CONTEXT)
    parser.add_argument('--rows', type=int, default=ROWS, help='sequences in a batch')
    parser.add_argument('--steps', type=int, default=2, help='to profile')
    parser.add_argument('--top', type=int, default=60, help='kernels to name')
    args, given = common.parse(parser, argv)
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
