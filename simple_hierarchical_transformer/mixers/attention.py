"""Causal softmax attention, over everything before or over a window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import Linear
from ..norm import RMSNorm
from .rotary import Rotary

# a block of fewer queries than this spends its time on overhead
MIN_BLOCK = 64

Cache = tuple[Tensor, Tensor]


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of each token to itself and the `window` tokens before it.

    q and the result: `(batch, heads, seq, dim_head)`; k, v: `(batch, heads, past + seq, dim_head)`, where the first
    `past <= window` belong to tokens before the sequence. Queries go in blocks no smaller than the window, so each
    block finds all its keys in itself and in the block before: time and memory grow as `seq * window`.
    """
    b, h, n, d = q.shape
    past = k.shape[-2] - n
    block = max(window, MIN_BLOCK)

    if n <= block:
        if past + n - 1 <= window and (past == 0 or n == 1):
            return F.scaled_dot_product_attention(q, k, v, is_causal=n > 1)
        distance = torch.arange(past, past + n, device=q.device)[:, None] - torch.arange(past + n, device=q.device)
        band = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    # batch and heads fold into one axis, blocks take the place of heads: one mask then serves every row
    blocks = -(-n // block)
    tail = blocks * block - n
    q = F.pad(q, (0, 0, 0, tail)).reshape(b * h, blocks, block, d)
    k, v = (F.pad(t, (0, 0, block - past, tail)).reshape(b * h, blocks + 1, block, d) for t in (k, v))
    k, v = (torch.cat((t[:, :-1], t[:, 1:]), dim=-2) for t in (k, v))

    i = torch.arange(block, device=q.device)
    j = torch.arange(-block, block, device=q.device)
    distance = i[:, None] - j
    band = ((distance >= 0) & (distance <= window)).expand(blocks, -1, -1)
    before_start = (torch.arange(blocks, device=q.device)[:, None] == 0) & (j < -past)
    mask = band & ~before_start[:, None]

    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    return out.reshape(b, h, blocks * block, d)[:, :, :n]


class Attention(nn.Module):
    """Multi-head causal attention with its pre-norm. `(batch, seq, dim)` to `(batch, seq, dim)`.

    `window = None` attends to everything before: RMSNorm, rotary embeddings with xPos over interleaved pairs.
    `window = w` attends to the token and the `w` before it: LayerNorm, rotary embeddings over halves, the
    conventions of local-attention's `LocalMHA`. Vaswani et al. 2017, arXiv 1706.03762.

    Time `O(seq * min(seq, window))`, memory `O(seq)` or `O(seq * window)`.

    Its state are the keys and values of the last tokens, each `(batch, heads, reach + 1, dim_head)`, a ring in which
    token `r` stands in slot `r % (reach + 1)`. With a state, full attention too reaches back `reach` tokens.
    """

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8, window: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.window = window

        inner = dim_head * heads
        full = window is None
        self.norm = RMSNorm(dim) if full else nn.LayerNorm(dim)
        self.rotary_emb = Rotary(dim_head, pairs='interleaved' if full else 'halves', xpos=full)
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None, start: int = 0) -> tuple[Tensor, Cache | None]:
        """x: `(batch, seq, dim)`, tokens `start` to `start + seq` of the sequence."""
        # (3, batch, heads, seq, dim_head)
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = qkv[2]

        if cache is not None:
            q, k = self.rotary_emb.relative_to_block(qkv[:2], start)
            out, cache = self.attend_cached(q, k, v, cache, start)
        else:
            q, k = self.rotary_emb(qkv[:2])
            if self.window is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = attend_window(q, k, v, self.window)

        return self.to_out(out.transpose(1, 2).flatten(2)), cache

    def attend_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        n, slots = k.shape[-2], cache[0].shape[-2]
        keys, values = self.rotary_emb.next_block(cache[0], start, n), cache[1]
        in_place = not torch.is_grad_enabled()

        if n == 1 and in_place and torch.compiler.is_compiling():
            # one graph for every position: nothing but the contents of tensors hangs on `start`
            slot = torch.full((1,), start % slots, device=k.device)
            keys, values = keys.index_copy_(2, slot, k), values.index_copy_(2, slot, v)
            filled = torch.arange(slots, device=k.device) <= start
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=filled[None]), (keys, values)

        if n == 1 and in_place:
            keys[:, :, start % slots], values[:, :, start % slots] = k[:, :, 0], v[:, :, 0]
            seen = min(start + 1, slots)
            return F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen]), (keys, values)

        old = torch.arange(max(0, start - slots + 1), start, device=k.device) % slots
        all_keys, all_values = (
            torch.cat((kept.index_select(2, old), fresh), dim=2) for kept, fresh in ((keys, k), (values, v))
        )
        out = attend_window(q, all_keys, all_values, slots - 1)

        # only the newest can still be reached by what comes
        new = torch.arange(max(start, start + n - slots), start + n, device=k.device) % slots
        put = Tensor.index_copy_ if in_place else Tensor.index_copy
        return out, (put(keys, 2, new, k[:, :, -len(new) :]), put(values, 2, new, v[:, :, -len(new) :]))
