"""What objectives have in common: the ids of a batch, targets, and a cross entropy of a level's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..levels import Grid
from ..ops.cross_entropy import cross_entropy

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..read import Read

O = TypeVar('O', bound='Objective')  # noqa: E741


class Targets(NamedTuple):
    """What one objective predicts."""

    values: Tensor
    """`(batch, tokens)`, or `(batch, tokens, sets)` where a token predicts several."""
    ignored: int
    """The value that is skipped."""

    @property
    def counted(self) -> Tensor:
        """Which targets are not skipped, a bool tensor of the shape of `values`."""
        return self.values != self.ignored


class Batch(NamedTuple):
    """The ids of one call, checked and shifted."""

    ids: Tensor
    """What the model reads, `(batch, n)`, int64."""
    labels: Tensor
    """The id that follows each of them, `(batch, n)`, int64."""
    position: int
    """How many ids were read before the first one."""
    ignore_index: int
    """The label that objectives skip."""
    recon_ignore_index: int
    """The id that reconstructions skip."""

    def offset(self, stride: int) -> int:
        """The index of the first id at which a level of this stride has a token."""
        return Grid(stride).offset(self.position)

    def at_tokens(self, stride: int, pieces: Pieces | None = None) -> Tensor:
        """The ids at which a level of this stride has tokens, `(batch, tokens)`.

        `pieces` are those of a placed level. Its padding has `ignore_index`.
        """
        if pieces is not None:
            return pieces.pick(self.ids, self.ignore_index)
        return self.ids[:, Grid(stride).at(self.position)]

    def past(self, compression: int, stride: int, pieces: Pieces | None = None) -> Targets:
        """The ids in the window of each token of a level, as targets of a reconstruction. See `past_windows`."""
        ignored, offset = self.recon_ignore_index, self.offset(stride)
        windows = past_windows(self.ids, compression=compression, stride=stride, ignore_index=ignored, offset=offset)
        return Targets(windows if pieces is None else pieces.pick(windows, ignored), ignored)

    def future(self, compression: int, stride: int, pieces: Pieces | None = None) -> Targets:
        """The ids that follow each token of a level, as targets of a prediction. See `future_windows`."""
        ignored, offset = self.ignore_index, self.offset(stride)
        windows = future_windows(
            self.labels, compression=compression, stride=stride, ignore_index=ignored, offset=offset
        )
        return Targets(windows if pieces is None else pieces.pick(windows, ignored), ignored)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One term of the loss, for one level or for the whole model. It owns no weights: the model does.

    To add an objective, write a subclass in a file of its own, and add it to `OBJECTIVES`.
    """

    kind: ClassVar[str]
    containers: ClassVar[Mapping[str, str | None]] = {}
    """The names of the `nn.ModuleDict`s that hold its modules by level, each with the role of its weights for
    optimizers: 'head' for a map to ids, None if their shapes say it."""
    trains_final_tokens: ClassVar[bool] = True
    """Whether it reads the final tokens of its level."""

    weight: float
    level: int | None = None
    """The index of its level, None for the whole model."""
    compression: int = 0
    stride: int = 1
    placed: bool = False
    """Whether boundaries place its level."""

    @property
    def name(self) -> str:
        """Its name in `LossParts.named`: 'ce', or 'recon/8x'."""
        return self.kind if self.level is None else f'{self.kind}/{self.compression}x'

    @property
    def terms(self) -> int:
        """The number of means that its loss is made of, each with a count of its own."""
        return 1

    @classmethod
    def from_config(cls: type[O], config: Config) -> list[O]:
        """The objectives of this kind that a configuration asks for. Those with a weight of 0 are left out."""
        raise NotImplementedError

    @classmethod
    def per_level(cls: type[O], config: Config, weights: Sequence[float], **settings: object) -> list[O]:
        """One objective for each level whose weight is above 0."""
        return [
            cls(
                weight=weight,
                level=i,
                compression=level.compression,
                stride=level.stride,
                placed=level.is_placed,
                **settings,
            )
            for i, (level, weight) in enumerate(zip(config.levels, weights, strict=True))
            if weight > 0
        ]

    def modules(self, config: Config) -> dict[str, nn.Module]:
        """The modules that the model builds for it, by the names of `containers`."""
        return {}

    @property
    def targets_per_token(self) -> int:
        """The number of targets of each token of its level."""
        return 1

    @property
    def scale(self) -> float:
        """The factor of the loss for each of its `counts`: intended tokens of a placed level are counted as ids."""
        return self.compression / self.targets_per_token if self.placed else 1.0

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        """What is predicted. `pieces` are those of its level, if it is placed."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> list[Tensor]:
        """The number of targets of each of its `terms`, int64 scalars.

        The tokens of a placed level are known only after a pass. Its losses are sums over tokens, divided by the
        intended number of tokens. So it counts the ids with a label, and `scale` does the rest.
        """
        if self.placed:
            return [(batch.labels != batch.ignore_index).sum()] * self.terms
        return self.count(self.targets(batch))

    def count(self, targets: Targets) -> list[Tensor]:
        """The number of targets of each of its `terms`, where tokens have a fixed stride."""
        return [targets.counted.sum()]

    def divisors(self, batch: Batch, counts: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        """The given counts. Without them, its own where the mean over targets is not meant, otherwise None."""
        return self.counts(batch) if counts is None and self.placed else counts

    def targets_of(self, read: Read, batch: Batch) -> Targets:
        """The targets of what was read."""
        pieces = self.pieces(read)
        return self.targets(batch) if pieces is None else self.targets(batch, pieces)

    def pieces(self, read: Read) -> Pieces | None:
        """The pieces of its level, if it is placed."""
        return None if self.level is None or not self.placed else read.pieces[self.level]

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        """The loss before its weight, a scalar. With `counts`, sums are divided by those instead of their own."""
        raise NotImplementedError


class CrossEntropy(Objective):
    """An objective that is the cross entropy of a linear head."""

    def head(self, model: HierarchicalTransformer) -> nn.Module:
        """The map from tokens to logits."""
        raise NotImplementedError

    def tokens(self, model: HierarchicalTransformer, read: Read, batch: Batch) -> Tensor:
        """What the head reads, `(batch, tokens, dim)`."""
        assert self.level is not None
        return read.tokens[self.level]

    def sample(self, model: HierarchicalTransformer) -> float:
        """The share of tokens that the loss is computed from."""
        return 1.0

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        x, (values, ignored) = self.tokens(model, read, batch), self.targets_of(read, batch)
        divisors = self.divisors(batch, counts)
        count = None if divisors is None else divisors[0]
        loss = cross_entropy(x, self.head(model), values, ignored, count=count, sample=self.sample(model))
        return loss * self.scale if self.placed else loss


def past_windows(ids: Tensor, *, compression: int, stride: int, ignore_index: int, offset: int = 0) -> Tensor:
    """The ids in the window of each level token, `(batch, ceil((seq - offset) / stride), compression)`.

    ids: `(batch, seq)`. Windows that begin before the first id are filled with `ignore_index`.
    """
    return id_windows(F.pad(ids, (compression - 1, 0), value=ignore_index)[:, offset:], compression, stride)


def future_windows(labels: Tensor, *, compression: int, stride: int, ignore_index: int, offset: int = 0) -> Tensor:
    """The ids that follow each level token, `(batch, ceil((seq - offset) / stride), compression)`.

    labels: `(batch, seq)`, the id that follows each position. Windows that end after the last one are filled with
    `ignore_index`.
    """
    return id_windows(F.pad(labels, (0, compression - 1), value=ignore_index)[:, offset:], compression, stride)


def id_windows(ids: Tensor, size: int, stride: int) -> Tensor:
    """Windows of `size` ids, one every `stride`: `(batch, windows, size)`. None where `(batch, n)` has fewer."""
    return ids.unfold(1, size, stride) if ids.shape[1] >= size else ids.new_empty(ids.shape[0], 0, size)
