"""Levels and their windows."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.configs import SEQ_LEN, SMALL, build

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.mark.filterwarnings('error')
def test_auto_window_is_half_of_the_level() -> None:
    model = HierarchicalTransformer(
        num_tokens=11, dim=8, depth=1, seq_len=48,
        hierarchies=(1, 4, 16, 32, 64), window_sizes=('auto', 'auto', None, 'auto', 'auto'),
    )  # fmt: skip
    assert [level.window for level in model.levels] == [24, 6, None, 1, None]


def test_window_beyond_the_level_is_full_attention() -> None:
    ids = torch.randint(0, 11, (2, SEQ_LEN))
    with pytest.warns(UserWarning, match=r'window_sizes: 13 exceeds the 12 tokens that hierarchy 4 has'):
        wide = build(dict(SMALL, hierarchies=(1, 4), window_sizes=(4, 13)))
    full = build(dict(SMALL, hierarchies=(1, 4), window_sizes=(4, None)))
    assert torch.equal(wide(ids), full(ids))

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exact = HierarchicalTransformer(**SMALL, hierarchies=(1, 4), window_sizes=(4, 12))
    assert exact.levels[1].window == 12
