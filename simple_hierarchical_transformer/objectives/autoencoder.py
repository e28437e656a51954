"""The decoder of the autoencoder reconstructs all ids from the coarsest feature map."""

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
class Autoencoding(CrossEntropy):
    """The head is `autoencoder.to_ids`, and the decoder is part of the `Autoencoder` too."""

    kind: ClassVar[str] = 'autoencoder'

    @classmethod
    def from_config(cls, config: Config) -> list[Autoencoding]:
        if not config.autoencoder or config.autoencoder_loss_weight == 0:
            return []
        coarsest = max(config.compressions)
        return [cls(weight=config.autoencoder_loss_weight, compression=coarsest, stride=coarsest)]

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        windows, ignored = batch.past(self.compression, self.stride)
        return Targets(windows.flatten(1), ignored)

    def tokens(self, model: HierarchicalTransformer, read: Read, batch: Batch) -> Tensor:
        assert model.autoencoder is not None
        assert read.codes is not None
        return model.autoencoder.decode(read.codes, batch.position)

    def head(self, model: HierarchicalTransformer) -> nn.Module:
        assert model.autoencoder is not None
        return model.autoencoder.get_submodule('to_ids')
