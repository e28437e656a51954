"""Tensors that may be sharded over processes (FSDP2). Every process has to call these functions.

They use DTensor directly. `torch.distributed.checkpoint.state_dict` has two disadvantages: it creates a missing
optimizer state by a step of the optimizer, and takes half a second to import in a run of one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    # Takes half a second to import, so it is imported only for sharded tensors.
    from typing import TypeGuard

    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Returns whether a tensor is a DTensor, without importing it."""
    return hasattr(tensor, 'full_tensor')


def is_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Returns whether FSDP2 shards the parameters of a module."""
    return hasattr(module, 'reshard') and hasattr(module, 'unshard')


def full(tensor: Tensor) -> Tensor:
    """Returns the whole tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor as `like` is sharded, with the device and dtype of `like`.

    Every process has the whole tensor and keeps its part of it, so there is no communication.
    """
    tensor = tensor.to(like.device, like.dtype)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements)


def reshard(model: nn.Module) -> None:
    """Frees full weights that a forward pass may have left, so that the parameters are shards again."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded. Raises ValueError if their shapes differ."""
    if target.shape != source.shape:
        raise ValueError(f'a tensor of shape {tuple(target.shape)} cannot hold one of {tuple(source.shape)}')
    target.copy_(shard_like(source, target))
