"""Where the levels tell each other what they know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .levels import Level
from .linear import Chain, Linear
from .norm import RMSNorm
from .state import keep

Coarse = tuple[Tensor | None, ...]


def concat_levels(
    tokens: Sequence[Tensor], levels: Sequence[Level], coarse: Coarse | None = None, position: int = 0
) -> tuple[Tensor, Coarse | None]:
    """All levels' tokens side by side at each position: `(batch, n, sum of dims)`.

    A level token of stride s is repeated for its s positions. The chunk begins at `position`, and where that is in
    the middle of a stride, the token that stands for its first positions is the last of the chunk before: `coarse`
    has one `(batch, 1, dim)` for each level of a stride. `n` is the length of the finest level at hand, which has
    stride 1 wherever a model predicts from it.
    """
    n = max(x.shape[1] for x in tokens)
    columns: list[Tensor] = []
    kept: list[Tensor | None] = []

    for x, level, last in zip(tokens, levels, coarse or (None,) * len(levels), strict=True):
        begun = position % level.stride
        if begun and last is not None:
            x = torch.cat((last, x), dim=1)
        kept.append(keep(last, x[:, -1:]))
        columns.append(x if level.stride == 1 else x.repeat_interleave(level.stride, dim=1)[:, begun : begun + n])

    return torch.cat(columns, dim=-1), coarse and tuple(kept)


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
        self.net = Chain(
            RMSNorm(dim_in),
            Linear(dim_in, 2 * dim_out),
            nn.SiLU(),
            Linear(2 * dim_out, dim_out),
        )

    def forward(
        self, tokens: Sequence[Tensor], coarse: Coarse | None = None, position: int = 0
    ) -> tuple[list[Tensor], Coarse | None]:
        joined, coarse = concat_levels(tokens, self.levels, coarse, position)
        pooled = self.net(joined)

        merged = list(tokens)
        for i, update in zip(self.into, pooled.split(self.dims, dim=-1), strict=True):
            stride = self.levels[i].stride
            merged[i] = merged[i] + update[:, -position % stride :: stride]
        return merged, coarse
