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
