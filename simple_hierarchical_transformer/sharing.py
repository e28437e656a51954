"""Weights that several levels share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, cast

from torch import nn

from .block import HierarchicalBlock

if TYPE_CHECKING:
    from .config import Config


def find_alike(name: str, what: str, kinds: Sequence[Hashable], takes_part: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs of a level and the first level of the same kind. Raises ValueError where there is none."""
    first: dict[Hashable, int] = {}
    pairs = [(i, first[kind]) for i, kind in enumerate(kinds) if takes_part[i] and first.setdefault(kind, i) != i]
    if not pairs:
        raise ValueError(f'{name} needs levels of equal {what}, got {list(kinds)}')
    return pairs


def share_between_levels(config: Config, layers: nn.ModuleList) -> None:
    """Shares attention weights and feed-forwards between blocks of the same layer, as the options ask for."""
    levels = config.levels

    def blocks_of(i: int, first: int) -> list[tuple[HierarchicalBlock, HierarchicalBlock]]:
        depth = min(levels[i].depth, levels[first].depth)
        rows = [cast(Sequence[HierarchicalBlock], layer) for layer in layers[:depth]]
        return [(row[i], row[first]) for row in rows]

    if config.share_attention:
        kinds = [
            (level.dim, level.heads, level.dim_head, level.window is None, *sorted(level.mixer_kwargs.items()))
            for level in levels
        ]
        attends = [level.mixer == 'attention' and level.mixes for level in levels]
        for i, first in find_alike('share_attention', 'dim, heads, dim_head and kind of window', kinds, attends):
            for block, other in blocks_of(i, first):
                block.share_attention(other)
    if config.share_feed_forward:
        sizes = [(level.dim, level.ff_dim) for level in levels]
        for i, first in find_alike('share_feed_forward', 'dim and ff_mult', sizes, [True] * len(levels)):
            for block, other in blocks_of(i, first):
                block.ff = other.ff
