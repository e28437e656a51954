"""Captured steps: one recorded step serves every position of its residue.

A CPU has no CUDA graphs. A recorder of operations replaces them here: it runs the operations again on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from support.configs import build, configs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.generation.captured import CapturedSteps, is_capturable
from simple_hierarchical_transformer.memory import State
from simple_hierarchical_transformer.mixers.rotary import Rotary
from simple_hierarchical_transformer.positions import Clock, Position

SMALL: dict[str, Any] = dict(num_tokens=11, dim=16, depth=2, dim_head=8, heads=2, seq_len=48, window_sizes=4)
HOURGLASS = dict(SMALL, hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=(4, None), arrangement='hourglass')


def memory(values: Any) -> set[int]:
    """Addresses of the storages of all tensors in `values`."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)}


class Recorder(TorchDispatchMode):
    """Records operations with their arguments. `replay` runs them again and writes to the same memory."""

    measures_routes = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a capture must not copy from the host
        assert func is not torch.ops.aten.lift_fresh.default
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not memory(old) & memory((args, kwargs)):
                    old.copy_(new)


class RecordedSteps(CapturedSteps):
    def capture(self, state: State) -> Recorder:
        """Like a capture, it has no effect."""
        kept = [(tensor, tensor.clone()) for tensor in state.tensors()]
        with Recorder() as recorder:
            self.logits.copy_(self.step(state))  # type: ignore[union-attr]
        for tensor, value in kept:
            tensor.copy_(value)
        return recorder


@torch.no_grad()
def assert_steps_are_the_model_s(model: HierarchicalTransformer, length: int, rounds: int, never: int = 0) -> None:
    steps = RecordedSteps(model)
    length = max(length, steps.settled)
    ids = torch.randint(1, model.num_tokens, (2, length + rounds * steps.cycle))
    _, state = model(ids[:, :length], return_state=True)
    expected = state.clone()
    for at in range(length, ids.shape[1]):
        ours, state = steps(ids[:, at : at + 1], state, ids.shape[1] - at)
        theirs, expected = model(ids[:, at : at + 1], state=expected, return_state=True)
        torch.testing.assert_close(ours, theirs)
    assert state.position == expected.position
    assert len(steps.graphs) == steps.cycle - never


def test_steps_of_placed_levels_are_not_captured() -> None:
    """Whether a placed level gets a token depends on the ids, so steps differ."""
    assert is_capturable(build(HOURGLASS))
    placed = dict(HOURGLASS, hierarchical_stride=1, boundaries=(None, 'every'))
    assert not is_capturable(build(placed))


@given(configs())
def test_recorded_steps_serve_all_positions(config: dict[str, Any]) -> None:
    model = build(config).eval()
    if is_capturable(model):
        assert_steps_are_the_model_s(model, 5, 5)


@pytest.mark.parametrize('mixer', ['attention', 'gateloop', 'simple-gateloop', 's4d', 'h3'])
def test_mixers_have_steps_to_record(mixer: str) -> None:
    assert_steps_are_the_model_s(build(dict(HOURGLASS, mixer=mixer)).eval(), 7, 6)


