"""The memory of a state grows with the tokens that were read, up to its bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import SEQ_LEN, SMALL, STRIDED, THREE, build, in_chunks

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer import memory as state_module
from simple_hierarchical_transformer.memory import room_for

GROWS: dict[str, dict[str, Any]] = {
    'three': THREE,
    'strided': STRIDED,
    'recall': dict(STRIDED, recall=(2, 3), word_recall=(1,), num_tokens=256),
    'hyena': dict(THREE, mixer=('attention', 'hyena', 'hyena'), window_sizes=(30, None, None)),
    'reversible': dict(THREE, reversible=True),
    'patterns': dict(STRIDED, window_sizes=None, mixer_kwargs=dict(pattern='fixed', pattern_mode='union', stride=4)),
    'hourglass': dict(STRIDED, arrangement='hourglass'),
}


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('splits', [[1], [3, 1, 1, 9, 1], [40, 1, 1]])
@pytest.mark.parametrize('config', GROWS.values(), ids=GROWS)
def test_a_growing_state_equals_one_pass(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], splits: list[int], grad: bool
) -> None:
    model, ids = build(dict(config, depth=1)), torch.randint(0, 11, (2, 3 * SEQ_LEN))
    with torch.set_grad_enabled(grad):
        whole, full = model(ids, return_state=True)
        monkeypatch.setattr(state_module, 'ROOM', 2)
        begun = model.initial_state(2)
        assert begun.nbytes < full.nbytes
        chunked, state = in_chunks(model, ids, splits)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-8)
    assert state.nbytes == full.nbytes


@pytest.mark.parametrize(
    'config',
    [
        {},
        dict(hierarchies=(1, 4), window_sizes=('auto', None)),
        dict(recall=(2, 3), window_sizes=0),
        dict(mixer_kwargs=dict(pattern='strided', stride=8)),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_size_of_a_state_follows_the_tokens_read(config: dict[str, Any]) -> None:
    model = HierarchicalTransformer(**{**SMALL, 'depth': 1, 'seq_len': 10**9, **config})
    ids = torch.randint(0, 11, (1, 3000))
    _, state = model(ids[:, :1], return_state=True)
    first = state.nbytes
    assert first < 1_000_000
    for at in range(1, 3000, 500):
        _, state = model(ids[:, at : at + 500], state=state, return_state=True)
    # at most twice the size of the tokens read, above the initial room
    assert first < state.nbytes <= 8 * first
    assert model.generate(ids[:, :5], 3).shape == (1, 3)


@pytest.mark.parametrize(('tokens', 'limit'), [(0, 5), (0, 10**9), (1024, 2049), (1026, 2049), (10**9, 10**9)])
def test_room_is_at_most_twice_the_tokens_needed(tokens: int, limit: int) -> None:
    room = room_for(tokens, limit)
    assert min(tokens, limit) <= room <= limit
    assert room < 2 * max(tokens, state_module.ROOM) + 1
