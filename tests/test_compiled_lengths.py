"""One compiled graph serves many lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import build
from support.exported import ONE_LEVEL, RECIPE, words
from support.graphs import GraphCounter

pytestmark = pytest.mark.slow


@torch._dynamo.config.patch(recompile_limit=32)
@pytest.mark.parametrize(
    ('config', 'most'),
    [
        ({**RECIPE, 'word_ngrams': (), 'word_recall': ()}, 4),
        # one graph per size of a block or of a Fourier transform, not per length
        (dict(ONE_LEVEL, mixer='gateloop'), 8),
        (dict(ONE_LEVEL, mixer='s4d', mixer_kwargs=dict(state_dim=8)), 14),
    ],
    ids=['recipe', 'gateloop', 's4d'],
)
def test_few_graphs_serve_all_lengths(config: dict[str, Any], most: int) -> None:
    model, graphs = build(config), GraphCounter()
    compiled = torch.compile(model, backend=graphs, dynamic=True, fullgraph=True)
    for n in range(6, 126, 10):
        # even and odd lengths, multiples of the phases or not, shorter and longer than a block of queries
        ids = words(2, n + n // 6 % 4)
        torch.testing.assert_close(compiled(ids, return_loss=True)[0], model(ids, return_loss=True)[0])
    assert graphs.count <= most
