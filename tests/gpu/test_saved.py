"""Models and states are saved, loaded and moved between devices, and text is streamed and scored on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.cases import LEVELS, RECIPE, TWO, build, words

from simple_hierarchical_transformer import HierarchicalTransformer

from .compare import assert_near

pytestmark = pytest.mark.gpu

CONFIGS = {'recipe': RECIPE, 'levels': LEVELS, 'recurrent': dict(TWO, mixer=('gateloop', 's4d'))}
configs = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
TOLERANCE = 5e-5


@configs
@torch.no_grad()
def test_saved_on_the_device_it_loads_anywhere(config: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    model, ids = build(config).eval().to(device), words(1, 100)
    model.save_pretrained(tmp_path)
    on_device = HierarchicalTransformer.from_pretrained(tmp_path, device_map=device)
    on_cpu = HierarchicalTransformer.from_pretrained(tmp_path)
    assert {tensor.device.type for tensor in on_device.state_dict().values()} == {device.type}
    assert {tensor.device.type for tensor in on_cpu.state_dict().values()} == {'cpu'}
    for name, tensor in model.state_dict().items():
        assert torch.equal(on_device.state_dict()[name], tensor)
        assert torch.equal(on_cpu.state_dict()[name], tensor.cpu())
    assert_near(on_device(ids.to(device)), on_cpu(ids), TOLERANCE)
    half = HierarchicalTransformer.from_pretrained(tmp_path, map_location=device, dtype=torch.bfloat16)
    assert (half.token_emb.weight.device.type, half.token_emb.weight.dtype) == (device.type, torch.bfloat16)


@configs
@torch.no_grad()
def test_a_state_moves_between_devices(config: dict[str, Any], device: torch.device) -> None:
    on_cpu, on_device = build(config).eval(), build(config).eval().to(device)
    ids = words(2, 150)
    whole = on_cpu(ids)

    _, state = on_device(ids[:, :100].to(device), return_state=True)
    swapped, here = state.select([1, 0]), state.to('cpu')
    assert {tensor.device.type for tensor in here.tensors()} == {'cpu'}
    read, here = on_cpu(ids[:, 100:120], state=here, return_state=True)
    assert_near(read, whole[:, 100:120], TOLERANCE)
    read, _ = on_device(ids[:, 120:].to(device), state=here.to(device), return_state=True)
    assert_near(read, whole[:, 120:], TOLERANCE)
    read, _ = on_device(ids[[1, 0], 100:].to(device), state=swapped, return_state=True)
    assert_near(read, whole[[1, 0], 100:], TOLERANCE)


def test_a_state_of_another_device_is_refused(cuda: torch.device) -> None:
    model, ids = build(TWO).eval(), words(1, 20)
    with torch.no_grad():
        _, state = model(ids, return_state=True)
        with pytest.raises(ValueError, match='state must have device cuda'):
            model.to(cuda)(ids.to(cuda), state=state, return_state=True)


@configs
def test_text_is_streamed_and_scored(config: dict[str, Any], device: torch.device) -> None:
    on_cpu, on_device = build(config).eval(), build(config).eval().to(device)
    prompt = bytes(words(1, 40)[0].tolist())
    written = on_cpu.generate(prompt, 16, temperature=0)
    stream = on_device.stream(prompt, 16, temperature=0)
    assert b''.join(stream) == written
    assert stream.state.position == 56
    assert stream.state.device.type == device.type

    bits, log_probs = on_device.score(prompt, return_log_probs=True)
    exact, exact_log_probs = on_cpu.score(prompt, return_log_probs=True)
    assert bits == pytest.approx(exact, abs=TOLERANCE)
    assert_near(log_probs, exact_log_probs, TOLERANCE)


def test_draws_come_from_the_generator_of_the_device(device: torch.device) -> None:
    model = build(TWO).eval().to(device)

    def written(seed: int) -> Any:
        return model.generate(b'Once upon', 24, top_p=0.9, generator=torch.Generator(device).manual_seed(seed))

    assert written(0) == written(0)
    assert written(0) != written(1)
