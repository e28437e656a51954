"""The faster linear kernels compute what `F.linear` does, gradients too, and step aside where they must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simple_hierarchical_transformer import linear as module
from simple_hierarchical_transformer.linear import HAS_ONEDNN, MIN_WEIGHT, Linear, linear


@pytest.mark.parametrize('shape', [(512,), (1, 512), (2, 1, 512), (7, 512), (2, 3, 512), (2, 0, 512)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dim_out', [300, 320, 1100])
@pytest.mark.parametrize('strided', [True, False])
@pytest.mark.parametrize('train', [True, False])
def test_all_kernels_agree(shape: tuple[int, ...], dim_out: int, bias: bool, strided: bool, train: bool) -> None:
    layer = Linear(512, dim_out, bias=bias)
    x = torch.randn(*shape[:-1], 1024)[..., ::2] if strided else torch.randn(shape)
    x.requires_grad_(train)
    with torch.set_grad_enabled(train):
        ours, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    if train:
        inputs, weights = (x, *layer.parameters()), torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(expected, inputs, weights),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_gradients_of_gradients_and_function_transforms() -> None:
    layer, x = Linear(256, 256), torch.randn(3, 256, requires_grad=True)

    def penalty(run: torch.nn.Module | object) -> torch.Tensor:
        (grad,) = torch.autograd.grad(run(x).tanh().sum(), x, create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    expected = penalty(lambda x: F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(penalty(layer), expected, rtol=1e-4, atol=1e-4)

    def loss(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return linear(row, weight).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight.detach(), x.detach()[:, None])
    torch.testing.assert_close(each[1], torch.func.grad(loss)(layer.weight.detach(), x.detach()[1:2]))


@pytest.mark.skipif(not HAS_ONEDNN, reason='this build of PyTorch has no oneDNN')
def test_serves_large_float32_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = F.linear
    monkeypatch.setattr(module.F, 'linear', lambda *args: called.append(1) or real(*args))

    def falls_back(dtype: torch.dtype = torch.float32, size: int = 512) -> bool:
        called.clear()
        linear(torch.randn(1, size, dtype=dtype), torch.randn(MIN_WEIGHT // 512, size, dtype=dtype))
        return bool(called)

    assert not falls_back()
    assert falls_back(dtype=torch.float64)
    assert falls_back(dtype=torch.bfloat16)
    assert falls_back(size=256)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert falls_back()
