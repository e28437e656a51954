"""Compiled models give the numbers of eager ones, with few graphs."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from support.configs import TWO_LEVELS, UNEVEN, build
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from simple_hierarchical_transformer import HierarchicalTransformer, LossParts
from simple_hierarchical_transformer.training.compiled import compile_blocks

pytestmark = pytest.mark.slow


def gradients(model: HierarchicalTransformer, run: Any, ids: Tensor) -> tuple[Tensor, ...]:
    loss, _ = run(ids, return_loss=True)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('changes', [{}, dict(hierarchies=1, hierarchical_stride=1, window_sizes=None, dim=8)])
def test_a_training_step_compiles_to_one_graph(changes: dict[str, Any], checkpointing: bool) -> None:
    model = build({**TWO_LEVELS, **changes, 'gradient_checkpointing': checkpointing})
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
        # parts of blocks are compiled on their own, first without gradients
        (dict(reversible=True), 6),
    ],
    ids=['parallel', 'checkpointed', 'hourglass', 'reversible'],
)
def test_blocks_are_compiled_once_per_level(changes: dict[str, Any], graphs: int) -> None:
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
    model = build(dict(TWO_LEVELS, depth=1, dim=8, hierarchies=(1, 2), window_sizes=4)).float()
    ids = torch.randint(0, 11, (1, 17))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled, ids), gradients(model, model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'option',
    [
        dict(
            arrangement='hourglass',
            merge='attention',
            merge_window=2,
            compressor='attention',
            predict_use_all_hierarchy=True,
            prophet_loss_weight=0.1,
        ),
        dict(merge_into='all', compressor='attention'),
        dict(autoencoder=True, share_feed_forward=True, quantized_loss_weight=0.1),
    ],
    ids=str,
)
def test_compiles_and_runs_in_half_precision(option: dict[str, Any]) -> None:
    model, ids = build({**UNEVEN, 'depth': 1, **option}), torch.randint(0, 11, (2, 25))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    (loss, parts), (same, _) = compiled(ids, return_loss=True), model(ids, return_loss=True)
    assert isinstance(parts, LossParts)
    wanted = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(same, wanted))

    model = model.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, parts = model(ids, return_loss=True)
    loss.backward()
    for part in parts.named.values():
        assert part.dtype == torch.float32
    torch.testing.assert_close(loss.double(), same, rtol=0.03, atol=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
