"""Chunks of any lengths give what one pass gives."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from contracts.matrix import MATRIX, TRAINED, build_case, ids_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.configs import SEQ_LEN, STRIDED, THREE, build, configs, in_chunks
from support.golden import Golden
from support.placed import read_in_chunks, tokens_by_row

from simple_hierarchical_transformer import memory as state_module

READS = [
    *(pytest.param(config, False, id=name) for name, config in MATRIX.items()),
    *(pytest.param(config, True, id=f'{name}, with gradients') for name, config in TRAINED.items()),
]
SPLITS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(config=configs(), n=st.integers(1, SEQ_LEN), splits=SPLITS, grad=st.booleans())
@example(config=THREE, n=SEQ_LEN, splits=[1], grad=False)
@example(config=STRIDED, n=SEQ_LEN, splits=[3, 1, 7], grad=True)
def test_chunks_of_random_models_equal_one_pass(config: dict[str, Any], n: int, splits: list[int], grad: bool) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, n))
    with torch.set_grad_enabled(grad):
        chunked, _ = in_chunks(model, ids, splits)
        torch.testing.assert_close(chunked, model(ids), rtol=0, atol=1e-10)


@given(config=configs(), n=st.integers(SEQ_LEN, 5 * SEQ_LEN), splits=SPLITS)
def test_chunks_of_random_models_equal_one_pass_beyond_seq_len(
    config: dict[str, Any], n: int, splits: list[int]
) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, n))
    with torch.no_grad():
        chunked, state = in_chunks(model, ids, splits)
        whole, again = model(ids, return_state=True)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)
    assert state.nbytes == again.nbytes


def test_golden_numbers_in_chunks(golden: Golden) -> None:
    model, ids = golden.model(), golden.tensors['ids']
    with torch.no_grad():
        for splits in ([1], [5, 1, 16]):
            logits, _ = in_chunks(model, ids, splits)
            published = golden.tensors['logits'].double()
            assert (logits - published).norm() <= 1e-5 * published.norm()


@given(config=configs(), first=st.integers(1, 20), rows=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_any_state_can_be_cloned_and_selected_but_not_read_twice(
    config: dict[str, Any], first: int, rows: list[int]
) -> None:
    model, ids = build(config), torch.randint(0, 11, (3, 30))
    with torch.no_grad():
        whole, _ = model(ids, return_state=True)
        _, state = model(ids[:, :first], return_state=True)
        kept, chosen, alias = state.clone(), state.select(rows), state.detach()
        assert chosen.nbytes * 3 == state.nbytes * len(rows)
        _, after = model(ids[:, first:], state=state, return_state=True)
        assert after.nbytes == state.nbytes
        for consumed in (state, alias):
            with pytest.raises(ValueError, match=f'state at position {first} was consumed'):
                model(ids[:, first:], state=consumed, return_state=True)
        for other, order in ((kept, [0, 1, 2]), (chosen, rows)):
            out, _ = model(ids[order, first:], state=other, return_state=True)
            torch.testing.assert_close(out, whole[order, first:], rtol=0, atol=1e-10)


@given(config=configs(), n=st.integers(1, 3 * SEQ_LEN), splits=SPLITS, room=st.integers(1, 20))
@settings(max_examples=20)
def test_growing_states_of_random_models_equal_one_pass(
    config: dict[str, Any], n: int, splits: list[int], room: int
) -> None:
    model, ids = build(config), torch.randint(0, 11, (1, n))
    with torch.no_grad():
        whole, _ = model(ids, return_state=True)
        with mock.patch.object(state_module, 'ROOM', room):
            chunked, state = in_chunks(model, ids, splits)
            assert state.nbytes == model(ids, return_state=True)[1].nbytes
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(('config', 'grad'), READS)
def test_chunks_of_every_case_equal_one_pass(config: dict[str, Any], grad: bool) -> None:
    """The logits, and the tokens of every level."""
    model, ids = build_case(config).eval(), ids_of(config)
    with torch.set_grad_enabled(grad):
        whole, tokens = model(ids), tokens_by_row(model.inspect(ids))
        # single tokens at each phase of a stride of 8, and chunks that end at any phase
        for sizes in ([1] * 9 + [36], [13, 32]) if not grad else ([3, 1, 7, 8, 2, 24],):
            logits, levels = read_in_chunks(model, ids, sizes)
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-10)
            torch.testing.assert_close(levels, tokens, rtol=0, atol=1e-10)
