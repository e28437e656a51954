"""Faster and smaller ways to train give the numbers of the plain one: compiled, checkpointed, in half precision."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from conftest import SEQ_LEN, build, configs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import attention

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
