"""Compiled steps that read a state: few graphs, and a state that grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import SMALL, STRIDED, THREE, build
from support.graphs import GraphCounter

from simple_hierarchical_transformer import memory as state_module

pytestmark = pytest.mark.slow


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=64)
def test_a_compiled_step_may_grow_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, 'ROOM', 4)
    model, graphs = build(dict(SMALL, depth=1, window_sizes=None, seq_len=32)), GraphCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    ids = torch.randint(0, 11, (2, 45))
    _, state = model(ids[:, :3], return_state=True)
    outs = []
    for at in range(3, 45):
        out, state = compiled(ids[:, at : at + 1], state=state, return_state=True)
        outs.append(out)
    whole, _ = model(ids, return_state=True)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole[:, 3:], rtol=0, atol=1e-10)
    assert graphs.count <= 8


def test_compiled_steps_consume_their_state() -> None:
    model, ids = build(dict(THREE, depth=1)), torch.randint(0, 11, (2, 20))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        _, after = compiled(ids[:, 9:10], state=state, return_state=True)
        assert state.consumed
        assert not after.consumed
        with pytest.raises(ValueError, match='state at position 9 was consumed'):
            model(ids[:, 9:], state=state, return_state=True)


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=32)
@pytest.mark.parametrize(
    'config',
    [dict(THREE, depth=1), dict(STRIDED, depth=1, merge='attention', merge_window=1, compressor='attention')],
    ids=['plain', 'attention'],
)
def test_compiled_steps_need_one_graph_per_phase(config: dict[str, Any]) -> None:
    model, graphs = build(config), GraphCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    ids = torch.randint(0, 11, (2, 32))
    _, state = model(ids[:, :3], return_state=True)
    outs, after = [], {}
    for at in range(3, ids.shape[1]):
        out, state = compiled(ids[:, at : at + 1], state=state, return_state=True)
        outs.append(out)
        after[at] = graphs.count
    # phases repeat after four or eight positions; the first graph treats its position as a constant
    assert 1 < after[19] == graphs.count <= 9
    whole, _ = model(ids, return_state=True)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole[:, 3:], rtol=0, atol=1e-10)
