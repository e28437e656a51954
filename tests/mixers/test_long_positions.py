"""Attention with a state at far positions: its reach, and the range of rotary embeddings."""

from __future__ import annotations

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from support.configs import SMALL, THREE, build, in_chunks

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import Attention
from simple_hierarchical_transformer.mixers.rotary import BLOCK, Rotary


def test_windowed_levels_beyond_seq_len_equal_a_longer_model() -> None:
    """The reference has the same weights, reads the text in one pass and uses no state."""
    config = dict(THREE, window_sizes=(4, 3, 2))
    ids = torch.randint(0, 11, (2, 150))
    with torch.no_grad():
        chunked, _ = in_chunks(build(config), ids, [7, 1, 20])
        longer = build(dict(config, seq_len=150))(ids)
    torch.testing.assert_close(chunked, longer, rtol=0, atol=1e-10)


@pytest.mark.parametrize('chunk', [1, 7, 64, 200])
def test_full_attention_with_a_state_reaches_back_seq_len_tokens(chunk: int) -> None:
    """The reference is a softmax under a band mask, with the embeddings of rotary-embedding-torch."""
    n, reach = 200, 32
    attn = Attention(dim=12, dim_head=8, heads=2, length=reach).double()
    x = torch.randn(2, n, 12, dtype=torch.float64)

    q, k, v = (t.view(2, n, 2, 8).transpose(1, 2) for t in attn.to_qkv(attn.norm(x)).chunk(3, dim=-1))
    q, k = RotaryEmbedding(8, use_xpos=True).double().rotate_queries_and_keys(q, k)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = (q @ k.mT / 8**0.5).masked_fill((distance < 0) | (distance > reach), -torch.inf)
    expected = attn.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    cache = attn.initial_state(2, x)
    outs = []
    with torch.no_grad():
        for at in range(0, n, chunk):
            out, cache = attn(x[:, at : at + chunk], cache, at)
            outs.append(out)
    # rotary-embedding-torch keeps the base of xPos in float32
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize('step', [1, 100])
def test_xpos_depends_on_distances_only(step: int) -> None:
    """Cached keys stay valid across many blocks of positions, and all factors stay finite."""
    window = 50
    model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, seq_len=window, dim_head=4, heads=2).double()
    ids = torch.randint(0, 11, (1, 60))
    with torch.no_grad():
        _, state = model(ids, return_state=True)
        near, _ = in_chunks(model, ids, [60])

        # the same text across the end of a far block has the same distances
        far_state = model.initial_state(1)
        for position in (BLOCK - 30, 1_000_000 // BLOCK * BLOCK - 30):
            far_state = type(state)(**{**vars(model.initial_state(1)), 'position': position})
            outs = []
            for at in range(0, 60, step):
                out, far_state = model(ids[:, at : at + step], state=far_state, return_state=True)
                outs.append(out)
            far = torch.cat(outs, dim=1)
            assert far.isfinite().all()
            # the zeros in the cache count as earlier tokens here, so only the last outputs are compared
            torch.testing.assert_close(far[:, -5:], near[:, -5:], rtol=0, atol=1e-6)


@pytest.mark.parametrize('splits', [[BLOCK - 40, 100], [BLOCK - 1, 1, 1, 90], [BLOCK + 110], [700]])
@pytest.mark.parametrize('grad', [False, True])
def test_chunks_equal_one_pass_across_blocks_of_xpos(splits: list[int], grad: bool) -> None:
    model = build(dict(SMALL, depth=1, dim=4, seq_len=3000))
    ids = torch.randint(0, 11, (1, BLOCK + 110))
    with torch.set_grad_enabled(grad):
        chunked, _ = in_chunks(model, ids, splits)
        torch.testing.assert_close(chunked, model(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize(('dtype', 'n'), [(torch.float16, 7000), (torch.float32, 40_000)])
def test_a_long_chunk_stays_finite(dtype: torch.dtype, n: int) -> None:
    attn = Attention(dim=16, dim_head=16, heads=1, length=64).to(dtype)
    x = torch.randn(1, n, 16, dtype=dtype)
    cache = attn.initial_state(1, x)
    with torch.no_grad():
        whole, _ = attn(x, tuple(t.clone() for t in cache))
        _, cache = attn(x[:, :-50], cache)
        last, _ = attn(x[:, -50:], cache, n - 50)
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:, -50:], last, rtol=2e-2, atol=2e-3)


def test_rotary_keeps_relative_positions_at_a_million() -> None:
    qk = torch.randn(2, 1, 1, 20, 64)
    rotary = Rotary(64, pairs='interleaved', xpos=True)
    near_q, near_k = rotary(qk)
    far_q, far_k = rotary.relative_to_block(qk, 1_000_000)
    torch.testing.assert_close(far_q @ far_k.mT, near_q @ near_k.mT, rtol=1e-4, atol=1e-4)
