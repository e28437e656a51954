"""Learned boundaries: the routing module of H-Net, Hwang et al. 2025, arXiv 2507.07955, section 2.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import chain
from .base import Boundaries, Marks


class LearnedBoundaries(Boundaries):
    """A boundary where a token differs from the one before it, after a linear map of each.

        p_t = (1 - cos(W_q x_(t-1), W_k x_t)) / 2,    boundary where p_t > 1/2

    W_q and W_k start as the identity. The probability of the first token is 1. Hwang et al. 2025, arXiv 2507.07955,
    equation 4.

    Args:
        dim: the width of the finer tokens.
    """

    # an update of a router should not be orthogonal
    roles: ClassVar[Mapping[str, str]] = dict(to_q='head', to_k='head')

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        for each in (self.to_q, self.to_k):
            nn.init.eye_(each.weight)

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Marks:
        q, k = chain(x[:, :-1], self.to_q), chain(x[:, 1:], self.to_k)
        exact = torch.promote_types(q.dtype, torch.float32)
        probability = (1 - F.cosine_similarity(q.to(exact), k.to(exact), dim=-1)) / 2
        probability = torch.where(index == 0, 1.0, probability.clamp(0, 1))
        return Marks(probability > 0.5, probability)
