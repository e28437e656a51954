"""Models that several benchmarks measure, as arguments of the constructor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Settings = dict[str, Any]

# models of the published package 0.4.0
README_1 = 'README example 1'
README_PLAIN = 'README plain GPT'
README_3 = 'README example 3'
PUBLISHED_TRAIN = "published train.py's model"
PUBLISHED: dict[str, Settings] = {
    README_1: dict(
        num_tokens=20000, dim=512, depth=6, seq_len=2048, hierarchies=(1, 2, 8), window_sizes=(32, 64, None)
    ),
    README_PLAIN: dict(num_tokens=20000, dim=512, depth=8, seq_len=2048),
    README_3: dict(
        num_tokens=256,
        dim=(128, 256, 512, 1024),
        depth=8,
        seq_len=1024,
        ff_mult=(2, 2, 4, 4),
        dim_head=(16, 32, 64, 64),
        heads=(2, 4, 8, 8),
        hierarchies=(1, 2, 4, 16),
        hierarchical_stride=(1, 1, 1, 8),
        window_sizes=(16, 32, 64, None),
    ),
    PUBLISHED_TRAIN: dict(
        num_tokens=256, dim=1024, depth=8, seq_len=2048, hierarchies=(1, 2), window_sizes=(32, 64)
    ),
}  # fmt: skip
# changes that make a toy of any of them
TOY: Settings = dict(dim=32, depth=1, heads=2, dim_head=16, seq_len=64)


def flat_depth(depths: Sequence[int], strides: Sequence[int]) -> int:
    """Layers of a flat model that process as many tokens as all levels of a hierarchy do, rounded up."""
    return math.ceil(sum(depth / stride for depth, stride in zip(depths, strides, strict=True)))


def one_level(settings: Settings, depth: int, window: int | None) -> Settings:
    """The same model with only its finest resolution."""
    return {**settings, 'depth': depth, 'hierarchies': 1, 'hierarchical_stride': 1, 'window_sizes': window}
