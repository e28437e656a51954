"""The machine and the version of the code that a result comes from."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# the figures are those of the processor: a run that found a GPU would use another precision
CPU = dict(ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')


def threads() -> str:
    count = torch.get_num_threads()
    return f'{count} thread{"s" if count > 1 else ""}'


def machine() -> str:
    """The date, the processor and the version of PyTorch, for the line above a table."""
    return f'{time.strftime("%Y-%m-%d")}, {platform.machine()}, {threads()}, torch {torch.__version__}, float32, no GPU'


def commit() -> str:
    """The commit of this checkout, or 'unknown' outside a git repository."""
    try:
        found = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return 'unknown'
    return found.stdout.strip() or 'unknown'
