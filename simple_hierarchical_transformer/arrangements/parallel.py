"""Levels side by side: all read the embeddings, and a merge follows every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..compressors import Source
from ..halting import AdaptiveHalting
from ..levels import Grid
from ..memory import BlockState, Memory
from ..merges import MergeState
from .base import Arrangement, LevelOutputs, MergeSpec, Request, checkpointed, compress, run_block

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer

# of each level
Blocks = list[BlockState | None]


class Parallel(Arrangement):
    def sources(self, config: Config) -> list[Source]:
        return [Source(config.dim_embed, level.compression, level.stride) for level in config.levels]

    def merges(self, config: Config) -> list[MergeSpec]:
        if len(config.levels) == 1:
            return []
        return [MergeSpec(range(len(config.levels)), config.receivers)] * config.layers

    def run(
        self, model: HierarchicalTransformer, ids: Tensor, embeds: Tensor, memory: Memory, request: Request
    ) -> LevelOutputs:
        inputs, codes = compress_all(model, embeds, memory)
        outputs = LevelOutputs(inputs, inputs, codes)
        self.run_layers(model, outputs, memory, request)
        return outputs

    def run_layers(
        self, model: HierarchicalTransformer, outputs: LevelOutputs, memory: Memory, request: Request
    ) -> None:
        """Runs all layers on `outputs.inputs`, and sets `outputs.tokens` and `outputs.pondered`."""
        tokens, last = outputs.inputs, len(model.layers) - 1
        halting = {int(j): cast(AdaptiveHalting, module) for j, module in model.halting.items()}
        pondered = {j: module.begin(tokens[j]) for j, module in halting.items()}
        # stopping early needs a look at the tokens. With a state, all layers have a next state; on 'meta' there is
        # nothing to look at, and a compiler cannot
        stops = len(pondered) == len(tokens) and memory.state is None and request.contributions is None
        stops = stops and not tokens[0].is_meta and not torch.compiler.is_compiling()
        merges = list(model.hierarchical_merges)
        for i in range(last + 1):
            before = tokens
            # a list of modules takes longer to make than a small layer to run
            modules = [model.layers[i], *merges[i : i + 1], model.step_embeds] if model.gradient_checkpointing else ()
            tokens, blocks, merge = checkpointed(model, modules, run_layer, model, i, tokens, memory, request)
            memory.put_blocks(i, blocks)
            memory.put_merge(i, merge)
            for j, module in halting.items():
                tokens[j], pondered[j] = module(before[j], tokens[j], pondered[j], i == last)
            if stops and not any(each.running.any() for each in pondered.values()):
                break
        outputs.tokens = [pondered[j].output if j in pondered else x for j, x in enumerate(tokens)]
        outputs.pondered = {j: each.cost for j, each in pondered.items()}


def run_layer(
    model: HierarchicalTransformer, i: int, tokens: list[Tensor], memory: Memory, request: Request
) -> tuple[list[Tensor], Blocks, MergeState | None]:
    """Every level's block and the merge of layer `i`, and their next states. It changes nothing in `memory`."""
    starts = [level.length(memory.position) for level in model.levels]
    results = [run_block(model, i, j, x, memory.block(i, j), starts[j]) for j, x in enumerate(tokens)]
    tokens, after = [x for x, _ in results], None
    if request.merge and len(model.hierarchical_merges):
        # the last merge need not add to tokens that are not used
        wanted = request.final_levels if i == len(model.layers) - 1 else None
        tokens, after = model.hierarchical_merges[i](
            tokens, memory.merge(i), memory.position, request.ablated, request.contributions, wanted
        )
    return tokens, [state for _, state in results], after


def compress_all(model: HierarchicalTransformer, embeds: Tensor, memory: Memory) -> tuple[list[Tensor], Tensor | None]:
    """Each level's tokens of embeddings, and the autoencoder's coarsest map if there is one."""
    levels = range(len(model.levels))
    if model.autoencoder is None:
        made = [compress(model, i, embeds, memory.embeds(i), memory.position) for i in levels]
        for i, (_, after) in enumerate(made):
            memory.put_embeds(i, after)
        return [x for x, _ in made], None
    maps, kept = model.autoencoder(embeds, [memory.embeds(i) for i in levels], memory.position)
    for i, state in enumerate(kept):
        memory.put_embeds(i, state)
    starts = [Grid(model.autoencoder.grids[i]).count(memory.position) for i in levels]
    return [compress(model, i, maps[i], None, starts[i])[0] for i in levels], maps[model.order[-1]]
