"""Levels one inside the other: Hourglass, Nawrot et al. 2021, arXiv 2110.13711."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from ..compressors import Source
from ..memory import Memory
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
            if coarser.stride < finer.stride:
                raise ValueError(
                    "hierarchical_stride must not fall from a level to a coarser one in arrangement = 'hourglass', got "
                    f'{finer.stride} for hierarchy {finer.compression} and {coarser.stride} for {coarser.compression}'
                )
        if config.merge_into != 'predict' or config.hierarchy_merge_all:
            raise ValueError(
                "merge_into is for arrangement = 'parallel': in an hourglass, levels receive from the next coarser"
            )

    def sources(self, config: Config) -> list[Source]:
        finest = config.levels[config.order[0]]
        sources = {config.order[0]: Source(config.dim_embed, finest.compression, finest.stride)}
        for i, j in pairwise(config.order):
            finer, coarser = config.levels[i], config.levels[j]
            sources[j] = Source(
                finer.dim,
                taps=coarser.compression // finer.compression,
                stride=coarser.stride // finer.stride,
                dilation=finer.phases,
            )
        return [sources[i] for i in range(len(config.levels))]

    def merges(self, config: Config) -> list[MergeSpec]:
        return [
            MergeSpec((i, j), [0], [1, config.levels[j].stride // config.levels[i].stride])
            for i, j in pairwise(config.order)
        ]

    def run(self, model: HierarchicalTransformer, embeds: Tensor, memory: Memory, request: Request) -> LevelOutputs:
        outputs = LevelOutputs([embeds] * len(model.levels), [embeds] * len(model.levels))
        self.run_level(model, 0, embeds, memory.position, memory, request, outputs)
        if request.contributions is not None:
            # inner merges run first, and outer ones are listed first. A copy: layers that are recomputed append again
            request.contributions[:] = request.contributions[::-1]
        return outputs

    def run_level(
        self,
        model: HierarchicalTransformer,
        k: int,
        finer: Tensor,
        start: int,
        memory: Memory,
        request: Request,
        outputs: LevelOutputs,
    ) -> Tensor:
        """The k-th finest level with all inside it, on finer tokens of which the first has index `start`."""
        i = model.order[k]
        level = model.levels[i]
        x, after = compress(model, i, finer, memory.embeds(i), start)
        memory.put_embeds(i, after)
        outputs.inputs[i] = x
        start = level.length(memory.position)
        for layer in range(level.depth):
            if layer == level.depth // 2 and k + 1 < len(model.order):
                inner = self.run_level(model, k + 1, x, start, memory, request, outputs)
                if request.merge:
                    merge = model.hierarchical_merges[k]
                    (x, _), state = checkpointed(
                        model, [merge], merge, [x, inner], memory.merge(k), start, request.ablated,
                        request.contributions,
                    )  # fmt: skip
                    memory.put_merge(k, state)
            modules = [model.block(layer, i), model.step_embeds]
            x, block = checkpointed(
                model, modules, run_block, model, layer, i, x, memory.block(layer, i), memory.position
            )
            memory.put_block(layer, i, block)
        outputs.tokens[i] = x
        return x
