"""The root mean square norm that blocks and merges share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

# the mean of squares is only kept off zero, so that padding stays finite: |x| of 1e-12, squared
EPS = 1e-24


class RMSNorm(nn.Module):
    """`x / |x| * sqrt(dim) * gamma` over the last dimension. Zhang & Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


def measures_routes(mode: TorchDispatchMode) -> bool:
    return getattr(mode, 'measures_routes', False)


def is_traced() -> bool:
    """Whether plain operations are wanted: under the compiler, a transform of torch.func, or a dispatch mode.

    Dispatch modes (a FLOP counter, fake tensors, selective checkpoints) see operations of PyTorch alone. A mode that
    measures what the fused routes take has `measures_routes = True`, and leaves them as they are.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch._C._len_torch_dispatch_stack() > 0 and not all(map(measures_routes, dispatch_modes())))
    )


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    # under autocast the norm stays in the dtype of its weight
    x = x.to(gamma.dtype)
    served = x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64)
    if served and torch.is_grad_enabled() and not is_traced():
        return RootMeanSquare.apply(x, gamma)
    return F.rms_norm(x, gamma.shape, gamma, eps=EPS)


class RootMeanSquare(torch.autograd.Function):
    """`F.rms_norm`, which PyTorch has no kernel for on a CPU, in half of the passes over memory that it takes there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma)
        return (x * inverse_rms(x)).mul_(gamma)

    @staticmethod
    @torch.autocast('cpu', enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # with r = 1 / rms(x):  dx = r * (gamma * dy) - x * r^3 / dim * <x, gamma * dy>
        x, gamma = ctx.saved_tensors
        inverse = inverse_rms(x)
        along = grad * x
        shrink = (along @ gamma)[..., None] * inverse**3 / x.shape[-1]
        grad_x = torch.addcmul((grad * gamma) * inverse, x, shrink, value=-1)
        return grad_x, along.reshape(-1, x.shape[-1]).t() @ inverse.reshape(-1)


def inverse_rms(x: Tensor) -> Tensor:
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + EPS).rsqrt()
