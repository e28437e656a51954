"""Cross entropy of the next id: the objective of every language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from .base import Batch, CrossEntropy, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..read import Read


@dataclass(frozen=True, kw_only=True)
class NextToken(CrossEntropy):
    kind: ClassVar[str] = 'ce'

    @classmethod
    def from_config(cls, config: Config) -> list[NextToken]:
        return [cls(weight=1.0)]

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        return Targets(batch.labels, batch.ignore_index)

    def tokens(self, model: HierarchicalTransformer, read: Read, batch: Batch) -> Tensor:
        return read.features

    def head(self, model: HierarchicalTransformer) -> nn.Module:
        return model.to_logits
