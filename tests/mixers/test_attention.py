"""Attention against naive formulas, and against the libraries whose conventions it keeps."""

from __future__ import annotations

import pytest
import torch
from local_attention import LocalMHA
from rotary_embedding_torch import RotaryEmbedding

from simple_hierarchical_transformer.mixers import Attention, attention, rotary
from simple_hierarchical_transformer.mixers.rotary import Rotary


def test_full_attention_stays_finite_where_xpos_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decay 512 times as steep, 1,000 tokens stand for 512,000. Each block has its own origin."""
    monkeypatch.setattr(rotary, 'XPOS_SCALE_BASE', 1.0)
    monkeypatch.setattr(attention, 'FAR_BLOCK', 48)
    attn = Attention(dim=12, dim_head=8, heads=2)
    x = torch.randn(1, 1000, 12, requires_grad=True)
    out, _ = attn(x)
    assert out.isfinite().all()

    exact = Attention(dim=12, dim_head=8, heads=2).double()
    exact.load_state_dict(attn.state_dict())
    at_once = x.detach().double().requires_grad_()
    monkeypatch.setattr(Rotary, 'reach', lambda *_: 10**9)
    # float64 spans at most 280 positions of this decay
    expected, _ = exact(at_once[:, :280])
    torch.testing.assert_close(out[:, :280], expected.float(), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out[:, :280].square().sum(), x), torch.autograd.grad(expected.square().sum(), at_once)
    torch.testing.assert_close(grads[0][0], grads[1][0].float(), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(Rotary, 'reach', lambda *_: 10**9)
    assert not attn(x)[0].isfinite().all()


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


def test_normed_queries_and_keys_equal_the_formula() -> None:
    mixer = Attention(dim=6, dim_head=4, heads=2, window=3, qk_norm=True).double()
    assert mixer.qk_norm is not None
    torch.nn.init.normal_(mixer.qk_norm.gamma)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    q, k, v = mixer.to_qkv(mixer.norm(x)).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = (t / t.square().mean(dim=-1, keepdim=True).sqrt() * mixer.qk_norm.gamma for t in (q, k))
    q, k = mixer.rotary_emb(torch.stack((q, k)))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    scores = (q @ k.mT / 2).masked_fill((distance < 0) | (distance > 3), -torch.inf)
    expected = mixer.to_out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-12)
