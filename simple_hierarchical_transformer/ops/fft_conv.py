"""Causal convolutions as long as the sequence, by Fourier transforms."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice
from .export import power_of_two
from .norm import is_traced

FFTS = ('torch', 'monarch')


def check_fft(fft: str) -> str:
    check_choice('fft', fft, FFTS)
    return fft


def causal_conv(x: Tensor, kernel: Tensor, fft: str = 'torch') -> Tensor:
    """`y[:, t] = sum over s of kernel[s] * x[:, t - s]`, channel by channel, with zeros before the first token.

    x and the result: `(batch, seq, dim)`; kernel: `(taps, dim)`. In float32 at least. Time `O(seq * log(seq) * dim)`
    by PyTorch's FFT; `O(seq * sqrt(seq) * dim)` by 'monarch', in matrix products alone, for devices
    that are much faster at those: on a CPU it is the slower one. A position
    hears of later ones by rounding, some 1e-16 of them in float64.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    n, taps = x.shape[1], min(kernel.shape[0], x.shape[1])
    # room for the whole product, so that its end does not come round to its beginning
    size = power_of_two(n + taps - 1)
    if fft == 'torch' and 3 * size // 4 >= n + taps - 1:
        size = 3 * size // 4
    signal, taps_first = x.to(exact).transpose(1, 2), kernel[:taps].to(exact).t()
    if fft == 'monarch':
        out = monarch_product(signal, taps_first, size)
    else:
        out = torch.fft.irfft(torch.fft.rfft(signal, size) * torch.fft.rfft(taps_first, size), size)
    return out[..., :n].transpose(1, 2).to(x.dtype)


def conv_products(n: float, dim: int, fft: str) -> float:
    """Operations of `causal_conv` over n tokens with as many taps: three transforms of twice the length."""
    size = 2 * max(n, 1.0)
    # 5 n log2 n, the usual count of a complex transform, or two complex products of matrices
    return 3 * dim * size * (5 * math.log2(size) / 2 if fft == 'torch' else 2 * 8 * math.sqrt(size))


@lru_cache(maxsize=16)
def monarch_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The Fourier matrices of both factors of `size`, and the twiddles between them, `(first, second)`."""
    first = 1 << (size.bit_length() - 1) // 2
    second = size // first

    def roots(rows: int, columns: int, of: int) -> Tensor:
        power = torch.outer(torch.arange(rows, device=device), torch.arange(columns, device=device)) % of
        # angles in float64, whatever the roots are kept in
        return torch.polar(torch.ones((), device=device, dtype=torch.float64), -2 * torch.pi / of * power.double()).to(
            dtype
        )

    return roots(first, first, first), roots(second, second, second), roots(first, second, size)


def monarch_product(x: Tensor, kernel: Tensor, size: int) -> Tensor:
    """The cyclic convolution over the last dimension, filled up with zeros to `size`, by matrix products.

    A Fourier transform of `first * second` points is one of `first` points over columns, twiddles, and one of `second`
    points over rows: two block-diagonal matrices and a permutation, a Monarch matrix. The permutation is left out, as
    the product of spectra does not ask for an order. Fu et al. 2023, arXiv 2311.05908, section 3.1.
    """
    # a compiler makes them part of its graph, and a mode that pretends to compute makes none that may be kept
    factors = monarch_factors.__wrapped__ if is_traced() else monarch_factors
    with torch.inference_mode(False):
        columns, rows, twiddles = factors(size, torch.promote_types(x.dtype, torch.complex64), x.device)

    def transformed(t: Tensor) -> Tensor:
        grid = F.pad(t, (0, size - t.shape[-1])).unflatten(-1, twiddles.shape).to(twiddles.dtype)
        return (columns @ grid * twiddles) @ rows

    spectrum = transformed(x) * transformed(kernel)
    grid = columns.conj() @ (spectrum @ rows.conj() * twiddles.conj())
    return grid.real.flatten(-2) / size
