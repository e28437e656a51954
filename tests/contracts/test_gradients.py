"""Gradients: every weight has one, and every way to compute it agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.matrix import build_case, every_trained_case, every_uneven_case, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import build, configs
from support.kinds import MAPS, loss_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simple_hierarchical_transformer import HierarchicalTransformer, resampling
from simple_hierarchical_transformer.pieces import Pieces


def gradients_of(model: HierarchicalTransformer, ids: Tensor) -> tuple[Tensor, ...]:
    loss = loss_of(model, ids)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@given(config=configs(), n=st.integers(2, 40))
def test_every_parameter_takes_part_in_the_loss(config: dict[str, Any], n: int) -> None:
    """Every parameter gets a gradient, also where a level is too short for its rollouts.

    DistributedDataParallel waits for each gradient.
    """
    model = build(config)
    loss, _ = model(torch.randint(0, 11, (2, n)), return_loss=True)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@settings(max_examples=15)
@given(config=configs(), with_state=st.booleans())
def test_checkpointing_changes_no_gradient(config: dict[str, Any], with_state: bool) -> None:
    # reversible layers already compute activations again
    config = {**config, 'reversible': False}
    plain, again = build(config), build(dict(config, gradient_checkpointing=True))
    ids = torch.randint(0, 11, (2, 20))

    def run(model: HierarchicalTransformer) -> tuple[Tensor, ...]:
        if not with_state:
            return gradients_of(model, ids)
        _, state = model(ids[:, :9], return_state=True)
        loss, _, _ = model(ids[:, 9:], return_loss=True, state=state, return_state=True)
        return torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(run(again), run(plain), rtol=0, atol=1e-12)


class Float64Alone(TorchDispatchMode):
    """Fails if an operation on float64 tensors reads or returns a floating-point tensor of another dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        of = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.is_floating_point()]
        if any(t.dtype == torch.float64 for t in of):
            assert all(t.dtype == torch.float64 for t in of), func
        return out


@given(config=configs())
@settings(max_examples=25)
def test_the_loss_of_a_float64_model_is_computed_in_float64(config: dict[str, Any]) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, 19))
    with Float64Alone():
        loss, _ = model(ids, return_loss=True)
    # under a dispatch mode the loss takes its plain path: the fused kernels differ by rounding only
    torch.testing.assert_close(model(ids, return_loss=True)[0], loss, rtol=2e-14, atol=1e-15)


def soft(out: Tensor, pieces: Pieces) -> Tensor:
    """`resampling.straight_through` without the trick: times the probability of what the rule decided."""
    p = pieces.probability
    return out if p is None else out * torch.where(pieces.boundary, p, 1 - p)[..., None]


@every_trained_case
def test_gradients_of_every_case_are_the_slope_of_its_loss(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a random direction, against central differences.

    Losses of detached tokens are off. A factor of 1 with another gradient becomes a factor with its own.
    """
    detached = dict(next_latent_loss_weight=0.0, chunk_summarizers=None, surprise_loss_weight=0.0)
    model, ids = build_case(config | detached), ids_of(config)
    monkeypatch.setattr(resampling, 'straight_through', soft)
    parameters = list(model.parameters())
    along = [torch.randn_like(p) for p in parameters]
    _, *gradients = gradients_of(model, ids)
    slope = sum((grad.to_dense() * v).sum() for grad, v in zip(gradients, along, strict=True) if grad is not None)

    # small, because a kink of an activation may be near
    ends, step = [], 1e-8
    with torch.no_grad():
        for sign in (1, -2):
            for p, v in zip(parameters, along, strict=True):
                p += sign * step * v
            ends.append(loss_of(model, ids))
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)


@every_trained_case
def test_fast_paths_of_every_case_give_the_numbers_of_the_plain_one(config: dict[str, Any]) -> None:
    """A hook on every map, convolution and norm makes the model call the modules one by one."""
    model, ids = build_case(config), ids_of(config)
    with torch.no_grad():
        logits = model(ids)
    fused, called = gradients_of(model, ids), set()
    maps = [module for module in model.modules() if isinstance(module, MAPS)]
    for module in maps:
        module.register_forward_hook(lambda module, *_: called.add(module))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients_of(model, ids), fused, rtol=1e-7, atol=1e-9)
    assert called


@pytest.mark.slow
@every_uneven_case
def test_every_part_of_the_loss_falls(config: dict[str, Any]) -> None:
    """The model learns one batch: every weight has a gradient, and recomputing layers changes none of them."""
    # reversible layers already compute activations again
    checkpointing = not config.get('reversible', False)
    model, again = build(config).float(), build({**config, 'gradient_checkpointing': checkpointing}).float()
    ids = torch.randint(0, 11, (2, 25))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for step in range(25):
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        if step == 0:
            again(ids, return_loss=True)[0].backward()
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: part.item() for name, part in parts.named.items()})
    # the losses of a placed level are sums over its tokens, whose number changes where training moves its boundaries
    moves = any(level.boundaries not in (None, 'every') for level in model.levels)
    moving = [f'/{level.compression}x' for level in model.levels if level.is_placed and moves]
    for name in history[0]:
        if name.startswith(('next_latent', 'ponder', 'pieces')) or name.endswith(tuple(moving)):
            continue
        assert history[-1][name] < 0.9 * history[0][name], name
