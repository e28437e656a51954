"""Reversible layers: the backward pass computes their inputs from their outputs, so that none are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .precision import autocast_dtype, no_autocast
from .recompute import Snapshot
from .rng import get_rng_states, replay_rng
from .tracing import is_traced


class Coupling(NamedTuple):
    """An additive coupling: adds a function of some streams to other streams. No stream is both read and written."""

    fn: Callable[[list[Tensor]], list[Tensor]]
    """Maps the streams in `reads` to one update for each stream in `writes`. It must be deterministic, except for
    random numbers. The backward pass draws the same random numbers again."""
    reads: Sequence[int]
    writes: Sequence[int]
    modules: Sequence[nn.Module]
    """All modules that `fn` calls or reads. Other tensors get no gradient."""


def run_couplings(
    couplings: Sequence[Coupling], streams: Sequence[Tensor], modules: Sequence[nn.Module] = ()
) -> list[Tensor]:
    """Apply all couplings in order, and return the resulting streams.

    In training, only the final streams are stored. The backward pass subtracts what each coupling added, and computes
    it again to differentiate it. The gradients equal those of the plain form, at the cost of a second forward pass.
    Gomez et al. 2017, arXiv 1707.04585, algorithm 1; for transformers: Kitaev et al. 2020, arXiv 2001.04451, section 3.

    The plain form, which stores all intermediate results, runs instead:

    - under the compiler, transforms of torch.func and dispatch modes, which see only plain operations;
    - if modules have hooks, which may keep a tensor for the loss or get gradients of intermediate results;
    - if weights are not leaves of the graph (`functional_call` with computed weights).

    Args:
        couplings: applied in order.
        streams: tensors, `(batch, seq, dim)` each.
        modules: modules that contain those of the couplings.

    Raises:
        RuntimeError: in the backward pass, if weights were changed in place since the forward pass, or if gradients
            should have a graph themselves (`create_graph`).
    """
    if torch.is_grad_enabled() and not is_traced():
        snapshot = Snapshot([*modules, *(module for coupling in couplings for module in coupling.modules)])
        parameters = snapshot.parameters
        trains = any(t.requires_grad for t in (*streams, *parameters))
        has_hooks = snapshot.has_hooks or _has_any_global_hook()
        if trains and not has_hooks and all(p.is_leaf for p in parameters):
            return list(_Reversible.apply(couplings, snapshot, len(streams), *streams, *parameters))
    return run_plainly(couplings, streams)


def run_plainly(
    couplings: Sequence[Coupling],
    streams: Sequence[Tensor],
    rng_states: list[list[Tensor] | None] | None = None,
    generators: Sequence[torch.Generator] = (),
) -> list[Tensor]:
    """Apply all couplings in order, and return the resulting streams.

    It appends one entry for each coupling to `rng_states`: the random states before that coupling, or None if the
    coupling drew no number. The states are those of the device and of `generators`.
    """
    streams = list(streams)
    device = streams[0].device
    after = [] if rng_states is None else get_rng_states(generators, device)
    for fn, reads, writes, _ in couplings:
        for i, update in zip(writes, fn([streams[i] for i in reads]), strict=True):
            streams[i] = streams[i] + update
        if rng_states is not None:
            before, after = after, get_rng_states(generators, device)
            rng_states.append(None if all(map(torch.equal, before, after)) else before)
    return streams


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, couplings: Sequence[Coupling], snapshot: Snapshot, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.couplings, ctx.snapshot, ctx.count = couplings, snapshot, count
        # the backward pass recomputes updates under the same autocast
        ctx.autocast = autocast_dtype(tensors[0].device)
        ctx.rng_states = []
        streams = run_plainly(couplings, tensors[:count], ctx.rng_states, snapshot.generators)
        # an output must not be one of the inputs, as a stream without updates would be
        streams = [t.clone() if t is given else t for t, given in zip(streams, tensors[:count], strict=True)]
        ctx.save_for_backward(*streams, *tensors[count:])
        return tuple(streams)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'reversible layers cannot be differentiated twice (create_graph = True): build the model with '
                'reversible = False'
            )
        # reading `saved_tensors` also checks that no weight was changed in place
        streams = list(ctx.saved_tensors[: ctx.count])
        stream_grads = list(grads)
        weight_grads: dict[int, Tensor] = {}
        snapshot, device = ctx.snapshot, streams[0].device
        autocast = no_autocast(device) if ctx.autocast is None else torch.autocast(device.type, dtype=ctx.autocast)

        with snapshot.restored():
            for (fn, reads, writes, modules), states in zip(
                reversed(ctx.couplings), reversed(ctx.rng_states), strict=True
            ):
                weights = [p for module in modules for p in module.parameters() if p.requires_grad]
                inputs = [streams[i].detach().requires_grad_() for i in reads]
                with torch.enable_grad(), autocast, replay_rng(states, snapshot.generators, device):
                    updates = fn(inputs)
                with torch.no_grad():
                    for i, update in zip(writes, updates, strict=True):
                        streams[i] = streams[i] - update
                # an update may depend on no input and no weight
                pairs = [
                    (update, stream_grads[i]) for i, update in zip(writes, updates, strict=True) if update.requires_grad
                ]
                if not pairs:
                    continue
                outputs, output_grads = zip(*((update, grad.to(update.dtype)) for update, grad in pairs), strict=True)
                found = torch.autograd.grad(outputs, [*inputs, *weights], output_grads, allow_unused=True)
                for i, grad in zip(reads, found[: len(reads)], strict=True):
                    if grad is not None:
                        stream_grads[i] = stream_grads[i] + grad
                for p, grad in zip(weights, found[len(reads) :], strict=True):
                    if grad is not None:
                        weight_grads[id(p)] = weight_grads[id(p)] + grad if id(p) in weight_grads else grad

        return None, None, None, *stream_grads, *(weight_grads.get(id(p)) for p in snapshot.parameters)
