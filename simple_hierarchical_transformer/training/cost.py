"""What a model costs: parameters, operations, memory, and what the machine could do at most."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..model import HierarchicalTransformer
from .optim import KERNELS, LOOKUPS, NGRAMS

# where in a parameter's name the number of its level stands
LEVEL_AT = {
    'compressors': 1,
    'post_token_emb_norms': 1,
    'layers': 2,
    'norms': 1,
    'latent_dynamics': 1,
    'chunk_summarizers': 1,
    'to_prophet': 1,
    'to_quantized': 1,
    'step_embeds': 1,
    'halting': 1,
    'autoencoder': 2,
}


def level_of(name: str) -> int | None:
    """Which level a parameter of that name belongs to, None where to all."""
    parts = name.split('.')
    at = LEVEL_AT.get(parts[0])
    return int(parts[at]) if at is not None and parts[at].isdigit() else None


def parameters_by_level(model: HierarchicalTransformer) -> dict[int | None, int]:
    """How many parameters each level has; under None those that serve several: embeddings, merges, shared ones."""
    counts: Counter[int | None] = Counter(dict.fromkeys((*range(len(model.levels)), None), 0))
    owners: dict[nn.Parameter, set[int | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(level_of(name))
    for parameter, levels in owners.items():
        counts[levels.pop() if len(levels) == 1 else None] += parameter.numel()
    return dict(counts)


def step_flops(model: HierarchicalTransformer, length: int) -> float:
    """Operations that a sequence of `length` takes to learn from: forward once, backward twice as many.

    Products with weights, and what mixers do besides (`products`, where they tell), two operations for a multiplication
    and an addition.
    """
    total = 0.0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if multiplies(name, parameter):
            total += 2 * parameter.numel() * length / apart(model, name)
    layers: Any = model.layers
    for layer in layers:
        for level, block in zip(model.levels, layer, strict=True):
            if block is None:
                continue
            row = length / level.stride / level.phases
            total += level.phases * getattr(block.attn, 'products', lambda _: 0.0)(row)
    return 3 * total


def multiplies(name: str, parameter: nn.Parameter) -> bool:
    """Whether tokens are multiplied with a parameter of that name: not with tables, biases, or what makes kernels."""
    apart = {*LOOKUPS, *NGRAMS, *KERNELS} & set(name.split('.'))
    return parameter.ndim >= 2 and not apart and not name.endswith('bias')


def apart(model: HierarchicalTransformer, name: str) -> float:
    """How many positions the tokens that a weight is multiplied with stand apart, on average over its rows."""
    parts, strides = name.split('.'), [level.stride for level in model.levels]
    if parts[0] == 'hierarchical_merges':
        merge: Any = model.hierarchical_merges[int(parts[1])]
        # an hourglass' merges live between two levels, whose strides count from the finer one's
        finest = strides[model.order[int(parts[1])]] if model.arrangement == 'hourglass' else 1
        if parts[2] == 'receivers':
            own = merge.strides[int(parts[3])]
            if parts[4] != 'to_kv':
                return finest * own
            # without a window, what no token of the receiver hears is not projected
            return finest * max(merge.strides[int(parts[5])], 1 if merge.window else own)
        if parts[2] == 'to_others':
            return finest * merge.strides[int(parts[3])]
        if parts[2:4] == ['net', '3']:
            # what is made for a receiving level, at its tokens
            rows = [(merge.dims[i], merge.strides[i]) for i in merge.into]
            return finest * sum(dim for dim, _ in rows) / sum(dim / stride for dim, stride in rows)
        return finest
    if parts[0] == 'autoencoder':
        if parts[1] == 'encoders':
            return model.autoencoder.grids[int(parts[2])]  # type: ignore[union-attr]
        # a decoder splits each of the tokens of a level's map, one for each of the ids that it sums up
        return 1 if parts[1] == 'to_ids' else model.levels[int(parts[2])].compression
    level = level_of(name)
    if level is None:
        return 1
    if 'to_scores' in parts or 'to_values' in parts:
        # formed for each of the finer tokens that are pooled
        return strides[level] // model.compressors[level].windows.stride  # type: ignore[operator, return-value]
    return strides[level]


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second that a large product reaches on this device, now: the best of a few."""
    native = device.type != 'cpu' or dtype == torch.float32
    # where a product is slow, a small one says so soon enough
    size = (8192 if device.type != 'cpu' else 2048) if native else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def bytes_kept(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, parameters left out."""
    # by the storage itself: on 'meta' there is no address
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # held until all is counted, so that no address is used twice
        output = model(*args, **kwargs)
    total = sum(kept.values())
    del output
    return total


def memory(model: nn.Module, optimizer: torch.optim.Optimizer, *, averaged: bool) -> dict[str, int]:
    """Bytes that a run holds on each device from its first step on, activations aside."""
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    return {'weights': weights, 'gradients': weights, 'optimizer': moments, 'averaged weights': weights * averaged}
