"""Tensors that may be sharded over processes (FSDP2), seen whole. Every process has to call what is here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# torch.distributed.tensor takes half a second to import: only where there is such a tensor


def full(tensor: Tensor) -> Tensor:
    """The tensor with all its parts."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, sharded as `like` is: each keeps its part, nothing is sent."""
    tensor = tensor.to(like.device, like.dtype)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = like
    mesh = sharded.device_mesh
    copies = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(mesh, sharded.placements)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, 'full_tensor')


def reshard(model: nn.Module) -> None:
    """Frees the full weights that a forward pass may have left, so that parameters are their shards again."""
    for module in model.modules():
        if hasattr(module, 'reshard') and hasattr(module, 'unshard'):
            module.reshard()  # type: ignore[operator]


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Writes a whole tensor into one that may be sharded. Raises ValueError where the shapes differ."""
    if target.shape != source.shape:
        raise ValueError(f'a tensor of shape {tuple(target.shape)} cannot hold one of {tuple(source.shape)}')
    target.copy_(shard_like(source, target))
