"""A short depthwise convolution, which H3 and Hyena share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import keep


class ShortConv(nn.Module):
    """A depthwise causal convolution over a few tokens. It starts as the identity plus noise.

    `(batch, seq, dim)` to `(batch, seq, dim)`. The state has the last `taps - 1` tokens, `(batch, taps - 1, dim)`.
    """

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        # the tap of the newest token comes first
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
