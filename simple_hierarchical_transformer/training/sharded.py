"""Tensors that may be spread over processes (FSDP2), seen whole. Every process has to call what is here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch.distributed.tensor takes half a second to import: only where there is such a tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts."""
    spread: Any = tensor
    return spread.full_tensor() if is_spread(tensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as `like` is: each keeps its part, nothing is sent."""
    tensor = tensor.to(like.device, like.dtype)
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    spread: Any = like
    mesh = spread.device_mesh
    copies = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(mesh, spread.placements)


def is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, 'full_tensor')


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Writes a whole tensor into one that may be spread. Raises ValueError where the shapes differ."""
    if target.shape != source.shape:
        raise ValueError(f'a tensor of shape {tuple(target.shape)} cannot hold one of {tuple(source.shape)}')
    target.copy_(spread_like(source, target))
