"""The head that finds surprising ids predicts the next id: Pagnoni et al. 2024, arXiv 2412.09871, section 2.3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..boundaries import OF_SURPRISE
from ..ops.cross_entropy import cross_entropy
from ..ops.linear import chain
from .base import Batch, Objective, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..read import Read


@dataclass(frozen=True, kw_only=True)
class Surprised(Objective):
    """The cross entropy of the head of `boundaries.Surprise` on the finer tokens, from which no gradient flows back."""

    kind: ClassVar[str] = 'surprise'
    trains_final_tokens: ClassVar[bool] = False

    spacing: float = 1.0
    """The mean number of positions from one of the finer tokens to the next."""

    @classmethod
    def from_config(cls, config: Config) -> list[Surprised]:
        objectives = []
        for finer, i in pairwise(config.order):
            level, below = config.levels[i], config.levels[finer]
            if config.surprise_loss_weight > 0 and level.boundaries in OF_SURPRISE:
                objectives.append(
                    cls(
                        weight=config.surprise_loss_weight,
                        level=i,
                        compression=level.compression,
                        # its targets are those of the finer tokens
                        stride=below.stride,
                        placed=below.is_placed,
                        spacing=below.spacing,
                    )
                )
        return objectives

    @property
    def scale(self) -> float:
        return self.spacing if self.placed else 1.0

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        if pieces is None:
            return Targets(batch.labels[:, batch.offset(self.stride) :: self.stride], batch.ignore_index)
        return Targets(pieces.pick_finer(batch.labels, batch.ignore_index), batch.ignore_index)

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        assert self.level is not None
        pieces = read.pieces[self.level]
        rule: Any = model.boundaries[str(self.level)]
        if not hasattr(rule, 'to_logits'):
            # a rule without a head, which a user put in its place
            return read.features.new_zeros(())
        values, ignored = self.targets(batch, pieces)
        divisors = self.divisors(batch, counts)
        x = chain(pieces.tokens.detach(), rule.norm)
        loss = cross_entropy(x, rule.to_logits, values, ignored, count=None if divisors is None else divisors[0])
        return loss * self.scale if self.placed else loss
