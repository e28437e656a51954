"""A level token of compression c predicts the next c ids: ProphetNet, Qi et al. 2020, arXiv 2001.04063."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from ..checks import user_frame
from .base import Batch, CrossEntropy, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces


@dataclass(frozen=True, kw_only=True)
class Prophet(CrossEntropy):
    kind: ClassVar[str] = 'prophet'
    containers: ClassVar[Mapping[str, str | None]] = dict(to_prophet='head')

    @classmethod
    def from_config(cls, config: Config) -> list[Prophet]:
        weights = [
            # here it would be the cross entropy once more
            0.0 if config.compressions[i] == 1 and i in config.predict_from else weight
            for i, weight in enumerate(config.values('prophet_loss_weight'))
        ]
        objectives = cls.per_level(config, weights)
        if any(config.values('prophet_loss_weight')) and not objectives:
            warnings.warn(
                'prophet_loss_weight builds nothing: that of level 1x, which predicts, is the cross entropy',
                stacklevel=user_frame(),
            )
        return objectives

    def modules(self, config: Config) -> dict[str, nn.Module]:
        assert self.level is not None
        dim = config.levels[self.level].dim
        return {'to_prophet': nn.Linear(dim, self.compression * config.num_tokens, bias=False)}

    @property
    def targets_per_token(self) -> int:
        return self.compression

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        return batch.future(self.compression, self.stride, pieces)

    def head(self, model: HierarchicalTransformer) -> nn.Module:
        return model.to_prophet[str(self.level)]
