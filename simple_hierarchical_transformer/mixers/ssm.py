"""State space models with a diagonal matrix: S4D, and H3 which is made of two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_int
from ..memory import keep
from ..ops.export import first_of, side_of_square
from ..ops.fft_conv import causal_conv, check_fft, conv_products
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.precision import KeepsExact, exact_dtype

# time scales that channels begin with
DT_RANGE = (1e-3, 1e-1)


class DiagonalSSM(KeepsExact):
    """One diagonal state space model for each channel. `(batch, seq, dim)` to `(batch, seq, dim)`.

        x_t = exp(dt A) x_{t-1} + u_t,    y_t = 2 Re(C (exp(dt A) - 1) / A x_t) + D u_t

    which is `x' = A x + B u, y = C x + D u` with B = 1, held constant over each step dt, of which x is kept before B is
    applied. A has complex numbers in pairs, of which one half is kept. The kernel and the initialisations 'lin' and
    'inv' are those of Gu et al. 2022, arXiv 2206.11893.

    A sequence is convolved with the kernel `2 Re(C (exp(dt A) - 1) / A exp(dt A)^t)`, a step runs the recurrence.
    Powers of `exp(dt A)` up to t are products of a small one and a multiple of `sqrt(seq)`, so that kernel, state and
    what the state adds are matrix products.

    Time `O(seq * (log(seq) + state_dim) * dim)`. The state is x, `(batch, dim, state_dim / 2, 2)`.
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
        """Operations of a pass over n tokens: the convolution, and the kernel by complex products."""
        dim, states = self.c.shape[:2]
        return conv_products(n, dim, self.fft) + 8 * n * dim * states

    def initial_state(self, batch: int, like: Tensor) -> Tensor:
        return like.new_zeros(batch, *self.c.shape, dtype=torch.promote_types(like.dtype, torch.float32))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """`dt A` and what x is read with, complex `(dim, state_dim / 2)`, in float32 at least."""
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

        # t = row * size + column
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
        # newest first, for the sum over t of exp(dt A)^t u
        newest = F.pad(u.flip(1).to(exact).mT, (0, rows * size - n)).unflatten(-1, (rows, size))
        added = ((newest.to(step.dtype) @ columns_power.mT) * rows_power.mT).sum(dim=-2)
        return y, keep(state, torch.view_as_real(x * (step * n).exp() + added))


class S4D(nn.Module):
    """A diagonal state space model for each channel, GELU, and a gated linear map that mixes channels.

    Gu et al. 2022, arXiv 2206.11893; the layer around it is S4's (Gu et al. 2022, arXiv 2111.00396).
    `(batch, seq, dim)` to `(batch, seq, dim)`. Time and state: see `DiagonalSSM`.

    Args:
        dim: width of the tokens.
        state_dim: N, size of each channel's state, even.
        init: of A: 'lin', -1/2 + i pi n; or 'inv', -1/2 + i N / pi (N / (2 n + 1) - 1).
        fft: what the convolution runs on, 'torch' or 'monarch': see `causal_conv`.
    """

    roles: ClassVar[Mapping[str, str]] = dict(ssm='kernel')

    def __init__(
        self,
        *,
        dim: int,
        state_dim: int = 64,
        init: Literal['lin', 'inv'] = 'lin',
        fft: Literal['torch', 'monarch'] = 'torch',
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.ssm = DiagonalSSM(dim, state_dim=state_dim, init=init, fft=fft)
        self.to_out = nn.Linear(dim, 2 * dim)

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside."""
        return self.ssm.products(n)

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return (self.ssm.initial_state(batch, like),)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        y, after = self.ssm(self.norm(x), state and state[0])
        return F.glu(chain(F.gelu(y), self.to_out), dim=-1), None if after is None else (after,)


class H3(nn.Module):
    """Two state space models and two gates: keys are shifted, meet values, are remembered, and asked for by queries.

        y = q * diagonal(shift(k) * v)

    `shift` is the state space model whose matrix shifts its state by one: a learned sum over the last `shift_dim`
    keys, and a skip. `diagonal` is a `DiagonalSSM`. Heads have width 1. Fu et al. 2023, arXiv 2212.14052,
    section 3. `(batch, seq, dim)` to `(batch, seq, dim)`.

    Time `O(seq * (log(seq) + state_dim) * dim)`. Its state are the last keys, `(batch, shift_dim - 1, dim)`, and that
    of the diagonal model, `(batch, dim, state_dim / 2, 2)`.

    Args:
        dim: width of the tokens.
        state_dim: of the diagonal model, even.
        shift_dim: of the shift model.
        init: of the diagonal model, as for `S4D`.
        fft: what convolutions run on, 'torch' or 'monarch'.
    """

    roles: ClassVar[Mapping[str, str]] = dict(ssm='kernel', shift_ssm='kernel')

    def __init__(
        self,
        *,
        dim: int,
        state_dim: int = 64,
        shift_dim: int = 64,
        init: Literal['lin', 'inv'] = 'lin',
        fft: Literal['torch', 'monarch'] = 'torch',
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.shift_ssm = ShortConv(dim, check_int('shift_dim', shift_dim))
        self.ssm = DiagonalSSM(dim, state_dim=state_dim, init=init, fft=fft)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside."""
        return self.ssm.products(n) + 2 * n * self.shift_ssm.kernel.numel()

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return self.shift_ssm.initial_state(batch, like), self.ssm.initial_state(batch, like)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        before, memory = state or (None, None)
        q, k, v = chain(x, self.norm, self.to_qkv).chunk(3, dim=-1)
        shifted, before = self.shift_ssm(k, before)
        remembered, memory = self.ssm(shifted * v, memory)
        return chain(q * remembered, self.to_out), None if before is None or memory is None else (before, memory)


class ShortConv(nn.Module):
    """A causal convolution over a few tokens, channel by channel, that begins as the identity and some noise.

    `(batch, seq, dim)` to `(batch, seq, dim)`. Its state are the last `taps - 1` tokens, `(batch, taps - 1, dim)`.
    """

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        # the newest token's tap first
        kernel = torch.randn(taps, dim) * taps**-0.5
        kernel[0] += 1
        self.kernel = nn.Parameter(kernel)

    def initial_state(self, batch: int, like: Tensor) -> Tensor:
        taps, dim = self.kernel.shape
        return like.new_zeros(batch, taps - 1, dim)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        before = len(self.kernel) - 1
        padded = F.pad(x, (0, 0, before, 0)) if state is None else torch.cat((state.to(x.dtype), x), dim=1)
        kernel = self.kernel.flip(0).t()[:, None].to(x.dtype)
        y = F.conv1d(padded.mT, kernel, groups=x.shape[-1]).mT
        return y, keep(state, padded[:, padded.shape[1] - before :])
