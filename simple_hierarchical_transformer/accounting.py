"""What the model declares about its weights, for optimizers and cost counters (`training.roles`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, cast

from torch import nn

from .arrangements import arrangement_of
from .objectives import OBJECTIVES

if TYPE_CHECKING:
    from .model import HierarchicalTransformer


class Accountable:
    """The roles of a model's weights, the level of each part, and how many tokens a part processes."""

    roles: ClassVar[Mapping[str, str]] = dict(
        token_emb='lookup',
        step_embeds='lookup',
        halting='head',
        to_logits='head',
        **{name: role for kind in OBJECTIVES for name, role in kind.containers.items() if role is not None},
    )

    measured_spacing: dict[int, float]
    """The mean number of ids from one token to the next as measured, by the index of a placed level. Empty at first.

    Costs and plans on 'meta' use it in place of the intended mean, `Level.spacing`.
    """

    def spacing(self, i: int) -> float:
        """The number of ids from one token of level i to the next. If it is placed, the measured or intended mean."""
        model = cast('HierarchicalTransformer', self)
        return self.measured_spacing.get(i, model.levels[i].spacing)

    def by_level(self) -> Iterator[tuple[nn.Module | nn.Parameter, int]]:
        """The parts that belong to one level each, and its index. Shared parts come once for each level."""
        model = cast('HierarchicalTransformer', self)
        layers = cast('list[nn.ModuleList]', model.layers)
        lists = [model.compressors, model.post_token_emb_norms, *layers, model.norms]
        # keyed by level, as the modules of objectives are
        named = [part for part in model.children() if isinstance(part, nn.ModuleDict)]
        if model.autoencoder is not None:
            named += [model.autoencoder.encoders, model.autoencoder.decoders]
        for i in range(len(model.levels)):
            yield from ((parts[i], i) for parts in lists if parts[i] is not None)
            yield from ((parts[str(i)], i) for parts in named if str(i) in parts)
            if len(model.step_embeds):
                yield model.step_embeds[i], i

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module | nn.Parameter, float]]:
        """How many tokens parts process when the model reads n ids. Parts that are not named process n."""
        model = cast('HierarchicalTransformer', self)
        yield from ((part, n / self.spacing(i)) for part, i in self.by_level())
        if arrangement_of(model).nested:
            for i, j in pairwise(model.order):
                # these read finer tokens
                for parts in (model.boundaries, model.downsamplers):
                    if str(j) in parts:
                        yield parts[str(j)], n / self.spacing(i)
            # a merge counts tokens of the finer of its two levels
            for i, merge in zip(model.order, model.hierarchical_merges, strict=False):
                yield merge, n / self.spacing(i)
