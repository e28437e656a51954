"""Steps of one package's models, timed in a process of its own: `speed.py --published` asks two of these in turns.

Its argument is the folder that has the package, since the published one and this checkout have the same name.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# before any other place that has a package of that name
sys.path.insert(0, sys.argv[1])

import torch
from side_by_side import serve
from train_step import CONFIGS

from simple_hierarchical_transformer import HierarchicalTransformer


class Worker:
    def __init__(self) -> None:
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.held: tuple[Any, ...] | None = None

    def build(self, name: str, rows: int, changes: dict[str, Any]) -> None:
        self.held = self.model = self.ids = None
        config = {**CONFIGS[name], **changes}
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
        """What `measure` finds, or the error that it met: the process goes on."""
        try:
            return self.measure(**asked)
        except Exception as error:
            self.held = None
            return dict(error=f'{type(error).__name__}: {error}')

    def measure(self, name: str, half: bool, rows: int, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Seconds of a forward and backward pass, the median over so many, and the most memory that was taken."""
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


if __name__ == '__main__':
    serve(Worker().answer)
