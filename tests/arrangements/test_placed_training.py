"""Training steps of models with placed levels."""

from __future__ import annotations

import math

import pytest
import torch
from support.placed import PLACED

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Surprise
from simple_hierarchical_transformer.resampling import UPSAMPLERS


@pytest.mark.parametrize('downsample', ['token', 'attention'])
@pytest.mark.parametrize('upsample', [name for name in UPSAMPLERS if name != 'smooth'])
@pytest.mark.parametrize('inner', ['sentences', 'learned', 'every'])
def test_a_chunk_without_tokens_gives_each_weight_a_gradient(inner: str, upsample: str, downsample: str) -> None:
    """DDP and FSDP wait for one."""
    model = HierarchicalTransformer(
        **PLACED, boundaries=(None, 'words', inner), upsample=upsample, downsample=downsample
    )
    state = None
    for text in (b'two words', b'inaword'):
        model.zero_grad()
        ids = torch.tensor([list(text)] * 2)
        loss, parts, state = model(ids, return_loss=True, return_state=True, state=state and state.detach())
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert parts.named['pieces/8x'] == 0


def test_a_batch_that_is_not_finite_does_not_move_the_threshold() -> None:
    rule = Surprise(8, 16, 4).train()
    x, ids, index = torch.randn(2, 9, 8), torch.zeros(2, 9, dtype=torch.long), torch.arange(8).expand(2, -1)
    rule(x, ids, index)
    before = rule.threshold.item()
    assert math.isfinite(before)
    rule(x * math.nan, ids, index)
    assert rule.threshold.item() == before
