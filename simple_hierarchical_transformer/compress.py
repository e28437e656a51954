"""From token embeddings to a level's tokens."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .levels import Level
from .linear import Linear, Part, linear
from .state import keep


class Windows(nn.Module):
    """The `compression` tokens that end at each position that is a multiple of the stride.

    x: `(batch, compression - 1 + seq, dim)`, the tokens before the sequence and the sequence, of which token
    `offset` is the first at such a position. Returns `(batch, ceil((seq - offset) / stride), dim * compression)`.
    """

    def __init__(self, compression: int, stride: int) -> None:
        super().__init__()
        self.compression = compression
        self.stride = stride

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        batch, length, dim = x.shape
        if length - offset < self.compression:
            return x.new_empty(batch, 0, dim * self.compression)
        return x[:, offset:].unfold(1, self.compression, self.stride).flatten(2)


class WindowConv(nn.Module):
    """A convolution over gathered windows: one matmul, where a strided conv1d's backward is pathologically slow."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim_out, kernel)

    def forward(self, x: Tensor, after: Part | None = None) -> Tensor:
        return linear(x, self.conv.weight.flatten(1), self.conv.bias, after)


class Compressor(nn.Module):
    """Makes a level's tokens: token `j` sees embeddings `j * stride - (compression - 1)` to `j * stride`.

    `(batch, seq, dim_embed)` to `(batch, ceil(seq / stride), dim)`. A causal convolution to four times the
    embedding width, SiLU, and a projection to the level's width. A level without compression keeps the
    embeddings, or projects them where the widths differ.

    With `reconstruct`, `to_recon` maps a level token to `compression * num_tokens` logits, one set for each id
    that the convolution saw.
    """

    def __init__(self, level: Level, *, dim_embed: int, num_tokens: int, reconstruct: bool) -> None:
        super().__init__()
        c = level.compression
        self.compression = c
        self.stride = level.stride
        self.compress_fn: nn.Module

        if c == 1:
            same = level.dim == dim_embed
            self.compress_fn = nn.Identity() if same else Linear(dim_embed, level.dim, bias=False)
        else:
            inner = 4 * dim_embed
            self.compress_fn = nn.Sequential(
                Windows(c, level.stride),
                WindowConv(dim_embed, inner, c),
                nn.SiLU(),
                Pointwise(inner, level.dim),
            )

        self.to_recon = Linear(level.dim, c * num_tokens, bias=False) if reconstruct and c > 1 else None

    def forward(self, embeds: Tensor, state: Tensor | None = None, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Embeddings `(batch, seq, dim_embed)` that begin at `position`; the state is those before it."""
        if not isinstance(self.compress_fn, nn.Sequential):
            return self.compress_fn(embeds), None

        windows, to_inner, act, to_dim = self.compress_fn
        before = self.compression - 1
        x = F.pad(embeds, (0, 0, before, 0)) if state is None else torch.cat((state, embeds), dim=1)

        tokens = to_dim(to_inner(x, after=partial(windows, offset=-position % self.stride)), after=act)
        return tokens, None if state is None else keep(state, x[:, -before:])


class Pointwise(nn.Conv1d):
    """A convolution of kernel 1 over `(batch, seq, dim)`, which is a linear map."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 1)

    def forward(self, x: Tensor, after: Part | None = None) -> Tensor:
        return linear(x, self.weight.squeeze(-1), self.bias, after)
