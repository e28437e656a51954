"""Streams: ids and their state as they are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import model

from simple_hierarchical_transformer.generation.sampler import Sampler


def test_stream_yields_what_generate_returns() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    ids = list(net.stream(prompt, 9, temperature=0))
    assert torch.equal(torch.stack(ids, dim=1), net.generate(prompt, 9, temperature=0))


@pytest.mark.parametrize('count', [0, 1, 5])
def test_a_stream_has_a_state_after_any_number_of_ids(count: int) -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 7))
    stream = net.stream(prompt, 9, temperature=0)
    for _ in range(count):
        next(stream)
    state = stream.state
    assert state.position == 7 + count
    assert list(stream) == []
    whole = net.generate(prompt, 9, temperature=0)
    expected, _ = net(torch.cat((prompt, whole[:, : count + 1]), dim=1), return_state=True)
    with torch.no_grad():
        logits, _ = net(whole[:, count : count + 1], state=state, return_state=True)
    torch.testing.assert_close(logits[:, -1], expected[:, -1])


@pytest.mark.parametrize('where', ['model', 'sampler'])
@pytest.mark.parametrize('count', [0, 3])
def test_an_interrupted_stream_never_has_a_wrong_state(monkeypatch: pytest.MonkeyPatch, where: str, count: int) -> None:
    net, prompt = model().double(), torch.randint(0, 11, (2, 7))
    whole = net.generate(prompt, 9, temperature=0)
    stream = net.stream(prompt, 9, temperature=0)
    for _ in range(count):
        next(stream)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = net.norms[0].register_forward_hook(interrupt) if where == 'model' else None
    if where == 'sampler':
        monkeypatch.setattr(Sampler, '__call__', interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    if hook is not None:
        hook.remove()
    if where == 'model' and count:
        with pytest.raises(ValueError, match='was consumed by a chunk that came after it, or that failed halfway'):
            _ = stream.state
        return
    # a prompt whose read failed is read again. An id whose successor was not drawn is not
    state = stream.state
    assert state.position == 7 + count
    goes_on = net.generate(whole[:, count : count + 1], 8 - count, temperature=0, state=state)
    assert torch.equal(goes_on, whole[:, count + 1 :])


def test_a_stream_can_start_and_continue_in_different_modes() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    settings: dict[str, Any] = dict(temperature=0, stop_ids=[99 % 11], repetition_penalty=1.1)
    whole = net.generate(prompt, 9, **settings)
    for first, second in ((torch.inference_mode, torch.enable_grad), (torch.no_grad, torch.inference_mode)):
        with first():
            stream = net.stream(prompt, 9, **settings)
            new = [next(stream)]
        with second():
            new += list(stream)
            state = stream.state
    assert torch.equal(torch.stack(new, dim=1), whole)
    assert state.position == 3 + whole.shape[1]
