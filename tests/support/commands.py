"""Commands that tests run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_command(*args: object, module: str | None = None) -> list[str]:
    """The command line of train.py, or of a module."""
    return [sys.executable, *(('-m', module) if module else (str(ROOT / 'train.py'),)), *map(str, args)]


def run(*args: object, module: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs train.py, or a module, and returns its output."""
    return subprocess.run(
        run_command(*args, module=module),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, **env},
    )
