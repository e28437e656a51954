"""Timed training steps on text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Clock
from simple_hierarchical_transformer.data.files import standard_library
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.optim import build_optimizer

PHASES = ('forward', 'backward', 'optimizer')
WARM_UP = 3


def text(size: int) -> Tensor:
    """Bytes `(size,)`, uint8, of Python's standard library. Real text matters, because tables depend on it."""
    held = bytearray()
    for file in standard_library():
        held += file.read_bytes()
        if len(held) >= size:
            break
    return torch.frombuffer(held, dtype=torch.uint8)[:size]


def batches(rows: int, length: int, device: torch.device, count: int = 8) -> Iterator[Tensor]:
    """An endless stream of ids `(rows, length + 1)`. It repeats `count` batches, which are on the device already."""
    source = text(max(1 << 22, 2 * length))
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(source) - length, (count, rows), generator=draw)
    held = source[starts[..., None] + torch.arange(length + 1)].long().to(device)
    while True:
        yield from held


class Trainer:
    """Trains a model under bf16 autocast with the optimizer of the preset, and times the phases of each step.

    Args:
        model: a model on the device. `model(ids, return_loss=True)` returns the loss first.
        batches: ids of each step.
        how: one of models.MODES.
        compile_mode: for `torch.compile`.
    """

    def __init__(
        self, model: nn.Module, batches: Iterator[Tensor], *, how: str, compile_mode: str = 'default', toy: bool = False
    ) -> None:
        self.model, self.batches = model, batches
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(
            model, models.PRESET['optimizer'], lr=models.PRESET['lr'], table_lr=models.PRESET['table_lr'],
            weight_decay=0.1, sparse=how == 'eager',
        )  # fmt: skip
        # as in train.py, gradient clipping skips row-wise tables
        self.clipped = [p for group in self.optimizer.param_groups if group['rule'] != 'rows' for p in group['params']]
        self.call = model if how == 'eager' else models.compile_model(model, how, compile_mode, toy)
        self.clock = Clock(self.device)

    def step(self) -> Tensor:
        ids = next(self.batches)
        self.clock.mark()
        with record_function('forward'), torch.autocast(self.device.type, torch.bfloat16):
            loss, _ = self.call(ids, return_loss=True)
        self.clock.mark()
        with record_function('backward'):
            loss.backward()
        self.clock.mark()
        with record_function('optimizer'):
            nn.utils.clip_grad_norm_(self.clipped, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.clock.mark()
        return loss

    def warm_up(self) -> dict[str, float]:
        """Runs the first steps. Returns the seconds of the first one, which compiles, and the last loss."""
        start = time.perf_counter()
        self.step()
        cost.wait(self.device)
        first = time.perf_counter() - start
        for _ in range(WARM_UP - 1):
            loss = self.step()
        self.clock.spans()
        return dict(first_step_seconds=first, loss=loss.item())

    def timed(self, steps: int) -> dict[str, float]:
        """Median seconds of each phase and of a whole step."""
        for _ in range(steps):
            self.step()
        # the three phases of a step, and the time until the next step
        spans = self.clock.spans()
        found = {phase: statistics.median(spans[i :: len(PHASES) + 1]) for i, phase in enumerate(PHASES)}
        whole = [sum(spans[i : i + len(PHASES)]) for i in range(0, len(spans), len(PHASES) + 1)]
        return dict(seconds=statistics.median(whole), **found)


def steps_within(trainer: Trainer, seconds: float, least: int = 3, most: int = 100) -> int:
    """The number of steps that fit into `seconds`, between `least` and `most`."""
    return min(max(int(seconds / trainer.timed(least)['seconds']), least), most)


def alternate(trainers: dict[str, Trainer], rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Times of each trainer in each round. All take turns, so changes of the card's speed affect all of them."""
    steps = {name: steps_within(trainer, seconds) for name, trainer in trainers.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            found[name].append(trainer.timed(steps[name]))
    return found


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each value over the rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def trainer_of(bench: Bench, name: str, *, how: str, compile_mode: str, context: int, rows: int, width: int) -> Trainer:
    """A trainer of one of models.MODELS on the device of the bench."""
    model = models.build(name, context, width, bench.toy).to(bench.device)
    data = batches(rows, context, bench.device)
    return Trainer(model, data, how=how, compile_mode=compile_mode, toy=bench.toy)
