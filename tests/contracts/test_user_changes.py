"""Wrapped modules and hooks take effect, for random configurations."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import build, configs
from support.kinds import MAPS, loss_of, read_in_chunks
from torch import Tensor, nn


class Scaled(nn.Module):
    """An adapter: scales the output of a module by a learned number. It has no other attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module by another under all of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, name, new)


@settings(max_examples=25)
@given(config=configs(), kind=st.sampled_from(MAPS))
def test_a_wrapped_map_or_norm_takes_effect_everywhere(config: dict[str, Any], kind: type[nn.Module]) -> None:
    """A map's or norm's output is linear in its parameters, so a scale of 1 has the gradient sum(p * p.grad)."""
    ids = torch.randint(0, 11, (2, 19))
    model = build(config)
    wrapped = copy.deepcopy(model)
    loss = loss_of(model, ids)
    loss.backward()
    pairs = []
    for module, twin in zip(list(model.modules()), list(wrapped.modules()), strict=True):
        if isinstance(module, kind) and any(p.grad is not None for p in module.parameters()):
            pairs.append((module, Scaled(twin)))
            replace(wrapped, twin, pairs[-1][1])

    again = loss_of(wrapped, ids)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    again.backward()
    for module, scaled in pairs:
        expected = sum((p.detach() * p.grad).sum() for p in module.parameters() if p.grad is not None)
        assert scaled.scale.grad is not None, module
        torch.testing.assert_close(scaled.scale.grad, expected, rtol=1e-8, atol=1e-10)

    # a scale of 1.5 equals parameters multiplied by 1.5, in one pass and in chunks
    with torch.no_grad():
        for module, scaled in pairs:
            scaled.scale.fill_(1.5)
            for parameter in module.parameters():
                parameter.mul_(1.5)
        torch.testing.assert_close(wrapped(ids), model(ids), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(read_in_chunks(wrapped, ids), read_in_chunks(model, ids), rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(config=configs(), backward=st.booleans())
def test_hooks_fire_with_the_inputs_and_outputs_of_their_module(config: dict[str, Any], backward: bool) -> None:
    """Hooks fire on every module and change no number. The output of a map or norm equals its own forward."""
    config = {**config, 'reversible': False}
    ids = torch.randint(0, 11, (2, 19))
    model = build(config)
    expected = loss_of(model, ids)
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    fired: set[nn.Module] = set()

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fired.add(module)
        if type(module) in MAPS:
            # without gradients: recomputation ends, by an exception, at the last tensor that is saved for them
            with torch.no_grad():
                torch.testing.assert_close(type(module).forward(module, *args), output, rtol=1e-10, atol=1e-10)

    for module in model.modules():
        if backward:
            module.register_full_backward_hook(lambda module, *_: fired.add(module) and None)
        else:
            module.register_forward_hook(check)
    loss = loss_of(model, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, gradients, rtol=1e-8, atol=1e-9)
    trained = {id(p) for p, grad in zip(model.parameters(), gradients, strict=True) if grad is not None}
    for name, module in model.named_modules():
        if type(module) in MAPS and any(id(p) in trained for p in module.parameters()):
            assert module in fired, name
