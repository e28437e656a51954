"""Number formats: contexts without autocast, and tensors that must not be stored in half precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies matrices on this device. None where autocast is off or not supported."""
    # not every version of the compiler can trace this call. The device 'meta' has no autocast and is not compiled
    asks = not torch.compiler.is_compiling()
    if (asks and not torch.amp.is_autocast_available(device.type)) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off for this device. It does nothing where autocast is off already."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def exact_dtype() -> torch.dtype:
    """The default dtype, or float32 where the default dtype has fewer bits."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def is_rounded(tensor: Any) -> bool:
    """Whether this is a tensor of a floating-point dtype with fewer than 32 bits."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


class KeepsExact(nn.Module):
    """A module that keeps the tensors named in `exact` in float32 or float64, in a half-precision model too.

    Angles grow with the position. Rounding a frequency would rotate distant positions by wrong angles. Values loaded
    in half precision become float32. A loaded value that is only a rounded copy of the present one is ignored.
    """

    exact: tuple[str, ...] = ()

    def exact_value(self, name: str) -> Tensor:
        """The value that a rounded copy is compared with."""
        return getattr(self, name).detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name).detach() for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            tensor = getattr(self, name)
            if is_rounded(tensor):
                tensor.data = value.to(tensor.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.exact:
            loaded, value = state_dict.get(f'{prefix}{name}'), self.exact_value(name)
            if loaded is not None and is_rounded(loaded):
                state_dict[f'{prefix}{name}'] = unrounded(loaded, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


def unrounded(loaded: Tensor, value: Tensor) -> Tensor:
    """`value` where `loaded` is a rounded copy of it, otherwise `loaded` in float32."""
    if loaded.shape == value.shape and not (loaded.is_meta or value.is_meta):
        value = value.to(loaded.device)
        if torch.equal(value.to(loaded.dtype), loaded):
            return value
    return loaded.float()
