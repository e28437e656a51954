"""What a compiler must not trace. This module imports the compiler: import it where one is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar('R')


@torch.compiler.disable
def untraced(fn: Callable[..., R], *args: Any) -> R:
    return fn(*args)
