"""The convolution by Fourier transforms against a sum over taps."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixers import taps_written_out

from simple_hierarchical_transformer.ops.fft_conv import causal_conv


@given(n=st.integers(1, 70), taps=st.integers(1, 90), fft=st.sampled_from(['torch', 'monarch']))
def test_convolution_equals_the_sum_over_taps(n: int, taps: int, fft: str) -> None:
    x, kernel = torch.randn(2, n, 3, dtype=torch.float64), torch.randn(taps, 3, dtype=torch.float64)
    torch.testing.assert_close(causal_conv(x, kernel, fft), taps_written_out(kernel, x), rtol=0, atol=1e-12)
