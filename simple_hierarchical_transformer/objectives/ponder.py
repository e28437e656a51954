"""The number of layers that tokens take with adaptive computation time: Graves 2016, arXiv 1603.08983, eq. 11."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .base import Batch, Objective, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..read import Read


@dataclass(frozen=True, kw_only=True)
class Ponder(Objective):
    kind: ClassVar[str] = 'ponder'
    trains_final_tokens: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Config) -> list[Ponder]:
        halts = [config.halting is not None and i in config.predict_from for i in range(len(config.levels))]
        return cls.per_level(config, [config.ponder_loss_weight if each else 0.0 for each in halts])

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        # every token counts: no id is below 0
        return Targets(batch.at_tokens(self.stride), -1)

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        assert self.level is not None
        total = read.pondered[self.level].sum()
        if counts is None:
            return total / max(self.targets(batch).values.numel(), 1)
        return total / counts[0].clamp(min=1)
