"""A level token reconstructs the ids in its window, as in the published package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from .base import Batch, CrossEntropy, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces


@dataclass(frozen=True, kw_only=True)
class Reconstruction(CrossEntropy):
    """The head is `to_recon` of the level's compressor."""

    kind: ClassVar[str] = 'recon'

    @classmethod
    def from_config(cls, config: Config) -> list[Reconstruction]:
        weights = [config.recon_loss_weight if c > 1 else 0.0 for c in config.compressions]
        return cls.per_level(config, weights)

    @property
    def targets_per_token(self) -> int:
        return self.compression

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        return batch.past(self.compression, self.stride, pieces)

    def head(self, model: HierarchicalTransformer) -> nn.Module:
        assert self.level is not None
        return model.compressors[self.level].get_submodule('to_recon')

    def sample(self, model: HierarchicalTransformer) -> float:
        return model.recon_sample if model.training else 1.0
