"""The cache of the last result."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from simple_hierarchical_transformer.ops.result_cache import ResultCache


def test_cache_returns_the_result_of_the_present_values() -> None:
    cache, called = ResultCache(), []

    def double(x: Tensor, factor: int) -> Tensor:
        called.append(factor)
        return x * factor

    x = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        for factor in (2, 2, 3, 2):
            assert torch.equal(cache(double, (x,), factor), x * factor)
        assert called == [2, 3, 2]
        x.data[1] = 5
        assert torch.equal(cache(double, (x,), 2), x * 2)
        # a copy is empty
        assert deepcopy(cache)._last is None
    # a result with a graph is not cached
    assert cache(double, (x,), 2).requires_grad
    assert len(called) == 5
    with torch.device('meta'):
        assert cache(double, (torch.ones(3),), 2).is_meta
