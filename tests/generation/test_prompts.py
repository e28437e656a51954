"""The types of prompts, ids and settings that generation accepts, and what it refuses."""

from __future__ import annotations

import re
from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_model import model

from simple_hierarchical_transformer import HierarchicalTransformer

INTS: dict[str, Callable[[list[int]], Any]] = {
    'list': list,
    'tuple': tuple,
    'set': set,
    'generator': iter,
    'tensor': torch.tensor,
    'short tensor': lambda ids: torch.tensor(ids, dtype=torch.int16),
    'array': np.array,
    'bytes of an array': lambda ids: np.array(ids, dtype=np.uint8),
    'array backwards': lambda ids: np.array(ids)[::-1],
    'list of numpy integers': lambda ids: [np.int64(i) for i in ids],
    'list of tensors': lambda ids: [torch.tensor(i) for i in ids],
    'sequence of another kind': UserList,
}


@pytest.mark.parametrize('kind', INTS.values(), ids=INTS)
@pytest.mark.parametrize('count', [0, 1, 2])
def test_stop_ids_can_be_ints_of_any_type(kind: Callable[[list[int]], Any], count: int) -> None:
    net, prompt = model(), torch.ones(1, 3, dtype=torch.long)
    settings: dict[str, Any] = dict(filter_thres=0.0, seq_len=24)

    def draw(**stops: Any) -> list[int]:
        return net.generate(prompt, **settings, **stops, generator=torch.Generator().manual_seed(0))[0].tolist()

    free = draw()
    late = sorted(set(free), key=free.index)[-count:] if count else []
    end = min(map(free.index, late), default=23)
    assert draw(stop_ids=kind(late)) == free[: end + 1]
    pieces = net.stream(prompt, **settings, stop_ids=kind(late), generator=torch.Generator().manual_seed(0))
    assert torch.cat(list(pieces)).tolist() == free[: end + 1]


