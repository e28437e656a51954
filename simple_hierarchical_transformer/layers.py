"""The layers of a model, and the weights that blocks share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from torch import nn

from .arrangements import MergeSpec, arrangement_of
from .block import HierarchicalBlock
from .boundaries import BOUNDARIES, Finer
from .merges import MERGES, Merge
from .resampling import UPSAMPLERS, build_downsampler

if TYPE_CHECKING:
    from .config import Config


def build_layers(config: Config) -> nn.ModuleList:
    """All layers. With `share_layers`, they are one."""
    if config.share_layers:
        return nn.ModuleList([build_layer(config, 0)] * config.layers)
    return nn.ModuleList(build_layer(config, i) for i in range(config.layers))


def build_layer(config: Config, number: int) -> nn.ModuleList:
    """The blocks of a layer, one for each level. A level of less depth has None."""
    blocks = (
        HierarchicalBlock(
            level,
            length=level.longest(config.seq_len),
            layer=number,
            attn_backend=config.attn_backend,
            residual=config.residual,
            ff_activation=config.ff_activation,
            ff_chunks=config.ff_chunks,
        )
        if number < level.depth
        else None
        for level in config.levels
    )
    return nn.ModuleList(blocks)  # type: ignore[arg-type]


def build_merges(config: Config, specs: Sequence[MergeSpec]) -> list[Merge]:
    """The merges that an arrangement needs. With `share_layers`, those of parallel levels are one."""

    def build(spec: MergeSpec) -> Merge:
        members = [config.levels[i] for i in spec.members]
        return MERGES[config.merge](members, spec.recipients, spec.strides, window=config.merge_window)

    if specs and config.share_layers and not arrangement_of(config).nested:
        return [build(specs[0])] * len(specs)
    return [build(spec) for spec in specs]


def build_placements(config: Config) -> dict[int, tuple[nn.Module, nn.Module | None, nn.Module]]:
    """The rule, the downsampler and the upsampler of each placed level, by its index."""
    placements = {}
    for i, j in pairwise(config.order):
        finer, level = config.levels[i], config.levels[j]
        if level.boundaries is None:
            continue
        rule = config.rules[j]
        if rule is None:
            about = Finer(finer.dim, config.num_tokens, level.spacing / finer.spacing)
            rule = BOUNDARIES[level.boundaries](about)
        placements[j] = rule, build_downsampler(level, finer.dim), UPSAMPLERS[level.upsample](level.dim)
    return placements


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


def make_buffers(module: nn.Module) -> None:
    """Turns a module's parameters into buffers: they are still saved and loaded, but not trained."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
