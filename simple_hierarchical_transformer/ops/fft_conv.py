"""Causal convolutions as long as the sequence, by Fourier transforms."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice
from .tracing import is_traced, power_of_two

FFTS = ('torch', 'monarch')


def check_fft(fft: str) -> str:
    check_choice('fft', fft, FFTS)
    return fft


def causal_conv(x: Tensor, kernel: Tensor, fft: str = 'torch') -> Tensor:
    """Depthwise causal convolution: `y[:, t] = sum over s of kernel[s] * x[:, t - s]`.

    Tokens before the first one are zeros. It computes in float32 or float64. Rounding makes a position depend on later
    ones, by about 1e-16 of their values in float64.

    Args:
        x: `(batch, seq, dim)`.
        kernel: `(taps, dim)`.
        fft: 'torch' uses PyTorch's FFT, in time `O(seq * log(seq) * dim)`. 'monarch' uses matrix products only, in
            time `O(seq * sqrt(seq) * dim)`. It suits devices that are much faster at these, and is slower on a CPU.

    Returns:
        `(batch, seq, dim)`, in the dtype of `x`.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    n, taps = x.shape[1], min(kernel.shape[0], x.shape[1])
    # long enough for the whole product: a cyclic convolution must not wrap around
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
    """Number of operations of `causal_conv` with `n` tokens and `n` taps: three transforms of length `2 * n`."""
    size = 2 * max(n, 1.0)
    # 5 n log2 n is the usual count of a complex transform; a Monarch transform is two complex matrix products
    return 3 * dim * size * (5 * math.log2(size) / 2 if fft == 'torch' else 2 * 8 * math.sqrt(size))


@lru_cache(maxsize=16)
def monarch_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The Fourier matrices of both factors of `size`, and the twiddle factors between them, `(first, second)`."""
    first = 1 << (size.bit_length() - 1) // 2
    second = size // first

    def roots(rows: int, columns: int, of: int) -> Tensor:
        power = torch.outer(torch.arange(rows, device=device), torch.arange(columns, device=device)) % of
        # angles are computed in float64, whatever the dtype of the roots
        return torch.polar(torch.ones((), device=device, dtype=torch.float64), -2 * torch.pi / of * power.double()).to(
            dtype
        )

    return roots(first, first, first), roots(second, second, second), roots(first, second, size)


def monarch_product(x: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Cyclic convolution over the last dimension, padded with zeros to `size`, by matrix products.

    A Fourier transform of `first * second` points consists of transforms of `first` points over columns, twiddle
    factors, and transforms of `second` points over rows. These are two block-diagonal matrices and a permutation: a
    Monarch matrix. The permutation is left out, since the product of two spectra needs no particular order. Fu et al.
    2023, arXiv 2311.05908, section 3.1.

    Args:
        x: `(batch, dim, seq)`.
        kernel: `(dim, taps)`.
        size: a power of two.

    Returns:
        `(batch, dim, size)`.
    """
    # the cache must not keep tensors of a compiler's graph, or fake ones
    factors = monarch_factors.__wrapped__ if is_traced() else monarch_factors
    with torch.inference_mode(False):
        columns, rows, twiddles = factors(size, torch.promote_types(x.dtype, torch.complex64), x.device)

    def transformed(t: Tensor) -> Tensor:
        grid = F.pad(t, (0, size - t.shape[-1])).unflatten(-1, twiddles.shape).to(twiddles.dtype)
        return (columns @ grid * twiddles) @ rows

    spectrum = transformed(x) * transformed(kernel)
    grid = columns.conj() @ (spectrum @ rows.conj() * twiddles.conj())
    return grid.real.flatten(-2) / size
