"""The progress of a run, and the commands that a run prints for its user."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Progress:
    """The progress of a run. Checkpoints store it."""

    identity: str = ''
    """The identifier of the run, in trackers and in its folder."""
    step: int = 0
    elapsed: float = 0.0
    """Seconds of training and scoring, including those before the run was resumed."""
    skipped: int = 0
    """Steps that were skipped because their loss or gradient was not finite."""
    in_a_row: int = 0
    """The number of consecutive skipped steps at present."""
    position: int = 0
    """The position of the state that segments carry along."""
    updates: int = 0
    """Updates of the averaged weights."""
    nats: float = 0.0
    """Sum of the training losses since the last row of metrics, over `scored` steps."""
    scored: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of what is recorded of placed levels since the last row of metrics, over `scored` steps."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """The state of float16's gradient scaler."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The rows of metrics."""


@dataclass(frozen=True)
class Workspace:
    """The folders of data and runs, and the commands that train, score and sample."""

    root: Path
    train: str = 'python train.py'
    score: str = 'python train.py --eval'
    sample: str = 'python -m simple_hierarchical_transformer.sample'

    @property
    def data(self) -> Path:
        return self.root / 'data'

    @property
    def runs(self) -> Path:
        return self.root / 'runs'

    def resuming(self, run: Path) -> str:
        return f'{self.train} --resume {shlex.quote(str(run))}'

    def scoring(self, model: Path, names: list[str], text_key: str) -> str:
        command = f'{self.score} {shlex.quote(str(model))} --data {shlex.join(names)}'
        return command if text_key == 'text' else f'{command} --text-key {shlex.quote(text_key)}'

    def sampling(self, model: Path) -> str:
        return f'{self.sample} {shlex.quote(str(model))} --prompt "The "'
