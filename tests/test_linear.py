"""The faster linear kernel computes what `F.linear` does, and steps aside where it must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simple_hierarchical_transformer import linear as module
from simple_hierarchical_transformer.linear import HAS_ONEDNN, MIN_WEIGHT, Linear, linear


@pytest.mark.parametrize('shape', [(512,), (1, 512), (7, 512), (2, 3, 512), (2, 0, 512)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dim_out', [300, 320])
def test_all_kernels_agree(shape: tuple[int, ...], dim_out: int, bias: bool) -> None:
    layer, x = Linear(512, dim_out, bias=bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        strided = torch.randn(*shape[:-1], 1024)[..., ::2]
        torch.testing.assert_close(layer(strided), F.linear(strided, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_ONEDNN, reason='this build of PyTorch has no oneDNN')
def test_serves_large_float32_weights_without_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = F.linear
    monkeypatch.setattr(module.F, 'linear', lambda *args: called.append(1) or real(*args))

    def falls_back(dtype: torch.dtype = torch.float32, size: int = 512) -> bool:
        called.clear()
        linear(torch.randn(1, size, dtype=dtype), torch.randn(MIN_WEIGHT // 512, size, dtype=dtype))
        return bool(called)

    assert falls_back()
    with torch.no_grad():
        assert not falls_back()
        assert falls_back(dtype=torch.float64)
        assert falls_back(dtype=torch.bfloat16)
        assert falls_back(size=256)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert falls_back()
