"""The root mean square norm that blocks and merges share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / |x| * sqrt(dim) * gamma` over the last dimension. Zhang & Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # the mean of squares is only kept off zero, so that padding stays finite: |x| of 1e-12, squared
        # under autocast the norm stays in the dtype of its weight
        return F.rms_norm(x.to(self.gamma.dtype), self.gamma.shape, self.gamma, eps=1e-24)
