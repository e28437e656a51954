"""The merge of the published package: a feed-forward over all levels' tokens, concatenated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..levels import Grid, Level
from ..ops.linear import Chain, begin_at_zero, chain, effective_weight, is_plain, linear, matrix_of
from ..ops.norm import RMSNorm
from .base import Merge, MergeState, concat_levels, gain_of, normalised, zero_columns


class ConcatMerge(Merge):
    """A feed-forward over the tokens of all levels at a position, concatenated: `(batch, n, sum of dims)`.

    Each recipient gets the outputs at its own positions.
    """

    def build(self, levels: Sequence[Level]) -> None:
        dim_in, dim_out = sum(self.dims), sum(self.dims[i] for i in self.recipients)
        self.net = Chain(
            RMSNorm(dim_in),
            nn.Linear(dim_in, 2 * dim_out),
            nn.SiLU(),
            nn.Linear(2 * dim_out, dim_out),
        )

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        # each recipient has rows of its own in the last map, which are used at its own stride
        rows = [(self.dims[i], self.strides[i]) for i in self.recipients]
        yield self.net[-1], n * sum(dim / stride for dim, stride in rows) / sum(dim for dim, _ in rows)

    def zero_init(self) -> None:
        begin_at_zero(self.net[-1])

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, updated: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        joined, state = concat_levels(tokens, self.strides, state, position)
        return (joined, position), state

    def updates(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        joined, position = gathered
        joined = zero_columns(joined, self.dims, ablated)
        dims, strides = [self.dims[i] for i in self.recipients], [self.strides[i] for i in self.recipients]
        positions = [Grid(stride).at(position) for stride in strides]
        # a strided level has no use for what is pooled between its tokens
        matrix = matrix_of(self.net[-1]) if max(strides) > 1 and is_plain(self.net) and len(self.net) == 4 else None
        if matrix is None:
            pooled = self.net(joined).split(dims, dim=-1)
            return [each[:, at] for each, at in zip(pooled, positions, strict=True)]

        norm, to_inner, activation, _ = self.net
        inner = chain(joined, norm, to_inner)
        weight, bias = matrix
        biases = [None] * len(dims) if bias is None else bias.split(dims)
        return [
            linear(inner[:, at], rows, each, after=activation)
            for at, rows, each in zip(positions, weight.split(dims), biases, strict=True)
        ]

    def weights(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        norm, to_inner, *_ = self.net
        squares = (effective_weight(to_inner, gathered[0]) * gain_of(norm)).square().sum(dim=0)
        shares = torch.stack([each.sum() for each in zero_columns(squares, self.dims, ablated).split(self.dims)])
        return [normalised(shares) for _ in self.recipients]
