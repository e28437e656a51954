"""torch.func, torch.export and ONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import build
from support.exported import LOSSES, ONE_LEVEL, RECIPE, SMALL, words
from torch import Tensor
from torch.export import Dim, export
from torch.func import functional_call, grad, vmap

from simple_hierarchical_transformer.ops.tracing import stable_sort

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    'config',
    [
        RECIPE,
        LOSSES,
        dict(SMALL, reversible=True, share_layers=True),
        dict(SMALL, gradient_checkpointing=True, ff_chunks=2),
        dict(SMALL, mixer='lsh'),
    ],
    ids=['recipe', 'losses', 'reversible', 'computed again', 'lsh'],
)
def test_vmap_gives_the_gradients_of_each_sample(config: dict[str, Any]) -> None:
    model, samples = build(config), torch.stack([words(2, 21) for _ in range(3)])
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        # PyTorch does not restore the weights of a shared module if it ties them
        return functional_call(model, weights, (ids, True), tie_weights=False)[0]

    each = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in weights.items()}, samples)
    for i, ids in enumerate(samples):
        expected = torch.autograd.grad(model(ids, return_loss=True)[0], weights.values(), allow_unused=True)
        for name, right in zip(weights, expected, strict=True):
            torch.testing.assert_close(each[name][i], torch.zeros_like(each[name][i]) if right is None else right)


# operators that torch.onnx of PyTorch 2.13 reports as missing
NOT_IN_ONNX = ('prims.', 'aten.cumprod', 'aten.cummax', 'aten.sort.stable')


@torch.no_grad()
@pytest.mark.parametrize('config', [RECIPE, LOSSES, dict(ONE_LEVEL, mixer='lsh')], ids=['recipe', 'parallel', 'lsh'])
def test_an_exported_model_takes_any_length_and_only_operators_of_onnx(config: dict[str, Any]) -> None:
    model = build(config).eval()
    program = export(model, (words(2, 90),), dynamic_shapes={'ids': {1: Dim.AUTO}})
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes if node.op == 'call_function'}
    assert not [target for target in targets if target.startswith(NOT_IN_ONNX)]

    exported = program.module()
    for n in (9, 10, 31, 63, 64, 65, 127, 128):
        ids = words(2, n)
        torch.testing.assert_close(exported(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    'config',
    [dict(attn_backend='flex', window_sizes=8), dict(mixer='hyena', mixer_kwargs=dict(fft='monarch'))],
    ids=str,
)
def test_an_export_leaves_no_cached_tensors(config: dict[str, Any]) -> None:
    """Caches between calls must not hold tensors of the exporter, which have no values."""
    model, ids = build({**ONE_LEVEL, **config}).float().eval(), words(1, 23)
    exported = export(model, (ids,)).module()
    torch.testing.assert_close(model(ids), exported(ids))


def test_a_sort_is_stable_in_an_exported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randint(-3, 3, (4, 500)) * (1 << 60)
    expected = numbers.sort(dim=-1, stable=True)
    monkeypatch.setattr('simple_hierarchical_transformer.ops.tracing.is_exporting', lambda: True)
    for got, right in zip(stable_sort(numbers), expected, strict=True):
        assert torch.equal(got, right)
