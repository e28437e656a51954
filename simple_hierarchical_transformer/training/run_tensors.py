"""The tensors that change during a run, gathered for a checkpoint and restored from one.

Gathered tensors are full and on the CPU, so they do not depend on the number of processes. Every process must call the
functions that gather them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import State
from ..model import HierarchicalTransformer
from ..weights import shared_names
from .optim import WeightAverage, state_shapes
from .sharded import fill, full, reshard, shard_like

OPTIMIZER, WEIGHTS, SEGMENTS = 'optimizer', 'weights', 'segments'


def gather(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Gathers full tensors one by one. Returns them if `keep`, else an empty dict."""
    held = {}
    for name, tensor in named:
        whole = full(tensor.detach())
        if keep:
            held[name] = whole.cpu()
    return held


def gather_weights(model: nn.Module, average: WeightAverage | None = None, *, keep: bool = True) -> dict[str, Tensor]:
    """Gathers the state dict of a model that may be sharded, or of its average if there is one.

    A tensor with several names appears only under the first one.
    """
    reshard(model)
    shared = shared_names(model)

    def held() -> dict[str, Tensor]:
        return gather(((name, each) for name, each in model.state_dict().items() if name not in shared), keep)

    if average is None:
        return held()
    with average.applied():
        # copies, because the model gets its own weights back
        return {name: tensor.clone() for name, tensor in held().items()}


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """Gathers the optimizer's tensors by parameter name. Raises RuntimeError if some parameters have none."""
    reshard(model)
    named = dict(model.named_parameters())
    if optimizer.state and (missing := [name for name, p in named.items() if p not in optimizer.state]):
        raise RuntimeError(f'the optimizer has no state for {", ".join(missing)}, which it had for others')
    return gather(
        (
            (f'{OPTIMIZER}.{name}.{key}', value)
            for name, p in named.items()
            for key, value in optimizer.state.get(p, {}).items()
        ),
        keep,
    )


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores the result of `gather_optimizer`. Raises ValueError if it comes from another optimizer."""
    held = {name: tensor for name, tensor in tensors.items() if name.startswith(f'{OPTIMIZER}.')}
    if not held:
        # it was saved before the first step
        return
    shapes = state_shapes(optimizer)
    named = {
        f'{OPTIMIZER}.{name}.{key}': (p, key, shape)
        for name, p in model.named_parameters()
        for key, shape in shapes[p].items()
    }
    if unlike := sorted(held.keys() ^ named.keys()):
        raise ValueError(f'the checkpoint is of another optimizer, with other tensors: {", ".join(unlike[:3])}')
    on_device = {p for g in optimizer.param_groups if g.get('fused') or g.get('capturable') for p in g['params']}
    for name, (p, key, shape) in named.items():
        if held[name].shape != shape:
            raise ValueError(f'{name} must have the shape {shape}, got {tuple(held[name].shape)}')
        if key == 'step':
            optimizer.state[p][key] = held[name].to(p.device if p in on_device else 'cpu', copy=True)
        else:
            # one number for each weight or row
            optimizer.state[p][key] = shard_like(held[name], p).clone()


def gather_segments(states: Sequence[State], gather_rows: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gathers the rows of all states: those of this process, then those of the next. `gather_rows` joins processes."""
    joined = map(torch.cat, zip(*map(rows_first, states), strict=True))
    return {f'{SEGMENTS}.{i}': gather_rows(each.contiguous()).cpu() for i, each in enumerate(joined)}


def restore_segments(
    model: HierarchicalTransformer, tensors: dict[str, Tensor], position: int, *, count: int, part: tuple[int, int]
) -> list[State]:
    """Restores the `count` states of process i of n, where `part` is `(i, n)`."""
    held = [tensors[f'{SEGMENTS}.{i}'] for i in range(sum(key.startswith(SEGMENTS) for key in tensors))]
    index, parts = part
    size = len(held[0]) // parts // count
    states = []
    for i in range(index * count, (index + 1) * count):
        rows = iter([each[i * size : (i + 1) * size] for each in held])

        def take(old: Tensor, rows: Any = rows) -> Tensor:
            return next(rows).to(old.device, old.dtype, copy=True)

        def take_by_phase(old: Tensor, rows: Any = rows) -> Tensor:
            return next(rows).transpose(0, 1).to(old.device, old.dtype, copy=True).contiguous()

        states.append(replace(model.initial_state(size).map(take, take_by_phase), position=position))
    return states


def rows_first(state: State) -> list[Tensor]:
    """All tensors of a state, each `(batch, ...)`, in the order of `State.map`."""
    return list(state.map(lambda tensor: tensor, lambda tensor: tensor.transpose(0, 1)).tensors())


def gather_all(
    model: HierarchicalTransformer,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    states: Sequence[State],
    gather_rows: Callable[[Tensor], Tensor],
    *,
    keep: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gathers the weights, averaged if there is an average, and the other tensors that a run needs to resume.

    Every process must call it. Those that do not `keep` the result get empty dicts.
    """
    tensors = gather_optimizer(model, optimizer, keep=keep)
    if states:
        tensors |= gather_segments(states, gather_rows)
    if average is not None:
        tensors |= {f'{WEIGHTS}.{name}': tensor for name, tensor in gather_weights(model, keep=keep).items()}
    return gather_weights(model, average, keep=keep), tensors


def restore_all(
    model: HierarchicalTransformer,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Restores the result of `gather_all`, except the states of segments."""
    shared = shared_names(model)
    reshard(model)

    def put(held: dict[str, Tensor]) -> None:
        for name, target in model.state_dict().items():
            # a tensor with several names was written only once
            fill(target, held[shared.get(name, name)])

    put(weights)
    if average is not None:
        # the model now has the averaged weights: move them to the average
        average.swap()
        put({key[len(WEIGHTS) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f'{WEIGHTS}.')})
    restore_optimizer(model, optimizer, tensors)
