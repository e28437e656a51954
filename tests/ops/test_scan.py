"""The scan against the recurrence, step by step."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from simple_hierarchical_transformer.ops.scan import scan


@given(n=st.integers(1, 70), complex_=st.booleans(), wide=st.booleans())
def test_scan_equals_the_recurrence(n: int, complex_: bool, wide: bool) -> None:
    dtype = torch.complex128 if complex_ else torch.float64
    a = torch.randn(2, n, 3, 1 if wide else 4, dtype=dtype).requires_grad_()
    b = torch.randn(2, n, 3, 4, dtype=dtype, requires_grad=True)
    initial = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    # gates of at most 1, some zero
    gates = a / a.abs().detach().clamp(min=1) * (torch.rand(2, n, 3, 1) > 0.2)
    h, steps = initial, []
    for t in range(n):
        h = gates[:, t] * h + b[:, t]
        steps.append(h)
    expected, ours = torch.stack(steps, dim=1), scan(gates, b, initial)
    torch.testing.assert_close(ours, expected)
    towards = torch.randn_like(ours)
    for got, right in zip(
        torch.autograd.grad((ours * towards).abs().square().sum(), (a, b, initial), retain_graph=True),
        torch.autograd.grad((expected * towards).abs().square().sum(), (a, b, initial)),
        strict=True,
    ):
        torch.testing.assert_close(got, right)
