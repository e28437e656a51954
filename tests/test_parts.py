"""Compressors, token shift, phases and merging against what they say they do, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from simple_hierarchical_transformer.block import HierarchicalBlock, shift_tokens
from simple_hierarchical_transformer.compressors import Compressor
from simple_hierarchical_transformer.levels import Level
from simple_hierarchical_transformer.merges.concat import ConcatMerge
from simple_hierarchical_transformer.objectives.next_latent import ChunkSummarizer

POWERS = st.sampled_from([1, 2, 4, 8])


def level(compression: int = 1, stride: int = 1, dim: int = 6, window: int | None = None) -> Level:
    return Level(compression, stride, dim, 4, 2, 2, window, 0.0)


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


@given(c=POWERS, s=POWERS, n=st.integers(1, 30))
def test_chunk_summary_is_the_mean_of_what_the_compressor_sees(c: int, s: int, n: int) -> None:
    s = min(s, c)
    embeds = torch.randn(2, n, 6, dtype=torch.float64)
    summaries = ChunkSummarizer(dim_embed=6, dim=6, compression=c, stride=s)(embeds)
    expected = [embeds[:, max(end - c, 0) : end].mean(1) for end in range(1, n + 1, s)]
    torch.testing.assert_close(summaries, torch.stack(expected, 1))


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


def test_merge_adds_what_is_pooled_at_each_position() -> None:
    levels = (level(1, 1, 6), level(4, 4, 3), level(2, 1, 5))
    merge = ConcatMerge(levels, recipients=(0, 1, 2))
    tokens = [torch.randn(2, 10, 6), torch.randn(2, 3, 3), torch.randn(2, 10, 5)]
    merged, _ = merge(tokens)

    for i in range(10):
        here = torch.cat([tokens[0][:, i], tokens[1][:, i // 4], tokens[2][:, i]], dim=-1)
        fine, coarse, middle = merge.net(here).split((6, 3, 5), dim=-1)
        torch.testing.assert_close(merged[0][:, i], tokens[0][:, i] + fine)
        torch.testing.assert_close(merged[2][:, i], tokens[2][:, i] + middle)
        if i % 4 == 0:
            torch.testing.assert_close(merged[1][:, i // 4], tokens[1][:, i // 4] + coarse)


def test_merge_leaves_levels_that_receive_nothing() -> None:
    merge = ConcatMerge((level(), level(2)), recipients=(1,))
    tokens = [torch.randn(1, 4, 6), torch.randn(1, 4, 6)]
    merged, _ = merge(tokens)
    assert merged[0] is tokens[0]
    assert not torch.equal(merged[1], tokens[1])
