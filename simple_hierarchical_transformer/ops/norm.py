"""The root mean square norm that blocks and merges share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import no_autocast
from .tracing import is_traced

# keeps padding finite: the square of |x| = 1e-12
EPS = 1e-24


class RMSNorm(nn.Module):
    """`x / |x| * sqrt(dim) * gamma` over the last dimension. Zhang & Sennrich 2019, arXiv 1910.07467.

    Maps `(..., dim)` to the same shape.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """`RMSNorm` as a function. x: `(..., dim)`; gamma: `(dim,)`. The result has the dtype of `gamma`."""
    # under autocast the norm stays in the dtype of its weight
    x = x.to(gamma.dtype)
    is_served = x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64)
    if is_served and torch.is_grad_enabled() and not is_traced():
        return RootMeanSquare.apply(x, gamma)
    return F.rms_norm(x, gamma.shape, gamma, eps=EPS)


class RootMeanSquare(torch.autograd.Function):
    """`F.rms_norm` in half of the passes over memory. PyTorch has no fused kernel for it on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma)
        return (x * inverse_rms(x)).mul_(gamma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # with r = 1 / rms(x):  dx = r * (gamma * dy) - x * r^3 / dim * <x, gamma * dy>
        x, gamma = ctx.saved_tensors
        with no_autocast(x.device):
            inverse = inverse_rms(x)
            scaled = grad * x
            shrink = (scaled @ gamma)[..., None] * inverse**3 / x.shape[-1]
            grad_x = torch.addcmul((grad * gamma) * inverse, x, shrink, value=-1)
            return grad_x, scaled.reshape(-1, x.shape[-1]).t() @ inverse.reshape(-1)


def inverse_rms(x: Tensor) -> Tensor:
    """`1 / rms(x)` over the last dimension: `(..., dim)` to `(..., 1)`."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + EPS).rsqrt()
