"""Backends of windowed attention against a softmax under a mask."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_is_compiled_once_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = CompileCounterWithBackend('eager')
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=graphs))
    window_attention.compiled_flex.cache_clear()
    for n, past, window in product((257, 400, 641, 1030), (0, 30, 128), (30, 129)):
        q, k, v = (t.float() for t in qkv(past + n, dim=16))
        q, mask = q[:, :, past:], window_attention.cached_window_mask(n, past, window, q.device)
        attend = window_attention.compiled_flex(q.dtype, *q.shape[1::2], past > 0, False)
        torch.testing.assert_close(attend(q, k, v, mask), attend_window(q, k, v, window, 'sdpa'), rtol=1e-4, atol=1e-5)
    window_attention.compiled_flex.cache_clear()
    # one graph without past tokens, two with: these may add a block of keys
    assert graphs.frame_count <= 3


def test_flex_attention_refuses_to_train_where_it_cannot() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(5))
    with pytest.raises(ValueError, match="attn_backend = 'flex' trains only on CUDA, got a model on cpu"):
        attend_window(q, k, v, 2, 'flex')


@torch.no_grad()
def test_fake_tensors_do_not_enter_the_cache() -> None:
    q, k, v = (t.float() for t in qkv(40, dim=16))
    window_attention.cached_window_mask.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        attend_window(q, k, v, 8, 'flex')
    out = attend_window(q, k, v, 8, 'flex')
    torch.testing.assert_close(out, attend_window(q, k, v, 8, 'sdpa'), rtol=1e-4, atol=1e-5)
