"""The root mean square norm against that of PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from simple_hierarchical_transformer.ops.norm import EPS, RMSNorm


def test_backward_inside_autocast_keeps_norms_in_float32() -> None:
    norm, x = RMSNorm(16), torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(norm(x).square().sum(), (x, norm.gamma))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = torch.autograd.grad(norm(x).square().sum(), (x, norm.gamma))
    torch.testing.assert_close(found, expected)


def test_rms_norm_equals_that_of_torch() -> None:
    norm = RMSNorm(6).double()
    nn.init.uniform_(norm.gamma, 0.5, 2)
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.gamma, eps=EPS), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, gamma: norm(x), (x, norm.gamma))
    assert torch.autograd.gradgradcheck(lambda x, gamma: norm(x), (x, norm.gamma))
    assert norm(torch.zeros(1, 6, dtype=torch.double)).isfinite().all()
