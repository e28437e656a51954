"""Rotary embeddings: distances, precision and learned frequencies."""

from __future__ import annotations

import pytest
import torch

from simple_hierarchical_transformer.mixers import Attention
from simple_hierarchical_transformer.mixers.rotary import Rotary


@pytest.mark.parametrize('pairs', ['interleaved', 'halves'])
@pytest.mark.parametrize('xpos', [False, True])
def test_rotated_scores_depend_on_distance_alone(pairs: str, xpos: bool) -> None:
    q, k = torch.randn(2, 2, 2, 1, 8, dtype=torch.float64)
    rotary = Rotary(8, pairs=pairs, xpos=xpos)
    rotated_q, rotated_k = rotary(torch.stack((q, k)).expand(-1, -1, -1, 40, -1))
    scores = rotated_q @ rotated_k.mT
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    assert not torch.allclose(scores[..., 1:, 0], scores[..., :-1, 0])


def test_half_precision_model_keeps_its_frequencies_exact() -> None:
    rotary = Rotary(64, pairs='halves')
    exact = rotary.freqs.clone()
    rotary.bfloat16()
    assert torch.equal(rotary.freqs, exact)
    q = torch.randn(1, 1, 2000, 64, dtype=torch.bfloat16)
    rotated, _ = rotary(torch.stack((q, q)))
    assert rotated.dtype == torch.bfloat16
    expected, _ = Rotary(64, pairs='halves')(torch.stack((q, q)).float())
    torch.testing.assert_close(rotated.float(), expected, rtol=1e-2, atol=2e-2)
    assert rotary.double().freqs.dtype == torch.float64


@pytest.mark.slow
def test_learned_frequencies_have_a_gradient_when_compiled() -> None:
    attn = Attention(dim=12, dim_head=8, heads=2, window=4)
    attn.rotary_emb.freqs = torch.nn.Parameter(attn.rotary_emb._buffers.pop('freqs'))  # type: ignore[assignment]
    x, found = torch.randn(2, 9, 12), []
    for call in (attn, torch.compile(attn, backend='aot_eager')):
        found.append(torch.autograd.grad(call(x)[0].square().sum(), attn.rotary_emb.freqs)[0])
    assert found[0].norm() > 0
    torch.testing.assert_close(*found)
