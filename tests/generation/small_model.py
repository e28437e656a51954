"""The model that tests of generation share."""

from __future__ import annotations

from simple_hierarchical_transformer import HierarchicalTransformer


def model() -> HierarchicalTransformer:
    return HierarchicalTransformer(
        num_tokens=11, dim=8, depth=1, seq_len=24, dim_head=4, heads=2, hierarchies=(1, 4), window_sizes=(2, None)
    )
