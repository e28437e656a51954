"""Compressors against their definitions, computed window by window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.configs import UNEVEN, level
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.compressors import Compressor

POWERS = st.sampled_from([1, 2, 4, 8])


@given(c=POWERS.filter(lambda c: c > 1), s=POWERS, n=st.integers(1, 30))
def test_compressor_is_a_causal_strided_convolution(c: int, s: int, n: int) -> None:
    s = min(s, c)
    compressor = Compressor(level(c, s), dim_in=5).double()
    x = torch.randn(2, n, 5, dtype=torch.float64)

    wide, narrow = compressor.compress_fn[1].conv, compressor.compress_fn[3]
    padded = F.pad(x.transpose(1, 2), (c - 1, 0))
    hidden = F.silu(F.conv1d(padded, wide.weight, wide.bias, stride=s))
    expected = F.conv1d(hidden, narrow.weight, narrow.bias).transpose(1, 2)

    torch.testing.assert_close(compressor(x)[0], expected)
    assert expected.shape[1] == level(c, s).length(n)


def test_level_without_compression_keeps_or_projects_embeddings() -> None:
    x = torch.randn(2, 9, 6)
    same = Compressor(level(dim=6), dim_in=6, num_tokens=7)
    assert torch.equal(same(x)[0], x)
    assert not list(same.parameters())
    projected = Compressor(level(dim=4), dim_in=6, num_tokens=7)
    assert torch.equal(projected(x)[0], x @ projected.compress_fn.weight.T)


@given(
    c=st.sampled_from([2, 4, 8]), s=st.sampled_from([1, 2, 4, 8]), dilation=st.sampled_from([1, 2]),
    n=st.integers(1, 30), dim=st.sampled_from([5, 6]),
)  # fmt: skip
def test_compressors_equal_their_definitions(c: int, s: int, dilation: int, n: int, dim: int) -> None:
    s = min(s, c)
    x = torch.randn(2, n, dim, dtype=torch.float64)

    def window(j: int) -> list[Tensor | None]:
        at = [j * s - (c - 1 - k) * dilation for k in range(c)]
        return [x[:, i] if i >= 0 else None for i in at]

    def build_one(kind: str, **settings: Any) -> Compressor:
        made = Compressor(level(c, s, compressor=kind), dim_in=dim, dilation=dilation, **settings).double()
        for parameter in made.parameters():
            nn.init.normal_(parameter)
        return made

    zero = torch.zeros(2, dim, dtype=torch.float64)
    linear, mean, attention = (build_one(kind) for kind in ('linear', 'mean', 'attention'))
    own = build_one('module', module=nn.Sequential(nn.Flatten(1), nn.Linear(c * dim, 6)))
    made = {pool: pool(x)[0] for pool in (linear, mean, attention, own)}
    for j in range(-(-n // s)):
        tokens = [zero if token is None else token for token in window(j)]

        weight = linear.compress_fn.proj.weight.unflatten(1, (dim, c))
        torch.testing.assert_close(made[linear][:, j], sum(t @ weight[:, :, k].T for k, t in enumerate(tokens)))

        average = sum(tokens) / c
        torch.testing.assert_close(made[mean][:, j], average @ mean.compress_fn.proj.weight.T if dim != 6 else average)

        pool, heads = attention.compress_fn, []
        for h in range(2):
            scores, values = [], []
            for k, token in enumerate(window(j)):
                if token is not None:
                    scores.append(token @ pool.to_scores.weight[h] + pool.place_bias[h, k])
                    values.append(token @ pool.to_values.weight[4 * h : 4 * h + 4].T)
            share = torch.stack(scores).softmax(0)
            heads.append((share[..., None] * torch.stack(values)).sum(0))
        torch.testing.assert_close(made[attention][:, j], torch.cat(heads, -1) @ pool.to_out.weight.T)

        torch.testing.assert_close(made[own][:, j], own.compress_fn.module[1](torch.cat(tokens, dim=-1)))


def test_a_compressor_of_the_wrong_shape_is_named() -> None:
    model = HierarchicalTransformer(**{**UNEVEN, 'compressor': ('conv', nn.Identity(), 'conv')})
    with pytest.raises(
        ValueError, match=r'compressor must return shape \(6, 12\) for an input \(6, 8, 12\), got \(6, 8, 12\)'
    ):
        model(torch.zeros(2, 9, dtype=torch.long))
