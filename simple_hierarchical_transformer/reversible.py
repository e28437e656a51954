"""Layers whose inputs are found again from their outputs, so that no layer's need be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import autocast_dtype
from .norm import is_traced


class Coupling(NamedTuple):
    """A step that adds to some streams what it makes of others: streams that are read are none that are written."""

    fn: Callable[[list[Tensor]], list[Tensor]]
    """From the streams that are read, what is added to each that is written. Of all that it depends on, only random
    numbers may change between calls: they are drawn again as they were."""
    reads: Sequence[int]
    writes: Sequence[int]
    parameters: Callable[[], Sequence[nn.Parameter]]
    """All that `fn` has, at the moment."""


def run_couplings(couplings: Sequence[Coupling], streams: Sequence[Tensor]) -> list[Tensor]:
    """The streams after all couplings, in their order.

    In training, of all that happens on the way nothing is kept but the streams at the end: the backward pass takes from
    them what each coupling added, and forms it again to differentiate it. The gradients are the plain form's, at the
    price of a second forward pass. Gomez et al. 2017, arXiv 1707.04585, algorithm 1; for transformers: Kitaev et al.
    2020, arXiv 2001.04451, section 3. Under the compiler, the transforms of torch.func and dispatch modes, which see
    through plain operations alone, it is the plain form.

    The result can be differentiated once, while the modules have the weights that they had. The backward pass raises
    RuntimeError otherwise.
    """
    parameters = all_parameters(couplings)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (*streams, *parameters))
    if trains and not is_traced():
        return list(_Reversible.apply(couplings, len(streams), *streams, *parameters))
    return run_plainly(couplings, streams)


def all_parameters(couplings: Sequence[Coupling]) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for coupling in couplings for p in coupling.parameters()))


def run_plainly(
    couplings: Sequence[Coupling], streams: Sequence[Tensor], drawn: list[list[Tensor] | None] | None = None
) -> list[Tensor]:
    """The streams after all couplings.

    `drawn` is given the state of the random number generators before each coupling, or None if it drew no number.
    """
    streams = list(streams)
    device = streams[0].device
    now = [] if drawn is None else random_states(device)
    for fn, reads, writes, _ in couplings:
        for i, update in zip(writes, fn([streams[i] for i in reads]), strict=True):
            streams[i] = streams[i] + update
        if drawn is not None:
            before, now = now, random_states(device)
            drawn.append(None if all(map(torch.equal, before, now)) else before)
    return streams


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that modules on this device draw from."""
    states = [torch.get_rng_state()]
    if device.type not in ('cpu', 'meta'):
        states.append(getattr(torch, device.type).get_rng_state(*of_device(device)))
    return states


def set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        getattr(torch, device.type).set_rng_state(states[1], *of_device(device))


def of_device(device: torch.device) -> list[torch.device]:
    # torch.mps has one generator, and its functions take no device
    return [] if device.type == 'mps' else [device]


@contextmanager
def drawing_again(states: Sequence[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those that came after `states`. Outside, they go on as if none had been drawn."""
    if states is None:
        yield
        return
    now = random_states(device)
    set_random_states(states, device)
    try:
        yield
    finally:
        set_random_states(now, device)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, couplings: Sequence[Coupling], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.couplings, ctx.count = couplings, count
        # as it was, for what is formed again
        ctx.autocast = autocast_dtype(tensors[0].device)
        ctx.drawn = []
        streams = run_plainly(couplings, tensors[:count], ctx.drawn)
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
        streams, parameters = list(ctx.saved_tensors[: ctx.count]), ctx.saved_tensors[ctx.count :]
        into = list(grads)
        found: dict[int, Tensor] = {}
        order = all_parameters(ctx.couplings)
        if len(order) != len(parameters) or any(p is not q for p, q in zip(order, parameters, strict=True)):
            raise RuntimeError(
                'reversible layers form again what they added, and their weights were swapped for others since '
                '(functional_call): keep them until after the backward pass'
            )
        device = streams[0].device
        autocast: Any = nullcontext()
        if torch.amp.is_autocast_available(device.type):
            autocast = torch.autocast(device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None)

        for (fn, reads, writes, own), drawn in zip(reversed(ctx.couplings), reversed(ctx.drawn), strict=True):
            wanted = [p for p in own() if p.requires_grad]
            read = [streams[i].detach().requires_grad_() for i in reads]
            with torch.enable_grad(), autocast, drawing_again(drawn, device):
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

        return None, None, *into, *(found.get(id(p)) for p in order)
