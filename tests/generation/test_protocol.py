"""What generation asks of a model, and how many logits it makes the model compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_model import model
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.generation.loop import generate, stream
from simple_hierarchical_transformer.generation.scoring import score


class Successor:
    """Predicts that each id is followed by the next larger one. The state is the number of ids read."""

    num_tokens, seq_len, ignore_index = 11, 8, -1

    def __init__(self) -> None:
        self.token_emb = nn.Embedding(1, 1)

    def __call__(self, ids: Tensor, *, state: Any = None, return_state: bool) -> tuple[Tensor, Any]:
        assert return_state
        return 100.0 * F.one_hot((ids + 1) % 11, 11), (state or 0) + ids.shape[1]

    def check_state(self, state: Any, ids: Tensor) -> None:
        assert isinstance(state, int)


def test_a_model_needs_no_more_than_the_protocol() -> None:
    net: Any = Successor()
    new, state = generate(net, [[3]], 4, temperature=0, return_state=True)
    assert new.tolist() == [[4, 5, 6, 7]]
    assert state == 5
    drawn = stream(net, [[8]], 3, state=state, temperature=0)
    assert torch.cat(list(drawn)).tolist() == [9, 10, 0]
    assert drawn.state == 9
    assert score(net, list(range(11))) == pytest.approx(0)


ROWS: dict[str, Callable[[HierarchicalTransformer, Tensor], Any]] = {
    'generate': lambda net, ids: net.generate(ids, 5, temperature=0),
    'stream': lambda net, ids: torch.stack(list(net.stream(ids, 5, temperature=0)), dim=1),
    'without a cache': lambda net, ids: net.generate(ids, 5, temperature=0, use_cache=False),
}


@pytest.mark.parametrize('draw', ROWS.values(), ids=ROWS)
@pytest.mark.parametrize('length', [1, 20, 50])
def test_a_prompt_computes_logits_of_its_last_position_only(
    draw: Callable[[HierarchicalTransformer, Tensor], Any], length: int
) -> None:
    net, ids, rows = model().double(), torch.randint(0, 11, (2, length)), []
    net.to_logits.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    draw(net, ids)
    assert rows == [1] * 5


def test_the_state_after_a_prompt_is_that_of_all_its_logits() -> None:
    net, ids = model().double(), torch.randint(0, 11, (2, 50))
    _, state = net.generate(ids, 0, return_state=True)
    with torch.no_grad():
        _, expected = net(ids, return_state=True)
    assert state.position == 50
    for ours, theirs in zip(state.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)


class Plain(HierarchicalTransformer):
    """A user's model, whose forward has the arguments of the state call alone. It never draws id 0."""

    def forward(self, ids: Tensor, state: Any = None, return_state: bool = False) -> Any:
        logits, after = super().forward(ids, state=state, return_state=True)
        # relies on a row for each id
        return logits.masked_fill(F.one_hot(torch.zeros_like(ids), self.num_tokens).bool(), -torch.inf), after


class Forwarding(HierarchicalTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert 'logits_to_keep' not in kwargs
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize('kind', [Plain, Forwarding])
def test_a_model_that_does_not_name_the_argument_is_not_given_it(kind: type[HierarchicalTransformer]) -> None:
    net = kind(num_tokens=11, dim=8, depth=1, seq_len=24, dim_head=4, heads=2)
    ids = torch.randint(1, 11, (2, 9))
    new = net.generate(ids, 20, temperature=0)
    assert torch.equal(new, net.generate(ids, 20, temperature=0, use_cache=False))
    assert torch.equal(new, torch.stack(list(net.stream(ids, 20, temperature=0)), dim=1))
    assert kind is Forwarding or new.all()


def test_a_patched_forward_is_asked_for_its_own_arguments() -> None:
    net, ids, rows = model(), torch.randint(0, 11, (2, 9)), []
    expected = net.generate(ids, 6, temperature=0)
    net.to_logits.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    forward = net.forward

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    net.forward = wrapped
    assert torch.equal(net.generate(ids, 6, temperature=0), expected)
    net.forward = lambda ids, state=None, return_state=False: forward(ids, state=state, return_state=return_state)
    assert torch.equal(net.generate(ids, 6, temperature=0), expected)
    assert rows == [1] * 6 + [9] + [1] * 5
