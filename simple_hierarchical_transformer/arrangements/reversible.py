"""Parallel levels of two streams each, whose layers the backward pass inverts: Gomez et al. 2017, arXiv 1707.04585."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..block import HierarchicalBlock
from ..memory import BlockState, Memory
from ..merges import Merge
from ..ops.coupling import Coupling, run_couplings, run_plainly
from ..ops.linear import has_hooks
from .base import LevelOutputs, Request
from .parallel import Parallel

if TYPE_CHECKING:
    from ..model import HierarchicalTransformer

Update = Callable[[list[Tensor]], list[Tensor]]


class Reversible(Parallel):
    """Mixers and merges read the second stream and add to the first. Feed-forwards do the reverse.

    Both streams start as the level's tokens, and their mean is the result.
    """

    def run_layers(
        self, model: HierarchicalTransformer, outputs: LevelOutputs, memory: Memory, request: Request
    ) -> None:
        check_hooks(model)
        levels = range(len(model.levels))
        # the first stream of level j is stream j
        second = [len(levels) + j for j in levels]
        couplings = []
        for i in range(len(model.layers)):
            for j in levels:
                block = model.block(i, j)
                if block.attn is not None:
                    modules = [block.attn, model.step_embeds]
                    fn = block_update(model, i, j, block.mixed, memory)
                    couplings.append(Coupling(fn, [second[j]], [j], modules))
                modules = [block.ff, model.step_embeds]
                couplings.append(Coupling(block_update(model, i, j, block.fed, memory), [j], [second[j]], modules))
            if request.merge and len(model.hierarchical_merges):
                merge = model.merge(i)
                wanted = request.final_levels if i == len(model.layers) - 1 else None
                fn = merge_update(i, merge, wanted, memory, request)
                couplings.append(Coupling(fn, second, merge.updated(wanted), [merge]))

        # run once where a call leaves more behind than updates. Replicas of nn.DataParallel do not know their weights
        once = memory.state is not None or request.contributions is not None or getattr(model, '_is_replica', False)
        run = run_plainly if once else partial(run_couplings, modules=[model.layers])
        streams = run(couplings, [*outputs.inputs, *outputs.inputs])
        outputs.tokens = [(streams[j] + streams[second[j]]) / 2 for j in levels]


def block_update(
    model: HierarchicalTransformer,
    i: int,
    j: int,
    part: Callable[..., tuple[Tensor, BlockState | None]],
    memory: Memory,
) -> Update:
    """What a part of the block of layer i and level j adds to a stream."""

    def fn(read: list[Tensor]) -> list[Tensor]:
        x = read[0]
        if model.step_embeds:
            x = x + model.step_embeds[j][i]
        start = model.levels[j].length(memory.position)
        update, after = model.block(i, j).within_phases(part, x, memory.latest_block(i, j), start)
        memory.put_block(i, j, after)
        return [update]

    return fn


def merge_update(i: int, merge: Merge, wanted: Collection[int] | None, memory: Memory, request: Request) -> Update:
    """What the merge of layer i adds to the streams of its recipients."""

    def fn(read: list[Tensor]) -> list[Tensor]:
        updates, after = merge.compute(
            read, memory.merge(i), memory.position, request.ablated, request.contributions, wanted
        )
        memory.put_merge(i, after)
        return updates

    return fn


def check_hooks(model: nn.Module) -> None:
    """Refuses hooks on blocks and merges, whose parts run without a call of the whole."""
    for name, module in model.named_modules():
        if isinstance(module, (HierarchicalBlock, Merge)) and has_hooks(module):
            raise ValueError(
                f'reversible layers run the parts of a block or merge by themselves, so hooks on {name} would not '
                'fire: register them on its parts'
            )
