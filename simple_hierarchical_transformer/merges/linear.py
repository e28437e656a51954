"""The cheapest merge: one linear map of each other level's token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..levels import Grid, Level
from ..ops.linear import begin_at_zero, effective_weight
from ..ops.norm import RMSNorm
from .base import Merge, MergeState, at_each_position, gain_of, normalised


class LinearMerge(Merge):
    """Adds to each recipient one linear map of every other level's token at its position.

    A level's tokens are mapped before they are repeated for their positions, so a coarser level costs less.
    """

    def build(self, levels: Sequence[Level]) -> None:
        # a level adds nothing to itself
        self.others = [[i for i in self.recipients if i != j] for j in range(len(levels))]
        self.norms = nn.ModuleList(
            RMSNorm(dim) if others else nn.Identity() for others, dim in zip(self.others, self.dims, strict=True)
        )
        self.to_others = nn.ModuleList(
            nn.Linear(dim, sum(self.dims[i] for i in others), bias=False) if others else nn.Identity()
            for others, dim in zip(self.others, self.dims, strict=True)
        )

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        yield from ((to, n / stride) for to, stride in zip(self.to_others, self.strides, strict=True))

    def zero_init(self) -> None:
        for to_others in self.to_others:
            begin_at_zero(to_others)

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, updated: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        parts = [
            (norm, to_others) if others else ()
            for to_others, norm, others in zip(self.to_others, self.norms, self.others, strict=True)
        ]
        columns, state = at_each_position(tokens, self.strides, state, position, parts)
        # by recipient and source
        mapped: dict[tuple[int, int], Tensor] = {}
        for j, (column, others) in enumerate(zip(columns, self.others, strict=True)):
            pieces = column.split([self.dims[i] for i in others], dim=-1) if others else ()
            for i, piece in zip(others, pieces, strict=True):
                mapped[i, j] = piece[:, Grid(self.strides[i]).at(position)]
        return (mapped, tokens), state

    def updates(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        mapped, tokens = gathered
        updates = []
        for recipient in self.recipients:
            terms = [term for (i, j), term in mapped.items() if i == recipient and j not in ablated]
            updates.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(tokens[recipient]))
        return updates

    def weights(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        _, tokens = gathered
        found = []
        for i in self.recipients:
            shares = [tokens[i].new_zeros(()) for _ in self.dims]
            for j, (to_others, norm, others) in enumerate(zip(self.to_others, self.norms, self.others, strict=True)):
                if i in others and j not in ablated:
                    rows = effective_weight(to_others, tokens[j]).split([self.dims[k] for k in others])
                    shares[j] = (rows[others.index(i)] * gain_of(norm)).square().sum()
            found.append(normalised(torch.stack(shares)))
        return found
