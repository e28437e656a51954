"""Causal softmax attention, over everything before or over a window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..norm import RMSNorm
from .rotary import Rotary

# a block of fewer queries than this spends its time on overhead
MIN_BLOCK = 64


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of each token to itself and the `window` tokens before it.

    q, k, v and the result: `(batch, heads, seq, dim_head)`. Queries go in blocks no smaller than the window, so
    each block finds all its keys in itself and in the block before: time and memory grow as `seq * window`.
    """
    b, h, n, d = q.shape
    block = max(window, MIN_BLOCK)

    if n <= block:
        i = torch.arange(n, device=q.device)
        distance = i[:, None] - i
        band = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    # batch and heads fold into one axis, blocks take the place of heads: one mask then serves every row
    blocks = -(-n // block)
    q, k, v = (F.pad(t, (0, 0, 0, blocks * block - n)).reshape(b * h, blocks, block, d) for t in (q, k, v))
    k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t), dim=-2) for t in (k, v))

    i = torch.arange(block, device=q.device)
    j = torch.arange(-block, block, device=q.device)
    distance = i[:, None] - j
    band = ((distance >= 0) & (distance <= window)).expand(blocks, -1, -1)
    before_start = (torch.arange(blocks, device=q.device)[:, None] == 0) & (j < 0)
    mask = band & ~before_start[:, None]

    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    return out.reshape(b, h, blocks * block, d)[:, :, :n]


class Attention(nn.Module):
    """Multi-head causal attention with its pre-norm. `(batch, seq, dim)` to `(batch, seq, dim)`.

    `window = None` attends to everything before: RMSNorm, rotary embeddings with xPos over interleaved pairs.
    `window = w` attends to the token and the `w` before it: LayerNorm, rotary embeddings over halves, the
    conventions of local-attention's `LocalMHA`. Vaswani et al. 2017, arXiv 1706.03762.

    Time `O(seq * min(seq, window))`, memory `O(seq)` or `O(seq * window)`.
    """

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8, window: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.window = window

        inner = dim_head * heads
        full = window is None
        self.norm = RMSNorm(dim) if full else nn.LayerNorm(dim)
        self.rotary_emb = Rotary(dim_head, pairs='interleaved' if full else 'halves', xpos=full)
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x))
        q, k, v = rearrange(qkv, 'b n (qkv h d) -> qkv b h n d', qkv=3, h=self.heads)

        q, k = self.rotary_emb(q, k)

        if self.window is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = attend_window(q, k, v, self.window)

        return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))
