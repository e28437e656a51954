"""Tensors that may be spread over processes (FSDP2), seen whole. Every process has to call what is here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as `like` is: each keeps its part, nothing is sent."""
    tensor = tensor.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        mesh, like.placements
    )


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Writes a whole tensor into one that may be spread. Raises ValueError where the shapes differ."""
    if target.shape != source.shape:
        raise ValueError(f'a tensor of shape {tuple(target.shape)} cannot hold one of {tuple(source.shape)}')
    target.copy_(spread_like(source, target))
