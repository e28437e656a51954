"""Traces of the profiler, summed by kernel, kind and phase."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.gpu.trainer import PHASES

# parts of kernel names in lower case, by kind. The first kind that matches counts
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
# seconds. The device needs less than this between two kernels
GAP = 5e-6


@dataclass(frozen=True)
class Work:
    """A kernel, copy or fill on the device, with times in seconds. On a CPU, an operation outside of any other."""

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
    """The name of a kernel without the prefixes that most names have."""
    return re.sub(r'^void |at::native::|\(anonymous namespace\)::|std::|c10::', '', name)


class Trace:
    """The figures of a Chrome trace of the profiler. `steps` is the number of steps in the trace."""

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
        """The phase of the host at a moment. Only times count, because other threads issue the backward pass."""
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
        """Seconds per step that the device works, in total or for one `kind` or `phase`."""
        found = (work for work in self.work if all(getattr(work, name) == value for name, value in match.items()))
        return sum(work.seconds for work in found) / self.steps

    def kernels(self) -> list[dict[str, Any]]:
        """Seconds and calls per step of each kernel, the most expensive first."""
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
        """Idle seconds and the number of gaps per step, by the phase of the work after the gap."""
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
        """Kernels that the host launches per step, by phase."""
        found = Counter(self.phase_at(each['ts']) for each in self.host if each['name'].startswith(LAUNCHES))
        return {phase: found[phase] / self.steps for phase in PHASES}

    def waits(self) -> dict[str, dict[str, float]]:
        """Calls and seconds per step of each function that waits for the device."""
        found = [event for event in self.host if 'Synchronize' in event['name']]
        return {
            name: dict(
                calls=sum(event['name'] == name for event in found) / self.steps,
                seconds=sum(event['dur'] for event in found if event['name'] == name) / 1e6 / self.steps,
            )
            for name in sorted({event['name'] for event in found})
        }

    def copied_bytes(self) -> float:
        """Bytes per step that copies and fills move. Kernels do not report theirs."""
        return sum(work.bytes for work in self.work) / self.steps
