"""Where the levels tell each other what they know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .levels import Level
from .norm import RMSNorm


def upsample(x: Tensor, stride: int, n: int) -> Tensor:
    """Repeats each level token for its `stride` positions: `(batch, ceil(n / stride), d)` to `(batch, n, d)`."""
    return x if stride == 1 else x.repeat_interleave(stride, dim=1)[:, :n]


def concat_levels(tokens: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
    """All levels' tokens side by side at each position: `(batch, n, sum of dims)`.

    `n` is the length of the finest level at hand, which has stride 1 wherever a model predicts from it.
    """
    n = max(x.shape[1] for x in tokens)
    return torch.cat([upsample(x, level.stride, n) for x, level in zip(tokens, levels, strict=True)], dim=-1)


class HierarchicalMerge(nn.Module):
    """Pools what all levels know at each position and adds it to the levels named in `into`.

    Takes and returns one `(batch, ceil(n / stride), dim)` for each level. A level of stride s receives what was
    pooled at positions 0, s, 2s, ...
    """

    def __init__(self, levels: Sequence[Level], into: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.into = tuple(into)
        self.dims = [levels[i].dim for i in into]

        dim_out = sum(self.dims)
        dim_in = sum(level.dim for level in levels)
        self.net = nn.Sequential(
            RMSNorm(dim_in),
            nn.Linear(dim_in, 2 * dim_out),
            nn.SiLU(),
            nn.Linear(2 * dim_out, dim_out),
        )

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        pooled = self.net(concat_levels(tokens, self.levels))

        merged = list(tokens)
        for i, update in zip(self.into, pooled.split(self.dims, dim=-1), strict=True):
            merged[i] = merged[i] + update[:, :: self.levels[i].stride]
        return merged
