"""What steps of generation ask for again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import is_dense
from .norm import is_traced


class LastResult:
    """Keeps the last result of a pure function of tensors, and computes it anew where an input has other values.

    Values are compared with copies of those that the result was computed from. Nothing cheaper is safe: a version
    counter does not see a write through `.data`, and an address may be used again. So this pays where the inputs are
    small beside the result. It keeps nothing where gradients are enabled, nothing on other devices than a CPU, where
    each comparison would wait for the device, and nothing of tensor subclasses or under a compiler or a transform.

    Threads may share one. A copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, list[Tensor], Any] | None = None

    def __reduce__(self) -> tuple[type[LastResult], tuple[()]]:
        return LastResult, ()

    def __call__(self, fn: Callable[..., Any], inputs: Sequence[Tensor], *args: Hashable) -> Any:
        """`fn(*inputs, *args)`."""
        if torch.is_grad_enabled() or is_traced() or not all(map(is_comparable, inputs)):
            return fn(*inputs, *args)
        key = (args, [(t.dtype, t.device) for t in inputs])
        # read once: another thread may replace it at any time
        last = self._last
        if last is not None and last[0] == key and all(map(torch.equal, inputs, last[1])):
            return last[2]
        # computed from the copies, so that both belong together even if the inputs change meanwhile
        copies = [t.detach().clone() for t in inputs]
        result = fn(*copies, *args)
        # under a mode that pretends to compute, tensors made of real ones are not real
        if all(map(is_comparable, copies)):
            self._last = (key, copies, result)
        return result


def is_comparable(tensor: Tensor) -> bool:
    return is_dense(tensor) and tensor.device.type == 'cpu'
