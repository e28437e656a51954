"""Attention and rotary embeddings against naive forms, and against the libraries whose conventions they keep."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_attention import LocalMHA
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from simple_hierarchical_transformer.mixers import Attention, attention, rotary
from simple_hierarchical_transformer.mixers.rotary import Rotary
from simple_hierarchical_transformer.ops import window_attention
from simple_hierarchical_transformer.ops.window_attention import Backend, attend_window


def qkv(n: int, *, heads: int = 2, dim: int = 8) -> tuple[Tensor, ...]:
    return torch.randn(3, 2, heads, n, dim, dtype=torch.float64).unbind(0)


@given(
    n=st.integers(1, 300),
    window=st.integers(1, 150),
    past=st.integers(0, 150),
    backend=st.sampled_from(['auto', 'sdpa', 'local-attention']),
)
def test_window_equals_softmax_under_a_mask(n: int, window: int, past: int, backend: Backend) -> None:
    past = min(past, window)
    q, k, v = (t.requires_grad_() for t in qkv(past + n))

    scores = q @ k.mT / 8**0.5
    distance = torch.arange(past + n)[:, None] - torch.arange(past + n)
    naive = (scores.masked_fill((distance < 0) | (distance > window), -torch.inf).softmax(-1) @ v)[:, :, past:]
    out = attend_window(q[:, :, past:], k, v, window, backend)
    torch.testing.assert_close(out, naive)

    weights = torch.randn_like(out)
    for ours, expected in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((naive * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize(('n', 'window', 'past'), [(1, 3, 2), (150, 1, 0), (130, 40, 7), (300, 128, 128)])
def test_flex_attention_equals_blocks(n: int, window: int, past: int) -> None:
    q, k, v = (t.float() for t in qkv(past + n, dim=16))
    out = attend_window(q[:, :, past:], k, v, window, 'flex')
    torch.testing.assert_close(out, attend_window(q[:, :, past:], k, v, window, 'sdpa'), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_flex_attention_is_compiled_for_all_shapes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = CompileCounterWithBackend('eager')
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=graphs))
    window_attention.compiled_flex.cache_clear()
    for n, past, window in product((257, 400, 641, 1030), (0, 30, 128), (30, 129)):
        q, k, v = (t.float() for t in qkv(past + n, dim=16))
        q, mask = q[:, :, past:], window_attention.cached_window_mask(n, past, window, q.device)
        attend = window_attention.compiled_flex(q.dtype, *q.shape[1::2], past > 0, False)
        torch.testing.assert_close(attend(q, k, v, mask), attend_window(q, k, v, window, 'sdpa'), rtol=1e-4, atol=1e-5)
    window_attention.compiled_flex.cache_clear()
    # one without a past, two with one: whether it adds a block
    assert graphs.frame_count <= 3


def test_flex_attention_refuses_to_train_where_it_cannot() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(5))
    with pytest.raises(ValueError, match="attn_backend = 'flex' trains on CUDA alone, got a model on cpu"):
        attend_window(q, k, v, 2, 'flex')


def test_full_attention_stays_finite_where_xpos_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decay 512 times as steep, 1,000 tokens are what 512,000 are: by blocks, each its own origin."""
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
    # float64 reaches 280 positions of this decay, no more
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


@torch.no_grad()
def test_what_is_made_under_a_mode_that_pretends_is_not_kept() -> None:
    q, k, v = (t.float() for t in qkv(40, dim=16))
    window_attention.cached_window_mask.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        attend_window(q, k, v, 8, 'flex')
    out = attend_window(q, k, v, 8, 'flex')
    torch.testing.assert_close(out, attend_window(q, k, v, 8, 'sdpa'), rtol=1e-4, atol=1e-5)


def test_learned_frequencies_have_a_gradient_when_compiled() -> None:
    attn = Attention(dim=12, dim_head=8, heads=2, window=4)
    attn.rotary_emb.freqs = torch.nn.Parameter(attn.rotary_emb._buffers.pop('freqs'))  # type: ignore[assignment]
    x, found = torch.randn(2, 9, 12), []
    for call in (attn, torch.compile(attn, backend='aot_eager')):
        found.append(torch.autograd.grad(call(x)[0].square().sum(), attn.rotary_emb.freqs)[0])
    assert found[0].norm() > 0
    torch.testing.assert_close(*found)
