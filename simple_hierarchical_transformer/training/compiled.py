"""torch.compile for training."""

from __future__ import annotations

from typing import Any

from ..block import HierarchicalBlock
from ..model import HierarchicalTransformer


def compile_blocks(model: HierarchicalTransformer, **settings: Any) -> None:
    """Compiles the blocks of a model in place. Each compiles at its next call.

    All blocks of a level run the same compiled code, so the compiler runs once for each level. If the whole model were
    compiled, it would run once for each layer. Little work is left between blocks.

    Args:
        model: the model. Its weights keep their names.
        settings: further arguments of `torch.compile`.
    """
    for block in model.modules():
        if isinstance(block, HierarchicalBlock):
            # reversible layers call the parts of a block separately
            parts: list[Any] = [block.attn, block.ff] if model.reversible else [block]
            for part in parts:
                if part is not None:
                    part.compile(**settings)
