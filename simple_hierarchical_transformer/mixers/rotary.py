"""Rotary position embeddings, with and without the xPos decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

THETA = 10_000.0
XPOS_SCALE_BASE = 512.0


class Rotary(nn.Module):
    """Turns each pair of channels by an angle that grows with position, so that scores see distances alone.

    `pairs` says which channels form a pair: neighbours (2i, 2i + 1), or the two halves (i, i + dim / 2). With
    `xpos`, scores also decay with distance. Angles and products are formed in float32 (float64 for float64 input).

    RoPE: Su et al. 2021, arXiv 2104.09864, eq. 34. xPos: Sun et al. 2022, arXiv 2212.10554, eq. 12.
    """

    freqs: Tensor

    def __init__(self, dim: int, *, pairs: Literal['interleaved', 'halves'], xpos: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.pairs = pairs
        self.xpos = xpos
        # saved with the weights, as in the published package
        self.register_buffer('freqs', THETA ** -(torch.arange(0, dim, 2) / dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k: `(batch, heads, seq, dim)`, position 0 first. Shapes and dtype are kept."""
        n = q.shape[-2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        position = torch.arange(n, device=q.device, dtype=dtype)
        angles = torch.outer(position, self.freqs.to(dtype))
        cos, sin = angles.cos(), angles.sin()

        if not self.xpos:
            return self.turn(q, cos, sin), self.turn(k, cos, sin)

        # only the ratio of the two factors matters; counting from the middle keeps both small
        channel = torch.arange(0, self.dim, 2, device=q.device, dtype=dtype)
        base = (channel + 0.4 * self.dim) / (1.4 * self.dim)
        decay = base ** ((position - n // 2) / XPOS_SCALE_BASE)[:, None]
        return self.turn(q, cos * decay, sin * decay), self.turn(k, cos / decay, sin / decay)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        axis, split = (-1, (-1, 2)) if self.pairs == 'interleaved' else (-2, (2, -1))
        first, second = x.to(cos.dtype).unflatten(-1, split).unbind(axis)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=axis)
        return turned.flatten(-2).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a half-precision model keeps exact frequencies: rounding them would turn far positions to other angles
        exact = self.freqs
        super()._apply(fn, recurse)
        if torch.finfo(self.freqs.dtype).bits < 32:
            self.freqs = exact.to(self.freqs.device)
        return self
