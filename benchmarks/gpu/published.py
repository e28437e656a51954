"""Times steps of one version of the package. `speed.py --published` starts two of these processes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.common.models import PUBLISHED
from benchmarks.common.workers import serve
from simple_hierarchical_transformer import HierarchicalTransformer


class Model:
    """A model of the published package, and a batch of random ids."""

    def __init__(self) -> None:
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.held: tuple[Any, ...] | None = None

    def build(self, name: str, rows: int, changes: dict[str, Any]) -> None:
        self.held = self.model = self.ids = None
        config = {**PUBLISHED[name], **changes}
        torch.manual_seed(0)
        self.model = HierarchicalTransformer(**config).to(self.device)
        self.ids = torch.randint(1, config['num_tokens'], (rows, config['seq_len']), device=self.device)
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def step(self, half: bool) -> None:
        self.model.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss, _ = self.model(self.ids, return_loss=True)
        loss.backward()

    def answer(self, **asked: Any) -> dict[str, Any]:
        """The result of `measure`, or its error. The process continues after an error."""
        try:
            return self.measure(**asked)
        except Exception as error:
            self.held = None
            return dict(error=f'{type(error).__name__}: {error}')

    def measure(self, name: str, half: bool, rows: int, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Median seconds of a forward and backward pass, and the peak memory in bytes."""
        if self.held != (name, rows, half):
            self.build(name, rows, changes)
            for _ in range(3):
                self.step(half)
            self.held = (name, rows, half)
        seconds = []
        for _ in range(steps):
            self.wait()
            start = time.perf_counter()
            self.step(half)
            self.wait()
            seconds.append(time.perf_counter() - start)
        memory = torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else 0
        return dict(seconds=statistics.median(seconds), memory=memory)


def main() -> None:
    serve(Model().answer)
