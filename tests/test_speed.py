"""Faster and smaller ways to train give the numbers of the plain one: compiled, checkpointed, in half precision."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import SEQ_LEN, build, configs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import MIXERS, attention
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.compiled import compile_blocks
from simple_hierarchical_transformer.training.optim import build_optimizer

SMALL: dict[str, Any] = dict(
    num_tokens=11,
    dim=(8, 12),
    depth=2,
    seq_len=SEQ_LEN,
    dim_head=4,
    heads=2,
    hierarchies=(1, 4),
    hierarchical_stride=(1, 2),
    window_sizes=(4, None),
    ignore_index=-1,
)


def gradients(model: HierarchicalTransformer, run: Any, ids: Tensor) -> tuple[Tensor, ...]:
    loss, _ = run(ids, return_loss=True)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('changes', [{}, dict(hierarchies=1, hierarchical_stride=1, window_sizes=None, dim=8)])
def test_training_step_compiles_whole(changes: dict[str, Any], checkpointing: bool) -> None:
    model = build({**SMALL, **changes, 'gradient_checkpointing': checkpointing})
    ids = torch.randint(0, 11, (2, 33))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(gradients(model, compiled, ids), gradients(model, model, ids))


@pytest.mark.parametrize(
    ('changes', 'graphs'),
    [
        ({}, 2),
        (dict(gradient_checkpointing=True), 2),
        (dict(arrangement='hourglass', hierarchical_stride=(1, 4)), 2),
        # parts of blocks by themselves, without gradients at first
        (dict(reversible=True), 6),
    ],
    ids=['parallel', 'checkpointed', 'hourglass', 'reversible'],
)
def test_blocks_are_compiled_once_for_each_level(changes: dict[str, Any], graphs: int) -> None:
    config = dict(num_tokens=11, dim=16, depth=4, dim_head=8, heads=2, seq_len=64, hierarchies=(1, 4), window_sizes=4)
    model, ids = build({**config, **changes}), torch.randint(1, 11, (2, 41))
    names, exact = list(model.state_dict()), gradients(model, model, ids)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compile_blocks(model, backend=counter)
    torch.testing.assert_close(gradients(model, model, ids), exact)
    assert counter.frame_count == graphs
    assert list(model.state_dict()) == names


@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')
def test_training_step_compiles_to_machine_code() -> None:
    model = build(dict(SMALL, depth=1, dim=8, hierarchies=(1, 2), window_sizes=4)).float()
    ids = torch.randint(0, 11, (1, 17))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled, ids), gradients(model, model, ids), rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(config=configs(), with_state=st.booleans())
def test_checkpointing_changes_no_number(config: dict[str, Any], with_state: bool) -> None:
    # what is reversible computes layers again by itself
    config = {**config, 'reversible': False}
    plain, again = build(config), build(dict(config, gradient_checkpointing=True))
    ids = torch.randint(0, 11, (2, 20))

    def run(model: HierarchicalTransformer) -> tuple[Tensor, ...]:
        if not with_state:
            return gradients(model, model, ids)
        _, state = model(ids[:, :9], return_state=True)
        loss, _, _ = model(ids[:, 9:], return_loss=True, state=state, return_state=True)
        return torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(run(again), run(plain), rtol=0, atol=1e-12)


def test_checkpointing_keeps_less() -> None:
    def kept(**settings: Any) -> int:
        model, total = HierarchicalTransformer(**{**SMALL, 'depth': 6, **settings}), 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.randint(0, 11, (2, 48)), return_loss=True)
        return total

    assert kept(gradient_checkpointing=True) < 0.5 * kept()


# what planned memory may be off by, as a share of what a real step takes
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


def real_peak(step: Callable[[], None]) -> int:
    """The most bytes that the allocator had given out at once during a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_memory_is_planned_by_versions_that_do_not_count_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**PLANNED)
    optimizer = build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1, device=torch.device('cpu'))
    exact = sum(cost.step_memory(model, optimizer, rows=2, length=64).values())
    monkeypatch.setattr(cost, 'USE_COUNT', None)
    assert exact <= sum(cost.step_memory(model, optimizer, rows=2, length=64).values()) < 1.2 * exact


