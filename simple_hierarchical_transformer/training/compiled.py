"""torch.compile for training."""

from __future__ import annotations

from typing import Any

from ..block import HierarchicalBlock
from ..model import HierarchicalTransformer


def compile_blocks(model: HierarchicalTransformer, **settings: Any) -> None:
    """Has blocks run compiled, from their next call on.

    Blocks of a level are alike, so the compiler works once for each level, and not once for each layer as it would for
    the whole model. What is left between blocks is little.

    Args:
        model: whose blocks. Weights keep their names.
        settings: what `torch.compile` takes.
    """
    for block in model.modules():
        if isinstance(block, HierarchicalBlock):
            # reversible layers call the parts of a block
            parts: list[Any] = [block.attn, block.ff] if model.reversible else [block]
            for part in parts:
                if part is not None:
                    part.compile(**settings)
