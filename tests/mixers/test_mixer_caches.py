"""Caches between steps of generation follow changed weights, and threads can share a mixer."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.configs import build
from support.mixers import CASES, DIM, cases, in_model, make
from torch import Tensor, nn

from simple_hierarchical_transformer import mixers


def scale_data(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1.25)


def swap_data(model: nn.Module) -> None:
    """Replaces the data, as swapping in an average of weights does."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data * 1.25


def assign(model: nn.Module) -> None:
    weights = {name: t * 1.25 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def steps_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last three ids, in single steps after a chunk."""
    with torch.no_grad():
        out, state = model(ids[:, :-3], return_state=True)
        outs = []
        for at in range(ids.shape[1] - 3, ids.shape[1]):
            out, state = model(ids[:, at : at + 1], state=state, return_state=True)
            outs.append(out)
    return torch.cat(outs, dim=1)


@cases
def test_no_cache_outlives_the_weights_that_made_it(case: tuple[str, bool, dict[str, Any]]) -> None:
    config, ids = in_model(case, depth=1), torch.randint(0, 11, (2, 11))
    model, fresh = build(config), build(config)
    before = steps_of(model, ids)
    for change in (scale_data, swap_data, assign):
        change(model)
        change(fresh)
        after = steps_of(model, ids)
        assert not torch.equal(after, before)
        # a fresh copy has empty caches
        assert torch.equal(after, steps_of(deepcopy(fresh), ids)), change
        before = after


@cases
def test_threads_do_not_disturb_each_other(case: tuple[str, bool, dict[str, Any]]) -> None:
    """A second thread runs a step between any two lines of the first one's step: real switches are too rare to test."""
    mixer = make(case)
    x = torch.randn(1, 1, DIM, dtype=torch.float64)

    def read(start: int) -> Tensor:
        with torch.no_grad():
            return mixer(x, mixer.initial_state(1, x), start)[0]

    # both use different rows of a table of positions
    here, there = 3, 3000
    expected, interrupted = read(here), []
    package = str(Path(mixers.__file__).parent)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == 'line':
            interrupted.append(other.submit(read, there).result())
        return trace

    with ThreadPoolExecutor(1) as other:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            got = read(here)
        finally:
            sys.settrace(before)
    assert len(interrupted) > 5
    assert torch.equal(got, expected)


def test_hyena_recomputes_filters_when_weights_change() -> None:
    mixer, x = make(CASES['hyena']).float(), torch.randn(1, 20, DIM)
    with torch.no_grad():
        before = mixer(x, None, 0)[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            mixer(x, None, 0)
        # autocast must not leave rounded filters in the cache
        assert torch.equal(mixer(x, None, 0)[0], before)
        mixer.filters.to_filters.weight.mul_(torch.rand(2 * DIM, 1) + 0.5).add_(0.1)
        after = mixer(x, None, 0)[0]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, mixer(x, None, 0)[0])


@pytest.mark.parametrize('name', ['to_hidden.0', 'to_filters'])
def test_changes_to_the_network_of_filters_take_effect(name: str) -> None:
    mixer, x = make(CASES['hyena']), torch.randn(2, 5, DIM, dtype=torch.float64)
    layer = mixer.filters.get_submodule(name)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            state, steps = mixer.initial_state(2, x), []
            for i in range(x.shape[1]):
                out, state = mixer(x[:, i : i + 1], state, i)
                steps.append(out)
        return [mixer(x)[0], torch.cat(steps, dim=1)]

    before = outputs()
    hook = layer.register_forward_hook(lambda _, __, out: 2 * out + 1)
    hooked = outputs()
    hook.remove()
    torch.testing.assert_close(*hooked)
    assert not torch.allclose(hooked[0], before[0])
    torch.testing.assert_close(outputs(), before)
    mixer.filters.set_submodule(name, nn.Sequential(layer, nn.Tanh()))
    replaced = outputs()
    torch.testing.assert_close(*replaced)
    assert not torch.allclose(replaced[0], before[0])
