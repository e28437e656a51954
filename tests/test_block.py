"""Blocks: the token shift, phases, gated residuals, activations, and feed-forwards in chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.configs import UNEVEN, build, level
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import FeedForward, GRUGate, HierarchicalBlock, phase_groups, shift_tokens

POWERS = st.sampled_from([1, 2, 4, 8])


@pytest.mark.parametrize('dim', [6, 7])
def test_shift_delays_the_second_half_of_the_channels(dim: int) -> None:
    x = torch.randn(2, 5, dim)
    (shifted, last), half = shift_tokens(x), (dim + 1) // 2
    assert torch.equal(shifted[..., :half], x[..., :half])
    assert torch.equal(shifted[:, 1:, half:], x[:, :-1, half:])
    assert not shifted[:, 0, half:].any()
    assert torch.equal(last, x[:, -1:, half:])


@given(c=POWERS, s=POWERS, n=st.integers(1, 40), window=st.sampled_from([None, 0, 2]))
def test_block_treats_each_phase_as_a_sequence_of_its_own(c: int, s: int, n: int, window: int | None) -> None:
    phased = HierarchicalBlock(level(c, min(s, c), window=window)).double()
    alone = HierarchicalBlock(level(window=window)).double()
    alone.load_state_dict(phased.state_dict())

    x = torch.randn(2, n, 6, dtype=torch.float64)
    (out, _), phases = phased(x), c // min(s, c)
    for phase in range(min(phases, n)):
        torch.testing.assert_close(out[:, phase::phases], alone(x[:, phase::phases])[0])


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 2, 4, 8]))
def test_phase_groups_cover_each_token_once(start: int, length: int, phases: int) -> None:
    seen = []
    groups = list(phase_groups(start, length, phases))
    assert len(groups) <= 3
    for group in groups:
        for i in range(group.width):
            for r in range(group.rounds):
                token = group.token + i + r * phases
                assert (start + token) % phases == group.phase + i
                assert (start + token) // phases == group.start + r
                seen.append(token)
    assert sorted(seen) == list(range(length))


def test_gated_residual_equals_its_definition() -> None:
    gate = GRUGate(6).double()
    x, y = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    nn.init.normal_(gate.bias)
    w, u = gate.of_part.weight.chunk(3), gate.of_stream.weight.chunk(2)
    part = y.relu()
    r, z = torch.sigmoid(part @ w[0].T + x @ u[0].T), torch.sigmoid(part @ w[1].T + x @ u[1].T - gate.bias)
    h = torch.tanh(part @ w[2].T + (r * x) @ gate.of_reset.weight.T)
    torch.testing.assert_close(gate(x, y), (1 - z) * x + z * h)

    # at first the gate passes the residual stream on
    model, plain = (HierarchicalTransformer(**{**UNEVEN, 'residual': residual}) for residual in ('gru', 'add'))
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters())
    fresh = GRUGate(6)
    assert fresh(x.float(), torch.zeros_like(x).float()).sub(x).norm() < 0.3 * x.norm()


def test_ff_chunks_change_no_gradient() -> None:
    whole, pieces = build(UNEVEN), build(dict(UNEVEN, ff_chunks=5))
    ids = torch.randint(0, 11, (2, 23))
    gradients = []
    for model in (whole, pieces):
        model(ids, return_loss=True)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('activation', ['relu2', 'swiglu'])
def test_activations_equal_their_definition(activation: str) -> None:
    ff = FeedForward(4, 2, activation=activation).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    hidden = ff.net[1](ff.net[0](x))
    assert hidden.shape[-1] == (16 if activation == 'swiglu' else 8)
    value, gate = hidden[..., :8], hidden[..., 8:]
    hidden = value * gate / (1 + (-gate).exp()) if activation == 'swiglu' else hidden.clamp(min=0) ** 2
    torch.testing.assert_close(ff(x), ff.net[3](hidden), rtol=0, atol=1e-12)
