"""Layers whose inputs are found again from their outputs, so that no layer's need be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .linear import autocast_dtype
from .norm import is_traced
from .recompute import Snapshot


class Coupling(NamedTuple):
    """A step that adds to some streams what it makes of others: streams that are read are none that are written."""

    fn: Callable[[list[Tensor]], list[Tensor]]
    """From the streams that are read, what is added to each that is written. Of all that it depends on, only random
    numbers may change between calls: they are drawn again as they were."""
    reads: Sequence[int]
    writes: Sequence[int]
    modules: Sequence[nn.Module]
    """All that `fn` calls or reads. Other tensors get no gradient."""


def run_couplings(
    couplings: Sequence[Coupling], streams: Sequence[Tensor], modules: Sequence[nn.Module] = ()
) -> list[Tensor]:
    """The streams after all couplings, in their order. `modules` are those that the couplings' modules are found in.

    In training, of all that happens on the way nothing is kept but the streams at the end: the backward pass takes from
    them what each coupling added, and forms it again to differentiate it. The gradients are the plain form's, at the
    price of a second forward pass. Gomez et al. 2017, arXiv 1707.04585, algorithm 1; for transformers: Kitaev et al.
    2020, arXiv 2001.04451, section 3. It is the plain form, which keeps what happens on the way:

    - under the compiler, the transforms of torch.func and dispatch modes, which see through plain operations alone;
    - where modules have hooks, which may keep a tensor for the loss, and get gradients of what is on the way;
    - where weights have a history of their own (`functional_call` with weights that were computed).

    The result can be differentiated once, while the weights have the values that they had. The backward pass raises
    RuntimeError otherwise.
    """
    if torch.is_grad_enabled() and not is_traced():
        now = Snapshot([*modules, *(module for coupling in couplings for module in coupling.modules)])
        parameters = now.parameters
        trains = any(t.requires_grad for t in (*streams, *parameters))
        seen = now.has_hooks or _has_any_global_hook()
        if trains and not seen and all(p.is_leaf for p in parameters):
            return list(_Reversible.apply(couplings, now, len(streams), *streams, *parameters))
    return run_plainly(couplings, streams)


def run_plainly(
    couplings: Sequence[Coupling],
    streams: Sequence[Tensor],
    drawn: list[list[Tensor] | None] | None = None,
    own: Sequence[torch.Generator] = (),
) -> list[Tensor]:
    """The streams after all couplings.

    `drawn` is given the states of the random number generators before each coupling, or None if it drew no number:
    those of the device and the modules' `own`.
    """
    streams = list(streams)
    device = streams[0].device
    now = [] if drawn is None else random_states(device, own)
    for fn, reads, writes, _ in couplings:
        for i, update in zip(writes, fn([streams[i] for i in reads]), strict=True):
            streams[i] = streams[i] + update
        if drawn is not None:
            before, now = now, random_states(device, own)
            drawn.append(None if all(map(torch.equal, before, now)) else before)
    return streams


def random_states(device: torch.device, own: Sequence[torch.Generator]) -> list[Tensor]:
    """The states of the generators that modules on this device draw from, and of their `own`."""
    states = [*(generator.get_state() for generator in own), torch.get_rng_state()]
    if device.type not in ('cpu', 'meta'):
        states.append(getattr(torch, device.type).get_rng_state(*of_device(device)))
    return states


def set_random_states(states: Sequence[Tensor], device: torch.device, own: Sequence[torch.Generator]) -> None:
    for generator, state in zip(own, states, strict=False):
        generator.set_state(state)
    first, *others = states[len(own) :]
    torch.set_rng_state(first)
    if others:
        getattr(torch, device.type).set_rng_state(others[0], *of_device(device))


def of_device(device: torch.device) -> list[torch.device]:
    # torch.mps has one generator, and its functions take no device
    return [] if device.type == 'mps' else [device]


@contextmanager
def drawing_again(
    states: Sequence[Tensor] | None, device: torch.device, own: Sequence[torch.Generator]
) -> Iterator[None]:
    """Inside, random numbers are those that came after `states`. Outside, they go on as if none had been drawn."""
    if states is None:
        yield
        return
    now = random_states(device, own)
    set_random_states(states, device, own)
    try:
        yield
    finally:
        set_random_states(now, device, own)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, couplings: Sequence[Coupling], modules: Snapshot, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.couplings, ctx.modules, ctx.count = couplings, modules, count
        # as it was, for what is formed again
        ctx.autocast = autocast_dtype(tensors[0].device)
        ctx.drawn = []
        streams = run_plainly(couplings, tensors[:count], ctx.drawn, modules.generators)
        # a stream that nothing was added to would be returned as it came
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
        # of the weights, this asks whether they were changed in place
        streams = list(ctx.saved_tensors[: ctx.count])
        into = list(grads)
        found: dict[int, Tensor] = {}
        device = streams[0].device
        autocast: Any = nullcontext()
        if torch.amp.is_autocast_available(device.type):
            autocast = torch.autocast(device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None)

        with ctx.modules.restored():
            for (fn, reads, writes, modules), drawn in zip(reversed(ctx.couplings), reversed(ctx.drawn), strict=True):
                wanted = [p for module in modules for p in module.parameters() if p.requires_grad]
                read = [streams[i].detach().requires_grad_() for i in reads]
                with torch.enable_grad(), autocast, drawing_again(drawn, device, ctx.modules.generators):
                    updates = fn(read)
                with torch.no_grad():
                    for i, update in zip(writes, updates, strict=True):
                        streams[i] = streams[i] - update
                # an update that depends on none of them has no gradient
                pairs = [(update, into[i]) for i, update in zip(writes, updates, strict=True) if update.requires_grad]
                if not pairs:
                    continue
                outs, ahead = zip(*((update, grad.to(update.dtype)) for update, grad in pairs), strict=True)
                got = torch.autograd.grad(outs, [*read, *wanted], ahead, allow_unused=True)
                for i, grad in zip(reads, got[: len(reads)], strict=True):
                    if grad is not None:
                        into[i] = into[i] + grad
                for p, grad in zip(wanted, got[len(reads) :], strict=True):
                    if grad is not None:
                        found[id(p)] = found[id(p)] + grad if id(p) in found else grad

        return None, None, None, *into, *(found.get(id(p)) for p in ctx.modules.parameters)
