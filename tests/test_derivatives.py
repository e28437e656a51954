"""Second derivatives, and FLOPs as PyTorch counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.kinds import KIND_BASE, KINDS, loss_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.ops.cross_entropy import cross_entropy
from simple_hierarchical_transformer.ops.scan import scan


@pytest.mark.parametrize('kind', ['attention', 's4d', 'gateloop', 'all losses'])
def test_second_derivatives_are_exact(kind: str) -> None:
    """A Hessian-vector product equals the change of the gradient along the vector, if no target is detached."""
    changes = {} if kind in ('s4d', 'gateloop') else dict(mixer='simple-gateloop')
    model = HierarchicalTransformer(
        **{**KIND_BASE, **KINDS[kind], **changes, 'depth': 1}, next_latent_loss_weight=0
    ).double()
    ids = torch.randint(0, 13, (2, 17))
    parameters = [p for p in model.parameters() if p.requires_grad]
    along = [torch.randn_like(p) for p in parameters]

    def gradients(**create: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(model, ids), parameters, **create)

    slope: Any = sum((grad * v).sum() for grad, v in zip(gradients(create_graph=True), along, strict=True))
    found = torch.autograd.grad(slope, parameters, allow_unused=True)
    ends, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p += sign * step * v
        ends.append(gradients())
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p -= sign * step * v
    for (name, _), hessian, up, down in zip(model.named_parameters(), found, *ends, strict=True):
        expected = (up - down) / (2 * step)
        hessian = torch.zeros_like(expected) if hessian is None else hessian
        torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f'{name}: {text}')  # noqa: B023


def test_a_hessian_of_the_loss_and_of_the_scan() -> None:
    head, targets = nn.Linear(5, 7, bias=False).double(), torch.randint(0, 7, (2, 6))
    x = torch.randn(2, 6, 5, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return cross_entropy(x, head, targets, -1)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(head(x).flatten(0, 1), targets.flatten())

    v = torch.randn_like(x)
    found, expected = (torch.autograd.functional.hvp(fn, x, v)[1] for fn in (ours, plain))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    a, b = (torch.rand(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    initial = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(scan, (a, b, initial))


@pytest.mark.parametrize('kind', KINDS)
def test_a_flop_counter_sees_a_training_step(kind: str) -> None:
    model = HierarchicalTransformer(**{**KIND_BASE, **KINDS[kind], 'dim': 16})
    ids = torch.randint(0, 13, (1, 33))
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids).backward()
    # the backward pass takes twice the products of the forward pass
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        loss_of(model, ids)
    assert counter.get_total_flops() > 2 * forward.get_total_flops()
