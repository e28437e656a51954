"""S4D: a diagonal state space model for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import chain
from ..ops.norm import RMSNorm
from .base import MixerState
from .ssm import DiagonalSSM


class S4D(nn.Module):
    """A diagonal state space model for each channel, then GELU and a gated linear map that mixes channels.

    The model is that of Gu et al. 2022, arXiv 2206.11893, in the layer of S4 (Gu et al. 2022, arXiv 2111.00396).
    `(batch, seq, dim)` to `(batch, seq, dim)`. See `DiagonalSSM` for time, state and arguments.
    """

    uses_position = False
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
        """Operations of a pass over `n` tokens, without products with weights."""
        return self.ssm.products(n)

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        return (self.ssm.initial_state(batch, like),)

    def forward(self, x: Tensor, state: MixerState | None = None, start: int = 0) -> tuple[Tensor, MixerState | None]:
        y, after = self.ssm(self.norm(x), state and state[0])
        return F.glu(chain(F.gelu(y), self.to_out), dim=-1), None if after is None else (after,)
