"""Linear maps, by the faster of two kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
# below this size of a weight the call costs more than the product
MIN_WEIGHT = 1 << 15
# below this size of a weight the BLAS is faster at its gradient
MIN_WEIGHT_GRAD = 1 << 19
# into how many slices a weight is cut: enough for the threads of a desktop, and a divisor of most widths
SLICES = 32
FEW_ROWS = (1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by faster kernels where they serve: float32 on a CPU, on its own (not compiled, not in autocast).

    A step of generation multiplies each weight by a vector or a few, and is over when the weights have been read. The
    BLAS behind `F.linear` reads them at half the memory's pace or less. A batched product, whose batches are slices
    of the weight, keeps the memory's pace for a row or two, oneDNN's kernel for more. That one is also faster than
    the BLAS for many rows, in training too (benchmarks/linear.py).
    """
    fast = (
        x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.device.type == 'cpu'
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
    )
    if not fast:
        return F.linear(x, weight, bias)

    dim_out, dim_in = weight.shape
    rows = x.numel() // dim_in
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if rows in FEW_ROWS and dim_out % SLICES == 0 and not trains and weight.is_contiguous():
        columns = x.reshape(rows, dim_in).t().expand(SLICES, -1, -1)
        out = torch.bmm(weight.view(SLICES, -1, dim_in), columns).view(dim_out, rows).t().reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    if HAS_ONEDNN:
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class OneDNNLinear(torch.autograd.Function):
    """`x @ weight.T + bias` and its gradients through oneDNN's kernel, float32 on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.t())
        if ctx.needs_input_grad[1]:
            rows, columns = grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1])
            serves = weight.numel() >= MIN_WEIGHT_GRAD
            grad_weight = linear(rows, columns.t()) if serves else rows @ columns
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias


class Linear(nn.Linear):
    """`nn.Linear` on `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
