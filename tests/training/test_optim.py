"""Optimizers, learning rates and averaged weights, each against a plain form."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.configs import build
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import optim, run_tensors
from simple_hierarchical_transformer.training.settings import share

SMALL: dict[str, Any] = dict(num_tokens=11, dim=(8, 12), depth=2, seq_len=32, dim_head=4, heads=2, hierarchies=(1, 4))


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_orthogonalised_matrices_turn_and_do_not_stretch(rows: int, columns: int, scale: float) -> None:
    matrix = scale * torch.randn(2, rows, columns)
    result = optim.orthogonalise(matrix, 5)
    # directions with tiny singular values stay below 1
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    strong = s > 0.05 * s.amax(dim=-1, keepdim=True)
    stretched = torch.einsum('bri,brc,bic->bi', u, result, v)
    assert (stretched[strong] > 0.5).all()
    assert (torch.linalg.matrix_norm(result, 2) < 1.3).all()
    assert torch.allclose(u @ (u.mT @ result @ v.mT) @ v, result, atol=1e-4)


def test_muon_moves_matrices_by_orthogonal_momentum() -> None:
    """Against two steps of one matrix, computed by hand, with Nesterov momentum and weight decay."""
    p = nn.Parameter(torch.randn(6, 4, 2))
    start, gradients = p.detach().clone(), torch.randn(2, 6, 4, 2)
    optimizer = optim.MixedOptimizer([dict(params=[p], weight_decay=0.1, rule='muon')], lr=0.01)
    momentum, expected = torch.zeros(6, 8), start.flatten(1)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        flat = gradient.flatten(1)
        momentum = 0.95 * momentum + 0.05 * flat
        move = optim.orthogonalise((0.05 * flat + 0.95 * momentum)[None])[0]
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(8) * move
    torch.testing.assert_close(p.detach().flatten(1), expected)


def test_matrices_of_one_shape_do_not_mix() -> None:
    def moved(count: int) -> torch.Tensor:
        ps = [nn.Parameter(torch.zeros(4, 3)) for _ in range(count)]
        for i, p in enumerate(ps):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        optim.MixedOptimizer([dict(params=ps, rule='muon')], lr=1.0).step()
        return ps[0].detach()

    torch.testing.assert_close(moved(1), moved(5))


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
@pytest.mark.parametrize(
    'changes',
    [{}, dict(merge='attention', compressor='attention', prophet_loss_weight=0.1, quantized_loss_weight=0.1),
     dict(autoencoder=True)],
    ids=['plain', 'attention', 'autoencoder'],
)  # fmt: skip
def test_every_parameter_learns_in_one_group_and_biases_do_not_decay(name: str, changes: dict[str, Any]) -> None:
    model = HierarchicalTransformer(**{**SMALL, **changes})
    optimizer = optim.build_optimizer(model, name, lr=1e-3, weight_decay=0.1)
    held = [p for group in optimizer.param_groups for p in group['params']]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    names = {p: key for key, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group['params']:
            assert (p.ndim >= 2 and not names[p].endswith('bias')) == (group['weight_decay'] > 0)
    if name == 'muon':
        by = {p for group in optimizer.param_groups if group['rule'] == 'muon' for p in group['params']}
        assert model.layers[0][0].ff.net[1].weight in by
        # tables have a row for each id, on one side
        ids = {11, 4 * 11, 1024}
        assert not [names[p] for p in by if ids & {*p.shape} or names[p].endswith('bias')]
    else:
        assert optimizer.defaults['fused']


def test_the_other_parameters_of_muon_move_as_in_adamw() -> None:
    torch.manual_seed(0)
    a, b = (nn.Linear(5, 3) for _ in range(2))
    b.load_state_dict(a.state_dict())
    ours = optim.MixedOptimizer([dict(params=list(a.parameters()), weight_decay=0.1)], lr=1e-2, betas=(0.9, 0.95))
    theirs = torch.optim.AdamW(b.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((a, ours), (b, theirs)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, its in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, its)
    with pytest.raises(ValueError, match=r'muon is for matrices, got parameters of shape \(3,\)'):
        optim.MixedOptimizer([dict(params=list(a.parameters()), rule='muon')], lr=1e-2)


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_each_optimizer_learns(name: str) -> None:
    model = HierarchicalTransformer(**SMALL)
    optimizer = optim.build_optimizer(model, name, lr=2e-2, weight_decay=0.1)
    ids = torch.randint(1, 11, (4, 33))
    losses = []
    for _ in range(30):
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts.ce.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize('clips', [False, True])
@pytest.mark.parametrize('sparse', [False, True])
def test_a_scaler_leaves_out_a_step_that_overflows(sparse: bool, clips: bool) -> None:
    """An overflow in one group skips all groups. Other steps equal those without a scaler."""
    models = [build(dict(SMALL, ngrams=(2,), ngram_rows=64)).float() for _ in range(2)]
    optimizers = [optim.build_optimizer(each, 'muon', lr=1e-2, weight_decay=0.1, sparse=sparse) for each in models]
    scaled, ids = models[0], torch.randint(0, 11, (2, 20))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    start = {name: p.detach().clone() for name, p in scaled.named_parameters()}

    def take_scaled_step(overflows: bool) -> None:
        scaler.scale(scaled(ids, return_loss=True)[0]).backward()
        if overflows:
            scaled.to_logits.weight.grad[0, 0] = math.inf
        if clips:
            scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()

    take_scaled_step(overflows=True)
    assert scaler.get_scale() == 512
    assert all(torch.equal(p, start[name]) for name, p in scaled.named_parameters())
    take_scaled_step(overflows=False)
    models[1](ids, return_loss=True)[0].backward()
    optimizers[1].step()
    for (name, ours), expected in zip(scaled.named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f'{name}: {said}')


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
@pytest.mark.parametrize('warmup', [0.0, 0.1])
def test_learning_rates_rise_then_never_rise_again(schedule: str, warmup: float) -> None:
    rates = [optim.learning_rate(i / 1000, highest=2.0, schedule=schedule, warmup=warmup) for i in range(1001)]
    top = int(1000 * warmup)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[top] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx({'cosine': 0.2, 'linear': 0.0, 'constant': 2.0, 'wsd': 0.0}[schedule], abs=1e-9)
    assert all(rate > 0 for rate in rates[:-1])
    if schedule == 'wsd':
        assert rates[800] == pytest.approx(2.0)
        assert rates[900] == pytest.approx(1.0)


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
@given(warmup=st.floats(0, 1, exclude_max=True), at=st.lists(st.floats(0, 1), max_size=20))
@example(warmup=0.9, at=[])
@example(warmup=0.8, at=[])
def test_learning_rates_are_continuous_for_every_warmup(schedule: str, warmup: float, at: list[float]) -> None:
    def rate(progress: float) -> float:
        return optim.learning_rate(progress, highest=2.0, schedule=schedule, warmup=warmup)

    share(str(warmup))  # the command line takes all of these
    left = 1 - warmup
    # the steepest slope of any phase of a schedule
    steepest = 2.0 * max(1 / warmup if warmup else 0, math.pi / left, 1 / min(left, 0.2))
    places = sorted({0.0, *at, *(min(max(p + d, 0), 1) for p in (warmup, 0.8, 1) for d in (-1e-9, 0, 1e-9))})
    for before, after in pairwise(places):
        assert abs(rate(after) - rate(before)) <= steepest * (after - before) * 1.01 + 1e-6
    assert all(0 <= rate(progress) <= 2.0 for progress in places)
    # time may pass the end, where the rate must not be negative
    assert 0 <= rate(1.5) == rate(1.0)


def test_averages_follow_the_weights_and_stand_in_for_them() -> None:
    model = nn.Linear(3, 1, bias=False)
    p = model.weight
    average = optim.WeightAverage(model, decay=0.5)
    expected = p.detach().clone()
    for step in range(20):
        with torch.no_grad():
            p.add_(torch.randn(1, 3))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach()
    weight = p.detach().clone()
    with average.applied():
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(p.detach(), weight)
    torch.testing.assert_close(average.averages[0], expected)


@pytest.mark.parametrize('damage', ['gone', 'misshapen', 'of another rule', 'of no parameter'])
def test_tensors_of_another_optimizer_are_refused(damage: str) -> None:
    model = HierarchicalTransformer(**SMALL, ngrams=(2,), ngram_rows=16)
    optimizer = optim.build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1)
    model(torch.randint(11, (2, 17)), return_loss=True)[0].backward()
    optimizer.step()
    whole = run_tensors.gather_optimizer(model, optimizer)
    restored = optim.build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1)
    run_tensors.restore_optimizer(model, restored, whole)
    assert whole.keys() == run_tensors.gather_optimizer(model, restored).keys()
    # a run without a step has no optimizer state
    run_tensors.restore_optimizer(model, restored, {})

    for name, tensor in whole.items():
        held = dict(whole)
        if damage == 'gone':
            del held[name]
        elif damage == 'misshapen':
            held[name] = torch.zeros(*tensor.shape, 2)
        elif damage == 'of another rule':
            held[f'{name}s'] = held.pop(name)
        else:
            held[f'optimizer.nothing.{name}'] = tensor
        with pytest.raises(ValueError, match='optimizer'):
            run_tensors.restore_optimizer(model, restored, held)
