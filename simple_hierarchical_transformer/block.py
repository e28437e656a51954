"""One layer of one hierarchy level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .levels import Level
from .mixers import Attention
from .norm import RMSNorm


def shift_tokens(x: Tensor) -> Tensor:
    """Delays the second half of the channels by one token: `(batch, seq, dim)`. Peng et al. 2023, arXiv 2305.13048."""
    kept, delayed = x.chunk(2, dim=-1)
    return torch.cat((kept, F.pad(delayed, (0, 0, 1, -1))), dim=-1)


class FeedForward(nn.Module):
    """Pre-norm GELU feed-forward, bias-free."""

    def __init__(self, dim: int, mult: float) -> None:
        super().__init__()
        inner = int(dim * mult)
        self.net = nn.Sequential(
            RMSNorm(dim),
            nn.Linear(dim, inner, bias=False),
            nn.GELU(),
            nn.Linear(inner, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class HierarchicalBlock(nn.Module):
    """Token mixing, then feed-forward, each on shifted tokens and added to the stream. `(batch, seq, dim)`.

    Both work within phases: level tokens whose indices agree modulo `level.phases` form one sequence.
    A level with a window of 0 has no mixer, and its tokens meet through the shift alone.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.phases = level.phases
        self.attn = (
            Attention(dim=level.dim, dim_head=level.dim_head, heads=level.heads, window=level.window)
            if level.window != 0
            else None
        )
        self.ff = FeedForward(level.dim, level.ff_mult)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        p = self.phases

        # zeros at the end make the last round whole; nothing before them can see them
        x = rearrange(F.pad(x, (0, 0, 0, -n % p)), 'b (n p) d -> (b p) n d', p=p)

        if self.attn is not None:
            x = x + self.attn(shift_tokens(x))
        x = x + self.ff(shift_tokens(x))

        return rearrange(x, '(b p) n d -> b (n p) d', b=b)[:, :n]
