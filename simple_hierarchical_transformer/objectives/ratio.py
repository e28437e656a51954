"""Keeps the share of learned boundaries near the intended one: Hwang et al. 2025, arXiv 2507.07955, equation 10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..levels import OWN
from .base import Batch, Objective

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..read import Read


@dataclass(frozen=True, kw_only=True)
class Ratio(Objective):
    """The ratio loss of H-Net, as a mean over rows, so that the losses of several batches sum to that of one.

        N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G))

    N is the intended number of finer tokens in a piece. F is the share of boundaries among the finer tokens of a row,
    G the mean of their probability. It is 1 where both are 1 / N. A row without finer tokens adds 0.
    """

    kind: ClassVar[str] = 'ratio'
    trains_final_tokens: ClassVar[bool] = False

    spacing: float = 2.0

    @classmethod
    def from_config(cls, config: Config) -> list[Ratio]:
        objectives = []
        for finer, i in pairwise(config.order):
            level = config.levels[i]
            if config.ratio_loss_weight > 0 and level.boundaries in ('learned', OWN):
                spacing = level.spacing / config.levels[finer].spacing
                objectives.append(
                    cls(
                        weight=config.ratio_loss_weight,
                        level=i,
                        compression=level.compression,
                        placed=True,
                        spacing=spacing,
                    )
                )
        return objectives

    def counts(self, batch: Batch) -> list[Tensor]:
        """The number of rows."""
        return [torch.full((), len(batch.ids), device=batch.ids.device)]

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        pieces = self.pieces(read)
        assert pieces is not None
        if pieces.probability is None:
            # a user's rule that does not learn
            return read.features.new_zeros(())
        # -1 for padding
        exists = pieces.finer.index >= 0
        probability, boundary = pieces.probability, pieces.boundary.to(pieces.probability.dtype)
        count = exists.sum(1)
        divisor = count.clamp(min=1)
        f, g = boundary.sum(1) / divisor, (probability * exists).sum(1) / divisor
        n = self.spacing
        ratio = n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
        # a chunk may have no finer token of a row
        return (ratio * (count > 0)).sum() / (self.counts(batch) if counts is None else counts)[0].clamp(min=1)
