"""A state that was read once is refused, and so is every state derived from it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.configs import THREE, build

from simple_hierarchical_transformer.memory import State

DERIVED: dict[str, Callable[[State], State]] = {
    'itself': lambda state: state,
    'clone': State.clone,
    'detach': State.detach,
    'select': lambda state: state.select([1, 0]),
    'to another dtype': lambda state: state.to(torch.float32).to(torch.float64),
    'to where it is': lambda state: state.to(torch.float64),
    'deepcopy': deepcopy,
}


@pytest.mark.parametrize('derive', DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize('recall', [(), (2,)])
def test_states_derived_from_a_consumed_state_are_refused(
    derive: Callable[[State], State], recall: tuple[int, ...]
) -> None:
    model, ids = build(dict(THREE, recall=recall)), torch.randint(0, 11, (2, 20))
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        model(ids[:, 9:], state=state, return_state=True)
        assert state.consumed
        with pytest.raises(ValueError, match='state at position 9 was consumed'):
            model(ids[:, 9:], state=derive(state), return_state=True)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize('derive', DERIVED.values(), ids=DERIVED)
def test_a_state_is_refused_after_a_step_that_failed(derive: Callable[[State], State]) -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 20))

    def interrupt(*_: Any) -> None:
        raise Interrupted

    def fail(state: State) -> None:
        hook = model.hierarchical_merges[1].register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            model(ids[:, 9:], state=state, return_state=True)
        hook.remove()

    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        fail(state)
        with pytest.raises(ValueError, match='state at position 9 was consumed'):
            model(ids[:, 9:], state=derive(state), return_state=True)

    # with gradients a step writes nothing in place
    _, state = model(ids[:, :9], return_state=True)
    fail(state)
    out, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(out, model(ids)[:, 9:], rtol=0, atol=1e-10)
