"""What torch.export, torch.onnx and torch.compile ask for beside plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def is_exporting() -> bool:
    """Whether torch.export or torch.onnx traces. Older versions of PyTorch do not tell it from the compiler."""
    return getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)()


def stable_sort(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Integers `(rows, n)` in order, and where each came from: of equal ones the first comes first."""
    if not is_exporting():
        return numbers.sort(dim=-1, stable=True)
    # ONNX has no sort that is stable: what is sorted are ranks, made to differ by their places
    in_order, order = numbers.sort(dim=-1)
    rank = F.pad((in_order[:, 1:] != in_order[:, :-1]).long().cumsum(-1), (1, 0))
    n = numbers.shape[-1]
    return in_order, (rank * n + order).sort(dim=-1).values % n


def first_of(x: Tensor, n: int, dim: int = 1) -> Tensor:
    """The first n along `dim`, where it may have a few more."""
    if not torch.compiler.is_compiling():
        return x.narrow(dim, 0, n)
    # a view has one layout where it leaves something out and another where it does not, and a graph would be for one
    return x.index_select(dim, torch.arange(n, device=x.device))


# a compiler makes a graph for each of these, where it would make one for each length
SIDES = sorted(size for power in range(32) for size in (1 << power, 3 << power))


def side_of_square(n: int) -> int:
    """The side of the smallest square that has room for n; the next of a few sizes where a compiler traces."""
    if not torch.compiler.is_compiling():
        return math.isqrt(n - 1) + 1
    for side in SIDES:
        if side * side >= n:
            break
    return side


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 2."""
    size = 2
    while size < n:
        size *= 2
    return size
