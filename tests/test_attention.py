"""Attention and rotary embeddings against naive forms, and against the libraries whose conventions they keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_attention import LocalMHA
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor

from simple_hierarchical_transformer.mixers import Attention
from simple_hierarchical_transformer.mixers.attention import attend_window
from simple_hierarchical_transformer.mixers.rotary import Rotary


def qkv(n: int, *, heads: int = 2, dim: int = 8) -> tuple[Tensor, ...]:
    return torch.randn(3, 2, heads, n, dim, dtype=torch.float64).unbind(0)


@given(n=st.integers(1, 300), window=st.integers(1, 150))
def test_window_equals_softmax_under_a_mask(n: int, window: int) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(n))

    scores = q @ k.mT / 8**0.5
    distance = torch.arange(n)[:, None] - torch.arange(n)
    naive = scores.masked_fill((distance < 0) | (distance > window), -torch.inf).softmax(-1) @ v
    out = attend_window(q, k, v, window)
    torch.testing.assert_close(out, naive)

    weights = torch.randn_like(out)
    for ours, expected in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((naive * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('n', [1, 9, 64, 130])
@pytest.mark.parametrize('window', [1, 8, 100])
def test_windowed_attention_equals_local_attention(n: int, window: int) -> None:
    ours = Attention(dim=12, dim_head=8, heads=2, window=window).double()
    theirs = LocalMHA(
        dim=12, window_size=window, dim_head=8, heads=2, causal=True, prenorm=True, exact_windowsize=True
    ).double()
    theirs.load_state_dict(
        {key: value for key, value in ours.state_dict().items() if 'rotary' not in key}, strict=False
    )
    x = torch.randn(2, n, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-6, atol=1e-6)


def test_full_attention_equals_the_formula() -> None:
    attn = Attention(dim=12, dim_head=8, heads=2).double()
    torch.nn.init.normal_(attn.norm.gamma)
    x = torch.randn(2, 70, 12, dtype=torch.float64)

    normed = x / x.norm(dim=-1, keepdim=True) * 12**0.5 * attn.norm.gamma
    q, k, v = (t.view(2, 70, 2, 8).transpose(1, 2) for t in attn.to_qkv(normed).chunk(3, dim=-1))
    q, k = RotaryEmbedding(8, use_xpos=True).double().rotate_queries_and_keys(q, k)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
    expected = attn.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x)[0], expected)


@pytest.mark.parametrize('pairs', ['interleaved', 'halves'])
@pytest.mark.parametrize('xpos', [False, True])
def test_rotated_scores_depend_on_distance_alone(pairs: str, xpos: bool) -> None:
    q, k, _ = qkv(1)
    rotary = Rotary(8, pairs=pairs, xpos=xpos)
    turned_q, turned_k = rotary(torch.stack((q, k)).expand(-1, -1, -1, 40, -1))
    scores = turned_q @ turned_k.mT
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    assert not torch.allclose(scores[..., 1:, 0], scores[..., :-1, 0])


def test_half_precision_model_keeps_its_frequencies_exact() -> None:
    rotary = Rotary(64, pairs='halves')
    exact = rotary.freqs.clone()
    rotary.bfloat16()
    assert torch.equal(rotary.freqs, exact)
    q = torch.randn(1, 1, 2000, 64, dtype=torch.bfloat16)
    turned, _ = rotary(torch.stack((q, q)))
    assert turned.dtype == torch.bfloat16
    expected, _ = Rotary(64, pairs='halves')(torch.stack((q, q)).float())
    torch.testing.assert_close(turned.float(), expected, rtol=1e-2, atol=2e-2)
    assert rotary.double().freqs.dtype == torch.float64
