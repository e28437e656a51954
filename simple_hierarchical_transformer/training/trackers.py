"""TensorBoard, Weights & Biases and Trackio, through accelerate."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

TRACKERS = ('tensorboard', 'wandb', 'trackio')
PROJECT = 'simple-hierarchical-transformer'


def check_trackers(names: Sequence[str] | None) -> None:
    """Raises ValueError where a tracker's package is missing, which accelerate would pass over in silence."""
    for name in names or ():
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'--log-with {name}: it is not installed (pip install {name})')


def start_trackers(accelerator: Accelerator, settings: dict[str, Any], out: Path, step: int) -> None:
    """Begins to log, or goes on from `step`: under the same name, and what had come after it is logged anew."""
    if not settings['log_with']:
        return
    flat = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in settings.items()}
    again = dict(name=out.name, resume='allow')
    accelerator.init_trackers(
        PROJECT,
        config=flat,
        init_kwargs=dict(
            tensorboard=dict(purge_step=step + 1 if step else None, flush_secs=10),
            wandb=dict(dir=str(out), id=out.name, **again),
            trackio=again,
        ),
    )
