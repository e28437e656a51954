"""Factorized sparse attention: each token attends to about sqrt(n) nearby tokens and to about sqrt(n) distant ones.

Child et al. 2019, arXiv 1904.10509.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PATTERNS = ('strided', 'fixed')
MODES = ('interleave', 'union', 'heads')
PARTS = ('near', 'far')


def attended(
    position: int, *, pattern: str, parts: Collection[str], stride: int, summary: int, first: int
) -> list[int]:
    """The sorted positions, from `first` on, that the token at `position` attends to.

    Let l be the stride and c the summary size. In 'strided', the near part has the last l tokens, and the far part
    every l-th previous token. In 'fixed', the near part has all tokens of the same block of l, and the far part the
    last c tokens of every block. A token always attends to itself.
    """
    positions = {position}
    if 'near' in parts:
        begin = position - stride if pattern == 'strided' else position // stride * stride
        positions.update(range(max(first, begin), position))
    if 'far' in parts and pattern == 'strided':
        positions.update(range(first + (position - first) % stride, position, stride))
    elif 'far' in parts:
        for end in range(first // stride * stride + stride, position + stride, stride):
            positions.update(range(max(first, end - summary), min(end, position)))
    return sorted(positions)


def keys_of_pattern(n: float, *, pattern: str, parts: Collection[str], stride: int, summary: int) -> float:
    """The average number of keys of a token, in a sequence of `n` tokens."""
    near = stride if pattern == 'strided' else stride / 2
    far = n / 2 / stride * (summary if pattern == 'fixed' else 1)
    return ('near' in parts) * near + ('far' in parts) * far


def attend_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    *,
    pattern: str,
    parts: Collection[str],
    stride: int,
    summary: int,
    reach: int,
) -> Tensor:
    """Softmax attention of each token to the tokens that `attended` lists, among the last `reach`.

    Time and memory are `O(seq * (stride * 2 + (past + seq) / stride * c))`, where c is 1, or the summary size of
    'fixed'. No mask has `seq` by `seq` entries.

    Args:
        q: `(batch, heads, seq, dim_head)`.
        k: `(batch, heads, past + seq, dim_head)`, where the first `past` tokens precede the queries.
        v: like `k`.
        start: position of the first query.
        pattern: 'strided' or 'fixed'.
        parts: 'near', 'far' or both.
        stride: l of the pattern.
        summary: c of the pattern 'fixed'.
        reach: how many tokens back a token may attend.

    Returns:
        `(batch, heads, seq, dim_head)`.
    """
    b, _, n, _ = q.shape
    first = start - (k.shape[2] - n)
    # whole blocks of `stride` tokens, with queries and keys on the same grid
    q, k, v = (
        rearrange(
            F.pad(t, (0, 0, begin % stride, -(start + n) % stride)),
            'b h (blocks stride) d -> (b h) blocks stride d', stride=stride,
        )
        for t, begin in ((q, start), (k, first), (v, first))
    )  # fmt: skip
    blocks, offsets = q.shape[1], torch.arange(stride, device=q.device)
    query_block = start // stride + torch.arange(blocks, device=q.device)
    key_block = first // stride + torch.arange(k.shape[1], device=q.device)
    query_at = query_block[:, None] * stride + offsets
    key_at = key_block[:, None] * stride + offsets
    attend = _attend_strided if pattern == 'strided' else _attend_fixed
    out = attend(q, k, v, query_at, key_at, max(first, 0), parts, summary, reach)
    out = rearrange(out, '(b h) blocks stride d -> b h (blocks stride) d', b=b)
    return out[:, :, start % stride : start % stride + n]


def _is_visible(query_at: Tensor, key_at: Tensor, first: int, reach: int) -> Tensor:
    """Whether each key exists, does not follow the query and is within its reach. Always true for a token itself.

    query_at: positions `(..., queries)`; key_at: `(..., keys)`. Returns `(..., queries, keys)`. Padding sees itself.
    """
    distance = query_at[..., :, None] - key_at[..., None, :]
    return (distance == 0) | ((distance > 0) & (distance <= reach) & (key_at >= first)[..., None, :])


def _attend_strided(
    q: Tensor, k: Tensor, v: Tensor, query_at: Tensor, key_at: Tensor, first: int, parts: Collection[str], _: int,
    reach: int,
) -> Tensor:  # fmt: skip
    blocks, stride = query_at.shape
    before = k.shape[1] - blocks

    def near(t: Tensor) -> Tensor:
        """The keys of each query block and of the block before it."""
        # not `with_previous`: it would sum gradients in another order than released versions
        return torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, before : before + blocks], t[:, before:]), dim=2)

    block_at = key_at[before:]
    near_at = torch.cat((block_at - stride, block_at), dim=1)
    in_band = _is_visible(query_at, near_at, first, min(reach, stride))
    # a column of the grid holds the tokens whose distance is a multiple of the stride
    column = _is_visible(query_at.t(), key_at.t(), first, reach)
    if 'far' not in parts:
        return F.scaled_dot_product_attention(q, near(k), near(v), attn_mask=in_band[None])
    if 'near' not in parts:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=column[None]).transpose(1, 2)

    # the column must not repeat near tokens
    distance = query_at.t()[:, :, None] - key_at.t()[:, None]
    column = column & (distance > stride)
    scale = q.shape[-1] ** -0.5
    band_scores = (q * scale) @ near(k).mT
    columns = rearrange(k, 'rows blocks stride d -> rows stride d blocks')
    column_scores = ((q * scale).transpose(1, 2) @ columns).transpose(1, 2)
    scores = torch.cat((band_scores, column_scores), dim=-1).to(torch.promote_types(q.dtype, torch.float32))
    mask = torch.cat((in_band, column.transpose(0, 1)), dim=-1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(v.dtype)
    of_band, of_column = weights.split((2 * stride, k.shape[1]), dim=-1)
    return of_band @ near(v) + (of_column.transpose(1, 2) @ v.transpose(1, 2)).transpose(1, 2)


def _attend_fixed(
    q: Tensor, k: Tensor, v: Tensor, query_at: Tensor, key_at: Tensor, first: int, parts: Collection[str],
    summary: int, reach: int,
) -> Tensor:  # fmt: skip
    blocks, stride = query_at.shape
    before = k.shape[1] - blocks
    block_at = key_at[before:]
    mask = _is_visible(query_at, block_at, first, reach)
    if 'near' not in parts:
        mask = mask & ((query_at[..., None] == block_at[:, None]) | (block_at % stride >= stride - summary)[:, None])
    keys, values = k[:, before:], v[:, before:]
    if 'far' in parts:

        def summaries(t: Tensor) -> Tensor:
            """The last tokens of all blocks, for each query block."""
            return t[:, :, stride - summary :].flatten(1, 2)[:, None].expand(-1, blocks, -1, -1)

        at = key_at[:, stride - summary :].flatten()
        far = _is_visible(query_at, at, first, reach) & (at // stride < query_at[..., :1] // stride)[..., None, :]
        keys, values = torch.cat((keys, summaries(k)), dim=2), torch.cat((values, summaries(v)), dim=2)
        mask = torch.cat((mask, far), dim=-1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None])
