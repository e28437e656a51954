"""Checks for tracing, and operations in a form that compilers and exporters can trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

R = TypeVar('R')


def is_traced() -> bool:
    """Whether only plain PyTorch operations may run: under the compiler, a transform of torch.func or a dispatch mode.

    There, custom autograd functions, caches and direct kernel calls must not run. Dispatch modes, such as a FLOP
    counter, fake tensors or selective checkpointing, see only PyTorch operations. A mode that measures the fused
    routes sets `measures_routes = True`, which keeps them on.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch._C._len_torch_dispatch_stack() > 0 and not all(map(measures_routes, dispatch_modes())))
    )


def measures_routes(mode: TorchDispatchMode) -> bool:
    return getattr(mode, 'measures_routes', False)


def is_transformed() -> bool:
    """Whether a transform of torch.func (`vmap`, `grad`, `jvp` ...) is active."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether torch.export or torch.onnx traces. PyTorch before 2.7 does not distinguish them from the compiler."""
    return getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)()


def outside_graphs(fn: Callable[..., R], *args: Any) -> R:
    """`fn(*args)`, which a compiler does not trace."""
    if not torch.compiler.is_compiling():
        return fn(*args)
    # here, because it imports the compiler, which takes longer than this package
    from .untraced import untraced

    return untraced(fn, *args)


def stable_sort(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Sort integers `(rows, n)` stably along the last dimension. Returns the sorted values and their indices."""
    if not is_exporting():
        return numbers.sort(dim=-1, stable=True)
    # ONNX has no stable sort. Sort unique keys instead: the rank of each value, then its index.
    sorted_numbers, order = numbers.sort(dim=-1)
    rank = F.pad((sorted_numbers[:, 1:] != sorted_numbers[:, :-1]).long().cumsum(-1), (1, 0))
    n = numbers.shape[-1]
    return sorted_numbers, (rank * n + order).sort(dim=-1).values % n


def first_of(x: Tensor, n: int, dim: int = 1) -> Tensor:
    """Take the first `n` entries along `dim`, which may have a few more."""
    if not torch.compiler.is_compiling():
        return x.narrow(dim, 0, n)
    # the strides of a view depend on whether it drops entries, so a graph would be specialized to one case
    return x.index_select(dim, torch.arange(n, device=x.device))


# a compiler makes one graph for each of these sizes, instead of one for each sequence length
SIDES = sorted(size for power in range(32) for size in (1 << power, 3 << power))


def side_of_square(n: int) -> int:
    """The side of the smallest square with at least `n` cells. Under a compiler, one of a few sizes."""
    if not torch.compiler.is_compiling():
        return math.isqrt(n - 1) + 1
    for side in SIDES:
        if side * side >= n:
            break
    return side


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 2."""
    size = 2
    while size < n:
        size *= 2
    return size
