"""Mixers in half precision, under autocast and compiled."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from support.configs import SEQ_LEN, build
from support.mixers import DIM, cases, in_model, make

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers.rotary import Rotary
from simple_hierarchical_transformer.mixers.ssm import DiagonalSSM


@cases
def test_runs_in_half_precision_and_compiled(case: tuple[str, bool, dict[str, Any]]) -> None:
    model, ids = build(in_model(case, depth=1)), torch.randint(0, 11, (2, 25))
    expected, _ = model(ids, return_loss=True)
    wanted = list(model.parameters())
    gradients = torch.autograd.grad(expected, wanted)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    loss, _ = compiled(ids, return_loss=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), gradients)

    model = model.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = model(ids, return_loss=True)
        loss.backward()
        with torch.no_grad():
            _, state = model(ids[:, :13], return_state=True)
            out, _ = model(ids[:, 13:], state=state, return_state=True)
    assert state.dtype == torch.float32
    assert out.isfinite().all()
    torch.testing.assert_close(loss.double(), expected, rtol=0.05, atol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@cases
def test_half_precision_is_close_to_float32(case: tuple[str, bool, dict[str, Any]]) -> None:
    name = case[0]
    exact, half = make(case).float(), make(case).bfloat16()
    # both have the same weights
    with torch.no_grad():
        for p, q in zip(exact.parameters(), half.parameters(), strict=True):
            p.copy_(q)
    x = torch.randn(1, 30, DIM).bfloat16()
    state = half.initial_state(1, x)
    with torch.no_grad():
        expected, _ = exact(x.float(), None, 0)
        out, _ = half(x, None, 0)
        steps = [half(x[:, i, None], state, i)[0] for i in range(30)]
    if name == 'lsh':
        # rounding moves tokens to other buckets
        assert out.isfinite().all()
        return
    assert out.dtype == torch.bfloat16
    for got in (out, torch.cat(steps, dim=1)):
        assert (got.float() - expected).norm() < 0.05 * expected.norm()


def in_half(config: dict[str, Any]) -> HierarchicalTransformer:
    """A model built with bfloat16 as the default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return HierarchicalTransformer(**config)
    finally:
        torch.set_default_dtype(torch.float32)


def on_meta(config: dict[str, Any]) -> HierarchicalTransformer:
    with torch.device('meta'):
        return HierarchicalTransformer(**config)


@cases
def test_exact_tensors_stay_exact_in_half_precision(
    case: tuple[str, bool, dict[str, Any]],
) -> None:
    config, ids = in_model(case, depth=1), torch.randint(0, 11, (2, SEQ_LEN))
    model = build(config).float()
    weights = model.state_dict()
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights.items()}
    expected = deepcopy(model).bfloat16()

    built, assigned, copied = in_half(config), deepcopy(model), deepcopy(model)
    built.load_state_dict(weights)
    assigned.load_state_dict(rounded, assign=True)
    # rounded values do not replace the exact values that they come from
    copied.load_state_dict(rounded)
    for got in (built, assigned, copied.bfloat16()):
        kinds = {name: t.dtype for name, t in got.state_dict().items()}
        assert kinds == {name: t.dtype for name, t in expected.state_dict().items()}
        assert torch.equal(got(ids), expected(ids))

    # frequencies are known by their definition; other tensors have the loaded values
    for load, empty in ((rounded, on_meta(config)), (rounded, in_half(config))):
        empty.load_state_dict(load, assign=True)
        for name, t in empty.state_dict().items():
            kept = expected.state_dict()[name]
            assert t.dtype == kept.dtype
            assert torch.equal(t, kept if name.endswith('freqs') else rounded[name].to(t.dtype))


def test_custom_frequencies_are_loaded() -> None:
    rotary, other = (Rotary(8, pairs='halves') for _ in range(2))
    rotary.freqs.mul_(0.25)
    other.load_state_dict({'freqs': rotary.freqs.bfloat16()}, assign=True)
    assert torch.equal(other.freqs, rotary.freqs.bfloat16().float())
    other.load_state_dict(rotary.state_dict())
    other.load_state_dict({'freqs': rotary.freqs.bfloat16()})
    assert torch.equal(other.freqs, rotary.freqs)


def test_a_half_precision_ssm_keeps_its_time_scales() -> None:
    ssm, n = DiagonalSSM(16, state_dim=32, init='lin', fft='torch'), 3000
    u = torch.randn(1, n, 16).bfloat16()
    expected, _ = ssm(u.float())
    ssm.bfloat16()
    assert {p.dtype for p in (ssm.log_dt, ssm.a_imag)} == {torch.float32}
    assert ssm.c.dtype == torch.bfloat16
    state = ssm.initial_state(1, u)
    with torch.no_grad():
        out, _ = ssm(u)
        _, state = ssm(u[:, :1500], state)
        rest, _ = ssm(u[:, 1500:], state)
    for got in (out[:, 1500:], rest):
        assert (got.float() - expected[:, 1500:]).norm() < 0.03 * expected[:, 1500:].norm()
