"""Half precision: bfloat16 by autocast and as the dtype of weights, and float16 with a loss scaler."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from contracts.cases import CASES, LEVELS, RECIPE, WINDOW, build, words

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import MIXERS
from simple_hierarchical_transformer.training.optim import build_optimizer

from .compare import assert_losses_close, cosine, loss_and_gradients, norm
from .test_options import read_in_chunks

pytestmark = pytest.mark.gpu

LENGTH = 301
NAMES = [
    *MIXERS, 'window by auto', 'window by sdpa', 'window by local-attention', 'recipe', 'merge attention into all',
    'autoencoder', 'reversible', 'checkpointing', 'halting act', 'residual gru', 'grouped queries', 'losses',
    *(name for name in CASES if name.startswith('pattern')),
]  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_autocast_in_bfloat16_is_near_float32(name: str, device: torch.device) -> None:
    model, ids = build(CASES[name]).to(device), words(2, LENGTH).to(device)
    exact, exact_gradients = loss_and_gradients(model, model, ids)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        losses, gradients = loss_and_gradients(model, model, ids)
    assert_losses_close(losses, exact, 2e-2)
    assert gradients.keys() == exact_gradients.keys()
    assert cosine(gradients, exact_gradients) > 0.99
    assert norm(gradients) == pytest.approx(norm(exact_gradients), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize('config', [WINDOW, LEVELS, RECIPE], ids=['window', 'levels', 'recipe'])
def test_a_bfloat16_model_scores_and_generates(config: dict[str, Any], device: torch.device) -> None:
    model, ids = build(config).eval().to(device), words(2, LENGTH).to(device)
    exact = model.score(ids)
    model.bfloat16()
    assert model.score(ids) == pytest.approx(exact, rel=0.02)
    chunked, whole = read_in_chunks(model, ids).float(), model(ids).float()
    assert chunked.isfinite().all()
    assert (chunked - whole).norm() < 0.03 * whole.norm()
    assert model.generate(ids[:, :9], 8, temperature=0).shape == (2, 8)


def losses_with_a_scaler(model: HierarchicalTransformer, optimizer: Any, device: torch.device, steps: int) -> list[Any]:
    """The loss and the scale of each step, and whether the step changed the weights."""
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**30)
    ids, found = words(2, 129).to(device), []
    for _ in range(steps):
        before, scale = [p.detach().clone() for p in model.parameters()], scaler.get_scale()
        with torch.autocast(device.type, dtype=torch.float16):
            loss, _ = model(ids, return_loss=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        found.append((loss.item(), scale, moved))
    return found


@pytest.mark.parametrize(('config', 'name'), [(RECIPE, 'muon'), (LEVELS, 'adamw')], ids=['recipe', 'levels'])
def test_float16_trains_with_a_scaler(config: dict[str, Any], name: str, device: torch.device) -> None:
    model = build(config).to(device)
    optimizer = build_optimizer(model, name, lr=3e-3, weight_decay=0.1, device=device, sparse=False)
    steps = losses_with_a_scaler(model, optimizer, device, 24)
    assert all(p.isfinite().all() for p in model.parameters())
    # a scale that is too large is halved and its step skipped; other steps change the weights
    for (_, scale, moved), (_, after, _) in pairwise(steps):
        assert after == (scale if moved else scale / 2)
    moves = [moved for *_, moved in steps]
    assert not moves[0]
    assert sum(moves) >= 8
    assert steps[-1][0] < steps[0][0] - 0.1
