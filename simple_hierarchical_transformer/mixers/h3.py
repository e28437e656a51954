"""H3: two state space models and two gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from ..checks import check_int
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from .base import MixerState
from .short_conv import ShortConv
from .ssm import DiagonalSSM


class H3(nn.Module):
    """Two state space models with multiplicative gates. `(batch, seq, dim)` to `(batch, seq, dim)`.

        y = q * diagonal(shift(k) * v)

    `shift` is a state space model whose matrix shifts its state by one position: a learned sum over the last
    `shift_dim` keys, and a skip connection. `diagonal` is a `DiagonalSSM`. Heads have width 1. Fu et al. 2023, arXiv
    2212.14052, section 3.

    Time is `O(seq * (log(seq) + state_dim) * dim)`. The state has the last keys, `(batch, shift_dim - 1, dim)`, and the
    state of the diagonal model, `(batch, dim, state_dim / 2, 2)`.

    Args:
        dim: width of the tokens.
        state_dim: size of the state of each channel of the diagonal model, even.
        shift_dim: number of keys that the shift model sums.
        init: initial matrix of the diagonal model, see `DiagonalSSM`.
        fft: transform of the convolutions, 'torch' or 'monarch': see `causal_conv`.

    Raises:
        ValueError: a value is not allowed.
    """

    uses_position = False
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
        """Operations of a pass over `n` tokens, without products with weights."""
        return self.ssm.products(n) + 2 * n * self.shift_ssm.kernel.numel()

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        return self.shift_ssm.initial_state(batch, like), self.ssm.initial_state(batch, like)

    def forward(self, x: Tensor, state: MixerState | None = None, start: int = 0) -> tuple[Tensor, MixerState | None]:
        shift_state, ssm_state = state or (None, None)
        q, k, v = chain(x, self.norm, self.to_qkv).chunk(3, dim=-1)
        shifted, shift_state = self.shift_ssm(k, shift_state)
        y, ssm_state = self.ssm(shifted * v, ssm_state)
        y = chain(q * y, self.to_out)
        return y, None if shift_state is None or ssm_state is None else (shift_state, ssm_state)
