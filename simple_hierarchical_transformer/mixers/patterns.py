"""Factorized sparse attention: each token attends near by, and to some tokens far away, about sqrt(n) of each.

Child et al. 2019, arXiv 1904.10509.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = ('strided', 'fixed')
MODES = ('interleave', 'union', 'heads')
PARTS = ('near', 'far')


def attended(
    position: int, *, pattern: str, parts: Collection[str], stride: int, summary: int, first: int
) -> list[int]:
    """The positions from `first` on that the token at `position` attends to.

    With stride l and summary size c, 'strided' is near the last l tokens, and far every l-th token before; 'fixed' is
    near all tokens of its block of l, and far the last c of each block. A token always attends to itself, too.
    """

    found = {position}
    if 'near' in parts:
        begin = position - stride if pattern == 'strided' else position // stride * stride
        found.update(range(max(first, begin), position))
    if 'far' in parts and pattern == 'strided':
        found.update(range(first + (position - first) % stride, position, stride))
    elif 'far' in parts:
        for end in range(first // stride * stride + stride, position + stride, stride):
            found.update(range(max(first, end - summary), min(end, position)))
    return sorted(found)


def keys_of_pattern(n: float, *, pattern: str, parts: Collection[str], stride: int, summary: int) -> float:
    """How many keys a token of a sequence of n has, on average."""
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
    """Softmax attention of tokens `start` and on to those that `attended` says, of the last `reach`.

    q and the result: `(batch, heads, seq, dim_head)`; k, v: `(batch, heads, past + seq, dim_head)`, of which the first
    `past` belong to the tokens before. Time and memory `O(seq * (stride * 2 + (past + seq) / stride * c))`, where c is
    1, or the summary size of 'fixed': nowhere is there a mask of `seq` by `seq`.
    """
    b, h, n, d = q.shape
    first = start - (k.shape[2] - n)
    # whole blocks of `stride` tokens, queries and keys aligned to the same grid
    q, k, v = (
        F.pad(t, (0, 0, at % stride, -(start + n) % stride)).reshape(b * h, -1, stride, d)
        for t, at in ((q, start), (k, first), (v, first))
    )
    blocks, rows = q.shape[1], torch.arange(stride, device=q.device)
    query_block = start // stride + torch.arange(blocks, device=q.device)
    key_block = first // stride + torch.arange(k.shape[1], device=q.device)
    query_at = query_block[:, None] * stride + rows
    key_at = key_block[:, None] * stride + rows
    attend = _attend_strided if pattern == 'strided' else _attend_fixed
    out = attend(q, k, v, query_at, key_at, max(first, 0), parts, summary, reach)
    out = out.reshape(b, h, blocks * stride, d)
    return out[:, :, start % stride : start % stride + n]


def _seen(query_at: Tensor, key_at: Tensor, first: int, reach: int) -> Tensor:
    """Which keys are there, not after the query, and within its reach. One with itself always, padding too."""
    distance = query_at[..., :, None] - key_at[..., None, :]
    return (distance == 0) | ((distance > 0) & (distance <= reach) & (key_at >= first)[..., None, :])


def _attend_strided(
    q: Tensor, k: Tensor, v: Tensor, query_at: Tensor, key_at: Tensor, first: int, parts: Collection[str], _: int,
    reach: int,
) -> Tensor:  # fmt: skip
    blocks, stride = query_at.shape
    before = k.shape[1] - blocks

    def near(t: Tensor) -> Tensor:
        """Each query block's own keys, and those of the block before it."""
        return torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, before : before + blocks], t[:, before:]), dim=2)

    own_at = key_at[before:]
    near_at = torch.cat((own_at - stride, own_at), dim=1)
    in_band = _seen(query_at, near_at, first, min(reach, stride))
    # a column of the grid is every token that is a multiple of the stride away
    column = _seen(query_at.t(), key_at.t(), first, reach)
    if 'far' not in parts:
        return F.scaled_dot_product_attention(q, near(k), near(v), attn_mask=in_band[None])
    if 'near' not in parts:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=column[None]).transpose(1, 2)

    # what is near is not met again in the column
    apart = query_at.t()[:, :, None] - key_at.t()[:, None]
    column = column & (apart > stride)
    scale = q.shape[-1] ** -0.5
    band_scores = (q * scale) @ near(k).mT
    column_scores = ((q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)).transpose(1, 2)
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
    own_at = key_at[before:]
    mask = _seen(query_at, own_at, first, reach)
    if 'near' not in parts:
        mask = mask & ((query_at[..., None] == own_at[:, None]) | (own_at % stride >= stride - summary)[:, None])
    keys, values = k[:, before:], v[:, before:]
    if 'far' in parts:

        def summaries(t: Tensor) -> Tensor:
            """Those of all blocks, for each query block."""
            return t[:, :, stride - summary :].flatten(1, 2)[:, None].expand(-1, blocks, -1, -1)

        at = key_at[:, stride - summary :].flatten()
        far = _seen(query_at, at, first, reach) & (at // stride < query_at[..., :1] // stride)[..., None, :]
        keys, values = torch.cat((keys, summaries(k)), dim=2), torch.cat((values, summaries(v)), dim=2)
        mask = torch.cat((mask, far), dim=-1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None])