@pytest.mark.parametrize('kind', [int, np.int64, np.uint8, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_single_ints_can_have_any_type(kind: Callable[[int], Any]) -> None:
    net, prompt = model(), torch.ones(2, 3, dtype=torch.long)
    free = net.generate(prompt, 20, temperature=0)
    last = free[0, -1].item()
    stopped = net.generate(prompt, kind(20), temperature=0, stop_ids=kind(last))
    assert stopped[0].tolist() == free[0, : free[0].tolist().index(last) + 1].tolist()
    assert net.generate(prompt, max_new_tokens=kind(5), top_k=kind(1)).shape == (2, 5)
    assert net.score(prompt, chunk_size=kind(1)) == pytest.approx(net.score(prompt))
    _, state = net(prompt, return_state=True)
    assert state.select(kind(1)).batch_size == 1
    assert net.initial_state(kind(3)).batch_size == 3


def test_prompts_rows_and_ids_can_be_sequences_of_any_type() -> None:
    net, ids = model(), torch.randint(0, 11, (2, 5))
    expected, score = net.generate(ids, 6, temperature=0), net.score(ids)
    _, state = net(ids, return_state=True)
    for each in (
        ids.tolist(),
        ids.numpy(),
        ids.numpy().astype(np.uint16),
        list(ids),
        list(ids.numpy()),
        [*map(UserList, ids.tolist())],
    ):
        assert torch.equal(net.generate(each, 6, temperature=0), expected)
    for each in (ids.tolist(), ids.numpy(), UserList(ids.tolist())):
        assert net.score(each) == score
    assert net.score(ids[0].tolist()) == net.score(ids[0])
    unequal = [ids[0, :2].tolist(), ids[1].numpy()]
    assert torch.equal(net.generate(unequal, 6, temperature=0)[1], expected[1])
    for rows in (
        [1, 0],
        (1, 0),
        np.array([0, 1])[::-1],
        np.array([1, 0], dtype=np.int16),
        torch.tensor([1, 0]).to(torch.uint8),
    ):
        assert torch.equal(state.select(rows).blocks[0][0].ff_shift, state.select([1, 0]).blocks[0][0].ff_shift)


@pytest.mark.parametrize(
    ('prompt', 'settings', 'message'),
    [
        ('', {}, 'prompt must hold at least one token'),
        (['a', b'a'], {}, 'prompt must hold rows of one kind, got bytes and str'),
        (['a', [1]], {}, 'prompt must hold rows of one kind, got list and str'),
        ('\ud900', {}, 'prompt must be text that UTF-8 can encode'),
        ([1, 2], {}, 'prompt must have shape (batch, seq), got (2,)'),
        ([[1, 2], [1, 2.5]], {}, 'prompt must be a tensor of integers, got torch.float32'),
        ([[1, 2], [1, 999]], {}, 'prompt must be in [0, 256), got values from 1 to 999'),
        (3, {}, 'prompt must be a tensor of integers, got int'),
        ('a', dict(stop=''), "stop must be strings or bytes that are not empty, got ''"),
        ('a', dict(stop=[b'a', 3]), 'stop must be strings or bytes that are not empty, got 3'),
        ('a', dict(stop=3), 'stop must be a str, bytes, or several of them, got 3'),
        ('a', dict(stop_ids='a'), "stop_ids must be integers in [0, 256), got 'a'"),
        ('a', dict(stop_ids=[True]), 'stop_ids must be in [0, 256), got True'),
        ('a', dict(stop_ids=torch.tensor([1.0])), 'stop_ids must be in [0, 256), got 1.0'),
        ('a', dict(stop_ids=[[1]]), 'stop_ids must be in [0, 256), got [1]'),
        ('a', dict(stop_ids=256), 'stop_ids must be in [0, 256), got 256'),
        ('a', dict(repetition_penalty=0), 'repetition_penalty must be above 0, got 0'),
        ('a', dict(repetition_penalty=-1.0), 'repetition_penalty must be a finite number of at least 0, got -1.0'),
        ('a', dict(seq_len=None), 'seq_len or max_new_tokens must be given, and not both, got None and None'),
        ('a', dict(max_new_tokens=3), 'seq_len or max_new_tokens must be given, and not both, got 2 and 3'),
        ('a', dict(seq_len=None, max_new_tokens=-3), 'max_new_tokens must be an integer of at least 0, got -3'),
    ],
    ids=repr,
)  # fmt: skip
def test_refuses_prompts_and_settings_that_are_not_allowed(prompt: Any, settings: dict[str, Any], message: str) -> None:
    net = HierarchicalTransformer(num_tokens=256, dim=8, depth=1, dim_head=4, heads=1, window_sizes=2)
    for draw in (net.generate, net.stream):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(prompt, **{'seq_len': 2, **settings})


def test_text_needs_a_model_of_bytes() -> None:
    for prompt, settings, name in (('a', {}, 'prompt'), (torch.ones(1, 2).long(), dict(stop='a'), 'stop')):
        message = f'{name} can be text only if num_tokens is 256, 257 or 258, got 11'
        with pytest.raises(ValueError, match=message):
            model().generate(prompt, 2, **settings)


@pytest.mark.parametrize('wrong', [dict(generator=3), dict(use_cache='no')], ids=str)
def test_a_setting_of_the_wrong_type_is_named(wrong: dict[str, Any]) -> None:
    model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, seq_len=16, heads=2, dim_head=4)
    (name,) = wrong
    with pytest.raises(ValueError, match=f'{name} must be'):
        model.generate(torch.ones(1, 2, dtype=torch.long), 2, **wrong)


def test_stream_refuses_unknown_settings() -> None:
    for name in ('return_state', 'top_q'):
        with pytest.raises(ValueError, match=f'stream takes the settings of generate except return_state, got {name}'):
            model().stream(torch.ones(1, 3, dtype=torch.long), 4, **{name: True})