@pytest.mark.parametrize('name', STEPS)
def test_planned_memory_is_what_a_step_takes(name: str) -> None:
    """Counted on 'meta', against what the allocator gives out during a real step."""
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

    # until the state holds all that it can, and the optimizer all that it has
    for _ in range(5 if segments else 1):
        step()
    memory = cost.step_memory(
        planned, planned_optimizer, rows=rows, length=length, accum=accum, position=position, half=half
    )
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert (memory['weights'], memory['optimizer']) == (held, moments)
    # states of segments were there before the step, too
    real = real_peak(step) + batches.nbytes + held + moments + sum(state.nbytes for state in states if state)
    assert sum(memory.values()) == pytest.approx(real, rel=TOLERANCE)


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
        model = HierarchicalTransformer(**{**SMALL, 'mixer': mixer})
    for position in (None, 30):
        memory = cost.step_memory(
            model, build_optimizer(model, 'adamw', lr=1e-3, weight_decay=0.1), rows=2, length=32, position=position,
            half=half,
        )  # fmt: skip
        assert min(memory.values()) >= 0


@pytest.mark.parametrize('name', STEPS)
def test_a_step_leaves_nothing_to_the_garbage_collector(name: str) -> None:
    """Tensors in a cycle of references stay for as long as the collector likes, a graph's worth of memory a step."""
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


def test_memory_of_many_sequences_is_that_of_few_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(rows: int) -> int:
        with torch.device('meta'):
            model = HierarchicalTransformer(**PLANNED)
        optimizer = build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1, device=torch.device('cpu'))
        return sum(cost.step_memory(model, optimizer, rows=rows, length=256).values())

    exact = planned(200)
    monkeypatch.setattr(cost, 'FEW_TOKENS', 20 * 256)
    assert planned(200) == pytest.approx(exact, rel=TOLERANCE)
    # whatever is asked for is planned at once
    assert planned(10**12) > 10**15


def test_what_checkpoints_keep_is_counted() -> None:
    """The inputs of their layers, which no hook of saved tensors is told of."""
    model = HierarchicalTransformer(**{**PLANNED, 'hierarchies': 1, 'hierarchical_stride': 1, 'dim': 32,
                                       'window_sizes': None, 'depth': 8, 'gradient_checkpointing': True})  # fmt: skip
    ids = torch.randint(0, 256, (2, 257))
    inputs = 8 * 2 * 256 * 32 * 4
    assert inputs < cost.bytes_kept(model, ids, return_loss=True) < 3 * inputs


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', ['auto', 'local-attention'])
def test_autocast_is_safe(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    model = HierarchicalTransformer(**SMALL, attn_backend=backend)
    ids = torch.randint(0, 11, (2, 33))
    exact, exact_parts = model(ids, return_loss=True)
    with torch.autocast('cpu', dtype=dtype):
        loss, parts = model(ids, return_loss=True)
        assert model(ids).dtype == dtype
    for part in (loss, parts.ce, parts.next_latent, parts.recon):
        assert part.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(parts.recon, exact_parts.recon, rtol=0.02, atol=0.02)
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('backend', ['sdpa', 'flex', 'local-attention'])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {'local-attention': 'attend_window_local'}.get(backend, f'attend_window_{backend}')
    called, real = [], getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *args: called.append(name) or real(*args))
    model, ids = HierarchicalTransformer(**SMALL, attn_backend=backend), torch.randint(0, 11, (2, 33))
    with torch.no_grad():
        model(ids)
        assert len(called) == 2
        # full attention with a state reaches back over a band too
        model(ids, return_state=True)
        assert len(called) > 4


@settings(max_examples=10)
@given(config=configs())
def test_flex_is_causal_and_the_same(config: dict[str, Any]) -> None:
    model, ids = build(dict(config, attn_backend='flex')).float(), torch.randint(0, 11, (2, 20))
    plain = build(dict(config, attn_backend='sdpa')).float()
    with torch.no_grad():
        logits = model(ids)
        torch.testing.assert_close(logits, plain(ids), rtol=1e-4, atol=1e-4)
        ids[:, 13] = (ids[:, 13] + 1) % 11
        assert torch.equal(model(ids)[:, :13], logits[:, :13])


def test_a_flex_mask_is_made_of_blocks() -> None:
    mask = attention.window_mask(70_000, 100, 64, torch.device('cpu'))
    assert mask.kv_num_blocks.max() <= 3
    assert sum(t.nbytes for t in (mask.kv_indices, mask.kv_num_blocks)) < 2_000_000
    small = attention.window_mask(300, 60, 70, torch.device('cpu'))
    i, j = torch.arange(300)[:, None], torch.arange(360)
    band = (i + 60 - j >= 0) & (i + 60 - j <= 70)
    blocks = torch.nn.functional.pad(band, (0, 24, 0, 84)).unflatten(0, (3, 128)).unflatten(2, (3, 128)).any(3).any(1)
    assert torch.equal(small.to_dense()[0, 0].bool(), blocks)
