"""Levels one inside the other: Hourglass, Nawrot et al. 2021, arXiv 2110.13711."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..boundaries import OF_BYTES
from ..compressors import Source
from ..generation.prompts import BYTE_VOCABULARIES
from ..levels import OWN
from ..memory import Memory, MemoryOfRows
from ..pieces import Frame, longest_piece, place, take
from ..rows import Rows
from .base import Arrangement, LevelOutputs, MergeSpec, Request, checkpointed, compress, run_block

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer


class Hourglass(Arrangement):
    """A level runs half of its layers, then the next coarser level on its tokens. It merges the result and goes on."""

    nested = True

    def check(self, config: Config) -> None:
        levels = [config.levels[i] for i in config.order]
        predicts = config.compressions[config.predict_level]
        if predicts != levels[0].compression:
            raise ValueError(
                f"arrangement = 'hourglass' predicts from its finest level, got predict_hierarchy {predicts!r}"
            )
        for finer, coarser in pairwise(levels):
            if not coarser.is_placed and coarser.stride < finer.stride:
                raise ValueError(
                    "hierarchical_stride must not fall from a level to a coarser one in arrangement = 'hourglass', got "
                    f'{finer.stride} for hierarchy {finer.compression} and {coarser.stride} for {coarser.compression}'
                )
        if config.merge_into != 'predict' or config.hierarchy_merge_all:
            raise ValueError(
                "merge_into is for arrangement = 'parallel': in an hourglass, levels receive from the next coarser"
            )
        check_boundaries(config)

    def sources(self, config: Config) -> list[Source]:
        finest = config.levels[config.order[0]]
        sources = {config.order[0]: Source(config.dim_embed, finest.compression, finest.stride)}
        for i, j in pairwise(config.order):
            finer, coarser = config.levels[i], config.levels[j]
            if coarser.is_placed:
                # the tokens are picked before
                sources[j] = Source(finer.dim, taps=1, stride=1)
                continue
            sources[j] = Source(
                finer.dim,
                taps=coarser.compression // finer.compression,
                stride=coarser.stride // finer.stride,
                dilation=finer.phases,
            )
        return [sources[i] for i in range(len(config.levels))]

    def merges(self, config: Config) -> list[MergeSpec]:
        def stride(i: int, j: int) -> int:
            # a merge gets the tokens of a placed level at each finer token
            return 1 if config.levels[j].is_placed else config.levels[j].stride // config.levels[i].stride

        return [MergeSpec((i, j), [0], [1, stride(i, j)]) for i, j in pairwise(config.order)]

    def run(
        self, model: HierarchicalTransformer, ids: Tensor, embeds: Tensor, memory: Memory, request: Request
    ) -> LevelOutputs:
        outputs = LevelOutputs([embeds] * len(model.levels), [embeds] * len(model.levels))
        Nested(model, ids, memory, request, outputs).run_level(0, embeds, memory.position)
        if request.contributions is not None:
            # inner merges run first, and outer ones are listed first. A copy: layers that are recomputed append again
            request.contributions[:] = request.contributions[::-1]
        return outputs


@dataclass
class Nested:
    """One pass through nested levels."""

    model: HierarchicalTransformer
    ids: Tensor
    memory: Memory
    request: Request
    outputs: LevelOutputs

    def run_level(self, k: int, finer: Tensor, start: int) -> Tensor:
        """The k-th finest level with all inside it, on finer tokens of which the first has index `start`."""
        i, memory = self.model.order[k], self.memory
        x, after = compress(self.model, i, finer, memory.embeds(i), start)
        memory.put_embeds(i, after)
        return self.run_layers(k, x, self.model.levels[i].length(memory.position))

    def run_placed(self, k: int, finer: Tensor, frame: Frame) -> Tensor:
        """Like `run_level` for a placed level, on finer tokens that stand at `frame`.

        Returns what the merge gets of the level at each of the finer tokens.
        """
        model, i = self.model, self.model.order[k]
        level, before, key = model.levels[i], self.memory.placed(i), str(i)
        # the intended number of finer tokens in a piece. On 'meta', where none are counted, it may have been measured
        j = model.order[k - 1]
        spacing = level.spacing / model.levels[j].spacing
        if finer.is_meta:
            spacing = model.spacing(i) / model.spacing(j)
        longest = longest_piece(level, model.levels[j])
        pieces, after = place(
            model.boundaries[key], spacing, finer, self.ids, frame, before,
            longest=longest, position=self.memory.position,
        )  # fmt: skip
        self.outputs.pieces[i] = pieces
        picked, down = take(finer, pieces.at), None
        if key in model.downsamplers:
            picked, down = model.downsamplers[key](finer, pieces, before and before.down)
        few = None
        if isinstance(pieces.start, Rows) and k + 1 == len(model.order) and not torch.is_grad_enabled():
            few = pieces.start.with_tokens(pieces.at.shape[1])
        if few is None:
            x, _ = compress(model, i, picked, None, 0)
            x = self.run_layers(k, x, pieces.start, pieces.frame)
        else:
            x = self.run_few(k, picked, *few)
        x, up = model.upsamplers[key](x, pieces, before and before.up)
        self.memory.put_placed(i, after and replace(after, down=down or (), up=up))
        return x

    def run_few(self, k: int, picked: Tensor, members: Tensor, start: Rows | int) -> Tensor:
        """The layers of the innermost level, which is placed, for the rows in `members` alone. Others have no tokens.

        In a batch that generates, few rows meet a boundary at the same step.
        """
        i = self.model.order[k]
        outputs = LevelOutputs(list(self.outputs.inputs), list(self.outputs.tokens))
        few = replace(self, memory=MemoryOfRows(self.memory, members), outputs=outputs)
        x, _ = compress(self.model, i, picked.index_select(0, members), None, 0)
        x = few.run_layers(k, x, start)
        for mine, theirs in ((self.outputs.inputs, outputs.inputs), (self.outputs.tokens, outputs.tokens)):
            part = theirs[i]
            mine[i] = part.new_zeros(len(picked), *part.shape[1:]).index_copy(0, members, part)
        return self.outputs.tokens[i]

    def run_layers(self, k: int, x: Tensor, start: int | Rows, frame: Frame | None = None) -> Tensor:
        """The layers of the k-th finest level with all inside it, on its tokens x. The first has index `start`.

        `frame` is given for a placed level.
        """
        model, memory, request = self.model, self.memory, self.request
        i = model.order[k]
        level = model.levels[i]
        self.outputs.inputs[i] = x
        for layer in range(level.depth):
            if layer == level.depth // 2 and k + 1 < len(model.order):
                if not model.levels[model.order[k + 1]].is_placed:
                    assert isinstance(start, int)
                    inner = self.run_level(k + 1, x, start)
                else:
                    frame = Frame.of_grid(level.grid, memory.position, self.ids) if frame is None else frame
                    inner = self.run_placed(k + 1, x, frame)
                if request.merge:
                    merge = model.hierarchical_merges[k]
                    # rows of a placed level have no common index, and its merge needs none
                    at = start if isinstance(start, int) else 0
                    (x, _), state = checkpointed(
                        model, [merge], merge, [x, inner], memory.merge(k), at, request.ablated, request.contributions
                    )
                    memory.put_merge(k, state)
            modules = [model.block(layer, i), model.step_embeds]
            x, block = checkpointed(model, modules, run_block, model, layer, i, x, memory.block(layer, i), start)
            memory.put_block(layer, i, block)
        self.outputs.tokens[i] = x
        return x


def check_boundaries(config: Config) -> None:
    """Raises ValueError where options of placed levels are not allowed."""
    levels = [config.levels[i] for i in config.order]
    placed = [level for level in levels if level.is_placed]
    for name, default in (('max_piece', None), ('downsample', 'token'), ('upsample', 'repeat')):
        given = getattr(config, name)
        for level, value in zip(config.levels, config.values(name), strict=True):
            # one value for all is that of the placed levels
            if value != default and not level.is_placed and (not placed or isinstance(given, (tuple, list))):
                raise ValueError(
                    f'{name} is for levels with boundaries, got {value!r} for hierarchy {level.compression}'
                )
    if placed and levels[0].is_placed:
        raise ValueError(
            f'boundaries must be None for the finest hierarchy, {levels[0].compression}, got {levels[0].boundaries!r}'
        )
    for finer, level in pairwise(levels):
        c = level.compression
        if finer.is_placed and not level.is_placed:
            raise ValueError(
                f'boundaries must place hierarchy {c} too, which is inside placed hierarchy {finer.compression}: '
                "'every' has one token for a fixed number of finer tokens. Got None"
            )
        if not level.is_placed:
            continue
        if level.stride != 1:
            raise ValueError(
                f'hierarchical_stride must be 1 for a level with boundaries, got {level.stride} for hierarchy {c}'
            )
        intended = level.spacing / finer.spacing
        if level.max_piece is not None and level.max_piece < intended:
            raise ValueError(
                f'max_piece must be at least the intended number of finer tokens, {intended:g}, got {level.max_piece} '
                f'for hierarchy {c}'
            )
        if isinstance(config.compressor, (tuple, list)) and level.compressor != 'conv':
            raise ValueError(
                f"compressor must be 'conv', the default, for a level with boundaries, which has downsample in its "
                f'place, got {level.compressor!r} for hierarchy {c}'
            )
        if level.boundaries in OF_BYTES and config.num_tokens not in BYTE_VOCABULARIES:
            raise ValueError(
                f'boundaries {level.boundaries!r} reads ids as bytes: num_tokens must be 256, 257 or 258, got '
                f'{config.num_tokens}'
            )
        if level.boundaries == 'every' and level.spacing % finer.spacing:
            raise ValueError(
                f"hierarchies must be multiples of the next finer one, {finer.spacing}, with boundaries = 'every', "
                f'got {c}'
            )
        if level.upsample == 'smooth' and level.boundaries not in ('learned', OWN):
            raise ValueError(
                "upsample = 'smooth' needs boundaries with probabilities, 'learned' or a module, got "
                f'{level.boundaries!r} for hierarchy {c}'
            )
        if finer.is_placed and config.merge_window:
            raise ValueError(
                f'merge_window must be 0 where a placed hierarchy is inside another, as {c} in {finer.compression}, '
                f'got {config.merge_window}'
            )
