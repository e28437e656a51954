"""The share of positions at which a placed level has a token. It is measured, not trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .base import Batch, Objective

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..read import Read


@dataclass(frozen=True, kw_only=True)
class PieceShare(Objective):
    """The number of a placed level's tokens for each id, with a weight of 0, so that runs record it."""

    kind: ClassVar[str] = 'pieces'
    trains_final_tokens: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Config) -> list[PieceShare]:
        return [
            cls(weight=0.0, level=i, compression=level.compression, placed=True)
            for i, level in enumerate(config.levels)
            if level.is_placed
        ]

    def counts(self, batch: Batch) -> list[Tensor]:
        """The number of ids."""
        return [torch.full((), batch.ids.numel(), device=batch.ids.device)]

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        pieces = self.pieces(read)
        assert pieces is not None
        # half precision would round the number
        total = pieces.lengths.sum().to(torch.promote_types(read.features.dtype, torch.float32))
        return total / (self.counts(batch) if counts is None else counts)[0].clamp(min=1)
