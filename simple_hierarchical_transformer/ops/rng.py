"""States of random number generators, to draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def get_rng_states(generators: Sequence[torch.Generator], device: torch.device | None = None) -> list[Tensor]:
    """The states of `generators`. With a device, also those of the default generators of the CPU and that device."""
    states = [generator.get_state() for generator in generators]
    if device is not None:
        states.append(torch.get_rng_state())
        if device.type not in ('cpu', 'meta'):
            states.append(getattr(torch, device.type).get_rng_state(*device_arguments(device)))
    return states


def set_rng_states(
    states: Sequence[Tensor], generators: Sequence[torch.Generator], device: torch.device | None = None
) -> None:
    """Restore what `get_rng_states` returned for the same generators and device."""
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)
    if device is not None:
        cpu_state, *device_states = states[len(generators) :]
        torch.set_rng_state(cpu_state)
        if device_states:
            getattr(torch, device.type).set_rng_state(device_states[0], *device_arguments(device))


def device_arguments(device: torch.device) -> list[torch.device]:
    # torch.mps has one generator, and its functions take no device
    return [] if device.type == 'mps' else [device]


@contextmanager
def replay_rng(
    states: Sequence[Tensor] | None, generators: Sequence[torch.Generator], device: torch.device | None = None
) -> Iterator[None]:
    """A context in which random numbers start from `states`. Afterwards they continue as if none had been drawn.

    Without states, it does nothing.
    """
    if states is None:
        yield
        return
    current = get_rng_states(generators, device)
    set_rng_states(states, generators, device)
    try:
        yield
    finally:
        set_rng_states(current, generators, device)