def test_positions_that_the_device_does_not_read_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: with plain ints, a recorded step is valid at one position only."""
    monkeypatch.setattr('simple_hierarchical_transformer.generation.captured.Position', lambda value, *_: value)
    with pytest.raises(AssertionError):
        assert_steps_are_the_model_s(build(HOURGLASS).eval(), 7, 6)


def test_caches_are_enlarged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('simple_hierarchical_transformer.memory.ROOM', 4)
    config = dict(HOURGLASS, seq_len=256, recall=(2,), ngrams=(2, 3), ngram_rows=64)
    assert_steps_are_the_model_s(build(config).eval(), 9, 8)


def test_steps_that_move_the_origin_of_the_decay_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ('mixers.rotary', 'generation.captured'):
        monkeypatch.setattr(f'simple_hierarchical_transformer.{module}.BLOCK', 4)
    monkeypatch.setattr('simple_hierarchical_transformer.mixers.rotary.XPOS_SCALE_BASE', 16)
    assert_steps_are_the_model_s(build(dict(HOURGLASS, window_sizes=(None, None))).eval(), 9, 14, never=1)


def test_remainders_that_depend_on_the_round_are_refused() -> None:
    position = Position(13, Clock(torch.tensor(3)), 4, 1)
    assert position.tensor.item() == 13
    assert (-(-position // 4) + 2).tensor.item() == -(-13 // 4) + 2
    assert position % 2 == 1
    assert -position % 4 == 3
    for refused in (lambda: position % 3, lambda: position // 3):
        with pytest.raises(NotImplementedError, match='positions 4 apart have no common remainder by 3'):
            refused()


class UserLinear(nn.Linear):
    pass


def test_models_whose_replay_would_skip_code_are_not_captured() -> None:
    def changed(change: Callable[[HierarchicalTransformer], Any], **config: Any) -> bool:
        model = build(dict(HOURGLASS, **config)).eval()
        change(model)
        return is_capturable(model)

    def patch(model: HierarchicalTransformer) -> None:
        layer = model.layers[0][0].ff.net[1]
        layer.forward = layer.forward

    assert changed(lambda model: None)
    assert not changed(lambda model: model.register_forward_hook(lambda *_: None))
    assert not changed(lambda model: model.layers[0][0].ff.register_forward_pre_hook(lambda *_: None))
    assert not changed(lambda model: setattr(model, 'to_logits', UserLinear(16, 11)))
    assert not changed(patch)
    assert not changed(lambda model: model.norms[0].compile())
    assert not changed(lambda model: None, mixer='hyena')
    assert not changed(lambda model: None, mixer=('attention', 'lsh'))
    assert not changed(lambda model: None, window_sizes=None, mixer_kwargs=dict(pattern='strided'))
    assert not changed(lambda model: None, hierarchies=(1, 128), hierarchical_stride=(1, 128))


@torch.no_grad()
def test_changes_between_watched_steps_take_effect() -> None:
    model = build(HOURGLASS).eval()
    steps, ids = RecordedSteps(model, watched=True), torch.randint(1, 11, (2, 130))
    _, state = model(ids[:, :9], return_state=True)
    expected, calls = state.clone(), []

    def compare(begin: int, end: int) -> None:
        nonlocal state, expected
        for at in range(begin, end):
            ours, state = steps(ids[:, at : at + 1], state, 130 - at)
            theirs, expected = model(ids[:, at : at + 1], state=expected, return_state=True)
            torch.testing.assert_close(ours, theirs)

    compare(9, 30)
    assert len(steps.graphs) == 4
    model.to_logits.weight = nn.Parameter(2 * model.to_logits.weight)
    compare(30, 45)
    with model.ablate(4):
        compare(45, 60)
    model.layers[0][0].ff.net[1].weight.data = torch.randn(64, 16, dtype=torch.float64)
    compare(60, 75)
    hook = model.layers[0][0].register_forward_hook(lambda *_: calls.append(1))
    compare(75, 80)
    assert len(calls) == 10
    hook.remove()
    compare(80, 90)
    model.layers[0][0].ff.net[2] = nn.ReLU()
    compare(90, 105)
    model.norms[0].eps = 1.0
    compare(105, 120)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        compare(120, 130)


@torch.no_grad()
def test_a_state_of_inference_mode_can_be_continued() -> None:
    model = build(HOURGLASS).eval()
    steps, ids = RecordedSteps(model), torch.randint(1, 11, (1, 40))
    with torch.inference_mode():
        _, state = model(ids[:, :9], return_state=True)
    for at in range(9, 40):
        logits, state = steps(ids[:, at : at + 1], state, 40)
    torch.testing.assert_close(logits, model(ids)[:, -1:])


@torch.no_grad()
@pytest.mark.parametrize('watched', [False, True])
def test_angles_are_compared_when_a_step_first_needs_them(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    agrees = Rotary.agrees
    monkeypatch.setattr(Rotary, 'agrees', lambda self, other: compared.append(1) or agrees(self, other))
    model = build(HOURGLASS).eval()
    steps, ids = RecordedSteps(model, watched=watched), torch.randint(1, 11, (1, 40))
    _, state = model(ids[:, :1], return_state=True)
    for at in range(1, 40):
        _, state = steps(ids[:, at : at + 1], state, 40 - at)
        assert bool(compared) is (not watched and at >= steps.settled)
    assert len(steps.graphs) == 4
    # once, each with those before it
    assert len(compared) <= len([module for module in model.modules() if isinstance(module, Rotary)]) ** 2


@pytest.mark.parametrize('settings', [{}, dict(stop_ids=[3]), dict(repetition_penalty=1.3)], ids=str)
def test_generation_with_captured_steps_draws_the_same_ids(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, built = build(HOURGLASS).eval(), []
    prompts = [torch.randint(1, 11, (n,)) for n in (30, 21)]

    def draw() -> list[Tensor]:
        new = model.generate(prompts, 40, temperature=0, **settings)
        more, state = model.generate(prompts[0][None], 12, temperature=0, return_state=True, **settings)
        stream = model.stream(prompts[0][None], 40, temperature=0, state=state, **settings)
        return [new, more, *stream]

    class CountedSteps(RecordedSteps):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            built.append(self)

    expected = draw()
    monkeypatch.setattr('simple_hierarchical_transformer.generation.loop.pays_to_capture', lambda *_: True)
    monkeypatch.setattr('simple_hierarchical_transformer.generation.loop.CapturedSteps', CountedSteps)
    found = draw()
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected)
    assert [steps.watched for steps in built] == [False, False, True]
    # a stop may come before the first capture
    assert 'stop_ids' in settings or all(steps.graphs for steps in built)
