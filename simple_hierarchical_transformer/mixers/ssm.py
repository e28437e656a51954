"""A state space model with a diagonal matrix, the core of S4D and H3."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_int
from ..memory import keep
from ..ops.fft_conv import causal_conv, check_fft, conv_products
from ..ops.precision import KeepsExact, exact_dtype
from ..ops.tracing import first_of, side_of_square

# range of the initial time scales of channels
DT_RANGE = (1e-3, 1e-1)


class DiagonalSSM(KeepsExact):
    """One diagonal state space model for each channel. `(batch, seq, dim)` to `(batch, seq, dim)`.

        x_t = exp(dt A) x_{t-1} + u_t,    y_t = 2 Re(C (exp(dt A) - 1) / A x_t) + D u_t

    This is `x' = A x + B u, y = C x + D u` with B = 1, held constant over each step dt. x is stored before B acts.
    A has complex numbers in conjugate pairs, and one of each pair is stored. The kernel and the initialisations 'lin'
    and 'inv' are those of Gu et al. 2022, arXiv 2206.11893.

    A sequence is convolved with the kernel `2 Re(C (exp(dt A) - 1) / A exp(dt A)^t)`. A single step runs the
    recurrence. The power of `exp(dt A)` at t is the product of a power below `sqrt(seq)` and one at a multiple of
    `sqrt(seq)`. Kernel, state and the contribution of the state are then matrix products.

    Time is `O(seq * (log(seq) + state_dim) * dim)`. The state is x, `(batch, dim, state_dim / 2, 2)`.

    Args:
        dim: width of the tokens.
        state_dim: N, size of the state of each channel, even.
        init: initial A. 'lin' is -1/2 + i pi n, 'inv' is -1/2 + i N / pi (N / (2 n + 1) - 1).
        fft: transform of the convolution, 'torch' or 'monarch': see `causal_conv`.

    Raises:
        ValueError: a value is not allowed.
    """

    # time scales and frequencies
    exact = ('log_dt', 'a_imag')

    def __init__(self, dim: int, *, state_dim: int, init: str, fft: str) -> None:
        super().__init__()
        check_choice('init', init, ('lin', 'inv'))
        if check_int('state_dim', state_dim, 2) % 2:
            raise ValueError(f'state_dim must be even (complex numbers come in pairs), got {state_dim}')
        self.fft = check_fft(fft)
        n = torch.arange(state_dim // 2)
        imaginary = math.pi * n if init == 'lin' else state_dim / math.pi * (state_dim / (2 * n + 1) - 1)
        low, high = map(math.log, DT_RANGE)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(dim, dtype=exact_dtype()))
        self.log_a_real = nn.Parameter(torch.full((dim, state_dim // 2), math.log(0.5)))
        self.a_imag = nn.Parameter(imaginary.float().repeat(dim, 1))
        self.c = nn.Parameter(torch.randn(dim, state_dim // 2, 2) * 0.5**0.5)
        self.d = nn.Parameter(torch.randn(dim))

    def products(self, n: float) -> float:
        """Operations of a pass over `n` tokens: the convolution, and complex products for the kernel."""
        dim, states = self.c.shape[:2]
        return conv_products(n, dim, self.fft) + 8 * n * dim * states

    def initial_state(self, batch: int, like: Tensor) -> Tensor:
        return like.new_zeros(batch, *self.c.shape, dtype=torch.promote_types(like.dtype, torch.float32))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """`dt A` and the output weights `2 C (exp(dt A) - 1) / A`, complex `(dim, state_dim / 2)`."""
        exact = torch.promote_types(self.c.dtype, torch.float32)
        a = torch.complex(-self.log_a_real.to(exact).exp(), self.a_imag.to(exact))
        step = a * self.log_dt.to(exact).exp()[:, None]
        return step, 2 * torch.view_as_complex(self.c.to(exact)) * torch.expm1(step) / a

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        step, read = self.coefficients()
        n, exact = u.shape[1], step.real.dtype
        if n == 1 and state is not None:
            x = torch.view_as_complex(state.to(exact)) * step.exp() + u[:, 0, :, None]
            y = (read * x).real.sum(dim=-1)[:, None]
            return y.to(u.dtype) + self.d * u, keep(state, torch.view_as_real(x))

        # position t = row * size + column
        size = side_of_square(n)
        rows = -(-n // size)
        columns_power = torch.exp(step[..., None] * torch.arange(size, device=u.device))
        rows_power = torch.exp(step[..., None] * (size * torch.arange(rows, device=u.device)))

        def series(weights: Tensor) -> Tensor:
            """`Re(sum over states of weights * exp(dt A)^t)`: `(..., dim, states)` to `(..., dim, n)`."""
            return first_of(((weights[..., None] * rows_power).mT @ columns_power).real.flatten(-2), n, dim=-1)

        y = causal_conv(u, series(read).t(), self.fft) + self.d * u
        if state is None:
            return y, None
        x = torch.view_as_complex(state.to(exact))
        y = y + series(read * x * step.exp()).mT.to(y.dtype)
        # the newest token comes first in the sum over t of exp(dt A)^t u
        newest = F.pad(u.flip(1).to(exact).mT, (0, rows * size - n)).unflatten(-1, (rows, size))
        added = ((newest.to(step.dtype) @ columns_power.mT) * rows_power.mT).sum(dim=-2)
        return y, keep(state, torch.view_as_real(x * (step * n).exp() + added))
