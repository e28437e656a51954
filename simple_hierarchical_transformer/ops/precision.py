"""Tensors that half precision would spoil."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def exact_dtype() -> torch.dtype:
    """The default dtype, or float32 where that is less."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def is_rounded(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


class KeepsExact(nn.Module):
    """A module that keeps the tensors named in `exact` in float32 at least, in a half-precision model too.

    Angles grow with the position, so rounding what they are multiples of would turn far positions to other angles.
    What is loaded in half precision becomes float32. It is not taken where it is no more than a rounded copy of what
    is there already.
    """

    exact: tuple[str, ...] = ()

    def exact_value(self, name: str) -> Tensor:
        """What a rounded copy is compared with."""
        return getattr(self, name).detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
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
    """`value` where `loaded` is that, rounded; else `loaded` in float32."""
    if loaded.shape == value.shape and not (loaded.is_meta or value.is_meta):
        value = value.to(loaded.device)
        if torch.equal(value.to(loaded.dtype), loaded):
            return value
    return loaded.float()


def no_autocast(device: torch.device) -> Any:
    from contextlib import nullcontext

    from .linear import autocast_dtype

    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
