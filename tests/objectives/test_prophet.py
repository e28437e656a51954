"""The prophet loss."""

from __future__ import annotations

import pytest

from simple_hierarchical_transformer import HierarchicalTransformer


def test_a_prophet_loss_that_repeats_the_cross_entropy_is_not_built() -> None:
    with pytest.warns(UserWarning, match='prophet_loss_weight builds nothing'):
        model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, prophet_loss_weight=0.1)
    assert 'prophet/1x' not in model.loss_weights
