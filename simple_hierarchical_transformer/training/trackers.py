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
    """Raises ValueError if the package of a tracker is missing. accelerate would skip it without an error."""
    for name in names or ():
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'--log-with {name}: it is not installed (pip install {name})')


def start_trackers(accelerator: Accelerator, settings: dict[str, Any], out: Path, *, step: int, identity: str) -> None:
    """Starts the trackers, or resumes them from `step` under the same `identity`.

    Raises ValueError if a tracker cannot start, for example without a key or a network.
    """
    if not settings['log_with']:
        return
    flat = {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in settings.items()}
    kwargs: dict[str, Any] = dict(
        # entries after the checkpoint will be logged again
        tensorboard=dict(purge_step=step + 1 if step else None, flush_secs=10),
        wandb=dict(dir=str(out), name=out.name, id=identity, resume='allow'),
        trackio=dict(name=f'{out.name}-{identity}', resume='allow'),
    )
    try:
        accelerator.init_trackers(PROJECT, config=flat, init_kwargs=kwargs)
    except Exception as error:
        # these packages raise many types of errors, and trackers that did not start cannot be ended
        accelerator.trackers = []
        raise ValueError(f'--log-with {" ".join(settings["log_with"])}: {error}') from error
