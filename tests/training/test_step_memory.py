"""The planned memory of a training step equals the memory that it takes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from gpu.compare import peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import TWO_LEVELS, configs
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import MIXERS
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.optim import build_optimizer

# relative error of the planned memory
TOLERANCE = 0.05


PLANNED: dict[str, Any] = dict(
    num_tokens=256, dim=(32, 48), depth=2, seq_len=256, dim_head=16, heads=2, hierarchies=(1, 4),
    hierarchical_stride=(1, 4), window_sizes=(16, None), arrangement='hourglass', compressor='linear', merge='linear',
    ff_activation='relu2', ngrams=(2, 3), ngram_rows=1024, ngram_dropout=0.5, recall=(3,), ignore_index=-1,
    next_latent_loss_weight=0.0, recon_loss_weight=0.0,
)  # fmt: skip


PARALLEL = dict(arrangement='parallel', depth=3)


STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'plain': ({}, {}),
    'deep': (dict(depth=6), {}),
    'checkpointed': (dict(depth=6, gradient_checkpointing=True), {}),
    'checkpointed-parallel': (dict(PARALLEL, gradient_checkpointing=True), {}),
    'reversible': (dict(PARALLEL, reversible=True), {}),
    'losses': (dict(PARALLEL, merge='concat', recon_loss_weight=0.1, next_latent_loss_weight=0.1), {}),
    'attention': (dict(PARALLEL, merge='attention', merge_window=2, merge_into='all', residual='gru'), {}),
    'halting': (dict(PARALLEL, share_layers=True, halting='act', predict_use_all_hierarchy=True), {}),
    'chunks': (dict(ff_chunks=4), {}),
    'full-attention': (dict(window_sizes=None), {}),
    'no-tables': (dict(ngrams=(), recall=()), dict(optimizer='adamw')),
    'dense-tables': (dict(ngram_rows=1 << 14), dict(sparse=False)),
    'accumulated': ({}, dict(accum=3)),
    'segments': ({}, dict(segments=True, accum=2)),
    'half': ({}, dict(half=True)),
    'half-checkpointed': (dict(depth=4, gradient_checkpointing=True), dict(half=True)),
}


def test_memory_is_planned_where_torch_does_not_count_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**PLANNED)
    optimizer = build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1, device=torch.device('cpu'))
    exact = sum(cost.step_memory(model, optimizer, rows=2, length=64).values())
    monkeypatch.setattr(cost, 'USE_COUNT', None)
    assert exact <= sum(cost.step_memory(model, optimizer, rows=2, length=64).values()) < 1.2 * exact


@pytest.mark.parametrize('name', STEPS)
def test_planned_memory_equals_the_memory_of_a_step(name: str) -> None:
    """The plan counts on the meta device. The reference is the allocator during a real step."""
    changes, run = STEPS[name]
    config, rows = {**PLANNED, **changes}, 4
    accum, half, segments = run.get('accum', 1), run.get('half', False), run.get('segments', False)
    length = 64 if segments else config['seq_len']
    position = config['seq_len'] if segments else None
    with torch.device('meta'):
        planned = HierarchicalTransformer(**config)
    model = HierarchicalTransformer(**config)
    planned_optimizer, optimizer = (
        build_optimizer(
            each, run.get('optimizer', 'muon'), lr=1e-3, weight_decay=0.1, device=torch.device('cpu'),
            sparse=run.get('sparse', True),
        )
        for each in (planned, model)
    )  # fmt: skip

    states: list[Any] = [None] * accum
    batches = torch.randint(0, 256, (accum, rows, length + (not segments)))

    def step() -> None:
        before, states[:] = list(states), []
        for batch, state in zip(batches, before, strict=True):
            extra = dict(state=state and state.detach(), return_state=True) if segments else {}
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=half):
                loss, _, *after = model(batch, return_loss=True, **extra)
            states.extend(after or [None])
            loss.backward()
            del loss, _
        optimizer.step()
        optimizer.zero_grad()

    # until the state has its full size and the optimizer has its moments
    for _ in range(5 if segments else 1):
        step()
    memory = cost.step_memory(
        planned, planned_optimizer, rows=rows, length=length, accum=accum, position=position, half=half
    )
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert (memory['weights'], memory['optimizer']) == (held, moments)
    during = peak_memory(step, torch.device('cpu'))
    # states of segments existed before the step
    before = batches.nbytes + held + moments + sum(state.nbytes for state in states if state)
    assert sum(memory.values()) == pytest.approx(before + during, rel=TOLERANCE)


@given(config=configs(), position=st.sampled_from([None, 0, 40]), half=st.booleans())
@settings(max_examples=4)
def test_memory_of_any_model_can_be_planned(config: dict[str, Any], position: int | None, half: bool) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**config)
    memory = cost.step_memory(
        model, build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1), rows=2, length=20, accum=3, position=position,
        half=half, averaged=True,
    )  # fmt: skip
    assert min(memory.values()) >= 0
    assert memory['averaged weights'] == 4 * sum(p.numel() for p in model.parameters())
    assert not model.token_emb.weight.grad


@pytest.mark.parametrize('mixer', [*MIXERS])
@pytest.mark.parametrize('half', [False, True])
def test_memory_of_every_mixer_can_be_planned(mixer: str, half: bool) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**{**TWO_LEVELS, 'mixer': mixer})
    for position in (None, 30):
        memory = cost.step_memory(
            model, build_optimizer(model, 'adamw', lr=1e-3, weight_decay=0.1), rows=2, length=32, position=position,
            half=half,
        )  # fmt: skip
        assert min(memory.values()) >= 0


@pytest.mark.parametrize('name', STEPS)
def test_a_step_leaves_nothing_to_the_garbage_collector(name: str) -> None:
    """Tensors in a reference cycle stay until the garbage collector runs: the memory of one graph per step."""
    model = HierarchicalTransformer(**{**PLANNED, 'seq_len': 32, **STEPS[name][0], 'ngram_rows': 64})
    ids = torch.randint(0, 256, (2, 33))
    model(ids, return_loss=True)[0].backward()
    gc.collect()
    gc.disable()
    try:
        model(ids, return_loss=True)[0].backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


def test_memory_grows_in_proportion_to_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(rows: int) -> int:
        with torch.device('meta'):
            model = HierarchicalTransformer(**PLANNED)
        optimizer = build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1, device=torch.device('cpu'))
        return sum(cost.step_memory(model, optimizer, rows=rows, length=256).values())

    exact = planned(200)
    monkeypatch.setattr(cost, 'FEW_TOKENS', 20 * 256)
    assert planned(200) == pytest.approx(exact, rel=TOLERANCE)
    # the plan of any number of sequences is computed quickly
    assert planned(10**12) > 10**15


def test_inputs_kept_by_checkpoints_are_counted() -> None:
    """Saved-tensor hooks do not see the inputs that checkpointed layers keep."""
    model = HierarchicalTransformer(**{**PLANNED, 'hierarchies': 1, 'hierarchical_stride': 1, 'dim': 32,
                                       'window_sizes': None, 'depth': 8, 'gradient_checkpointing': True})  # fmt: skip
    ids = torch.randint(0, 256, (2, 257))
    inputs = 8 * 2 * 256 * 32 * 4
    assert inputs < cost.bytes_kept(model, ids, return_loss=True) < 3 * inputs
