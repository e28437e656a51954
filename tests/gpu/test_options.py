"""Every case gives the numbers of the CPU, in one pass and in chunks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import build as build_drawn
from conftest import configs
from contracts.cases import CASES, build, words
from hypothesis import given, settings
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer

from .compare import (
    PRECISIONS,
    Precision,
    assert_gradients_close,
    assert_losses_close,
    assert_near,
    loss_and_gradients,
)

pytestmark = pytest.mark.gpu

# more than two blocks of queries, and not a multiple of a block
LENGTH = 301
CHUNKS = (1, 100, 2, 1, 150, 47)
NEW = 12

cases = pytest.mark.parametrize('config', CASES.values(), ids=CASES)
precisions = pytest.mark.parametrize('precision', PRECISIONS.values(), ids=PRECISIONS)
Pair = tuple[HierarchicalTransformer, HierarchicalTransformer]


def build_pair(config: dict[str, Any], precision: Precision, device: torch.device) -> Pair:
    """Builds the same model on the CPU and on the device."""
    backend = config.get('attn_backend')
    if backend == 'flex' and (device.type == 'cpu' or precision.dtype == torch.float64):
        pytest.skip('FlexAttention trains on CUDA only, and not in float64')
    on_cpu = build({**config, 'attn_backend': 'sdpa' if backend == 'flex' else backend or 'auto'}, precision.dtype)
    on_device = build(config, precision.dtype).to(device)
    return on_cpu, on_device


def read_in_chunks(model: HierarchicalTransformer, ids: Tensor, chunks: tuple[int, ...] = CHUNKS) -> Tensor:
    read, state = [], None
    for chunk in ids.split(list(chunks), dim=1):
        logits, state = model(chunk, state=state, return_state=True)
        read.append(logits)
    return torch.cat(read, dim=1)


@cases
@precisions
def test_losses_and_gradients(config: dict[str, Any], precision: Precision, device: torch.device) -> None:
    on_cpu, on_device = build_pair(config, precision, device)
    ids = words(2, LENGTH)
    theirs, their_gradients = loss_and_gradients(on_cpu, on_cpu, ids)
    ours, our_gradients = loss_and_gradients(on_device, on_device, ids.to(device))
    assert_losses_close(ours, theirs, precision.values)
    assert_gradients_close(our_gradients, their_gradients, precision.gradients)


@cases
@precisions
@torch.no_grad()
def test_logits_chunks_and_generated_ids(config: dict[str, Any], precision: Precision, device: torch.device) -> None:
    on_cpu, on_device = (model.eval() for model in build_pair(config, precision, device))
    ids = words(2, LENGTH)
    logits = on_device(ids.to(device))
    assert_near(logits, on_cpu(ids), precision.values)
    assert_near(read_in_chunks(on_device, ids.to(device)), logits, precision.values)

    prompt = ids[:, :9]
    assert torch.equal(
        on_device.generate(prompt.to(device), NEW, temperature=0).cpu(), on_cpu.generate(prompt, NEW, temperature=0)
    )
    assert on_device.score(ids, chunk_size=100) == pytest.approx(on_cpu.score(ids), abs=precision.values)


@settings(max_examples=6)
@given(config=configs())
def test_random_configurations(config: dict[str, Any], device: torch.device) -> None:
    precision, ids = PRECISIONS['float64'], torch.randint(1, 11, (2, 40))
    on_cpu = build_drawn(config)
    on_device = deepcopy(on_cpu).to(device)
    theirs, their_gradients = loss_and_gradients(on_cpu, on_cpu, ids)
    ours, our_gradients = loss_and_gradients(on_device, on_device, ids.to(device))
    assert_losses_close(ours, theirs, precision.values)
    assert_gradients_close(our_gradients, their_gradients, precision.gradients)
    with torch.no_grad():
        assert_near(read_in_chunks(on_device, ids.to(device), (3, 20, 17)), on_cpu(ids), precision.values)


@torch.no_grad()
@pytest.mark.parametrize('config', [CASES['tables in training'], CASES['losses']], ids=['n-grams', 'reconstruction'])
def test_random_omissions_are_drawn_on_the_device(config: dict[str, Any], device: torch.device) -> None:
    """The same seed draws the same numbers, another seed draws others, and the mean loss is unbiased."""
    model, ids = build(config).to(device), words(2, LENGTH).to(device)
    without = model(ids, return_loss=True)[0].item()
    model.train()

    # n-grams are left out in training only
    @torch.enable_grad()
    def drawn(seed: int) -> float:
        torch.manual_seed(seed)
        return model(ids, return_loss=True)[0].item()

    losses = [drawn(seed) for seed in range(8)]
    assert drawn(0) == losses[0]
    assert len(set(losses)) > 1
    assert sum(losses) / len(losses) == pytest.approx(without, abs=0.1)
