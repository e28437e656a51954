"""Time, speed limits and memory of a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Seconds between marks. On CUDA the marks are events in the stream."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == 'cuda'
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds between each mark and the next. Waits for the device, and forgets the marks."""
        marks, self.marks = self.marks, []
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return [b - a for a, b in pairwise(marks)]


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 5, count: int = 10) -> float:
    """Seconds of one call: the median over repeats of `count` calls, after a warm-up."""
    clock, found = Clock(device), []
    for repeat in range(repeats + 1):
        clock.mark()
        for _ in range(count):
            run()
        clock.mark()
        [span] = clock.spans()
        # the first repeat is a warm-up
        if repeat:
            found.append(span / count)
    return statistics.median(found)


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a product of square matrices. Shares of the peak refer to it."""
    # not zeros, which take less power, so that a card runs faster
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second of a copy in device memory. Read and written bytes both count."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def free(device: torch.device) -> None:
    """Releases memory that nothing refers to."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0


def reset_peak(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else 0
