"""Linear maps, by the faster of two kernels, that keep little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import RMSNorm, is_traced, rms_norm

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
# below this size of a weight the call costs more than the product
MIN_WEIGHT = 1 << 15
# below this size of a weight that widens, the BLAS is faster at its gradient
MIN_WIDENING = 1 << 19
# into how many slices a weight is cut: enough for the threads of a desktop, and a divisor of most widths
SLICES = 32
FEW_ROWS = (1, 2)

Part = Callable[[Tensor], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, after: Part | None = None) -> Tensor:
    """`F.linear(after(x), weight, bias)`, and `after` is a cheap part: a norm, an activation, a gathering of windows.

    For the backward pass only `x` is kept, and `after(x)` formed again: of a feed-forward that is half, and the
    product is not computed twice, as it would be by a checkpoint around both.

    float32 on a CPU runs on faster kernels than `F.linear` has. A step of generation multiplies each weight by a
    vector or a few, and is over when the weights have been read. The BLAS reads them at half the memory's pace or
    less. A batched product, whose batches are slices of the weight, keeps the memory's pace for a row or two, oneDNN's
    kernel for more. That one is also faster than the BLAS for many rows (benchmarks/linear.py).
    """
    fn, params = (None, ()) if after is None else as_function(after)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *params))
    if trains and not is_traced() and (after is not None or is_served(x, weight)):
        dtype = None if weight.dtype == torch.float64 else autocast_dtype(x.device)
        return RecomputingLinear.apply(fn, dtype, weight, bias, x, *params)
    x = x if after is None else after(x)
    return F.linear(x, weight, bias) if trains else product(x, weight, bias)


def is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether the faster kernels are for these: float32 on a CPU, on its own (not compiled, not in autocast)."""
    return (
        x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.device.type == 'cpu'
        and autocast_dtype(x.device) is None
        and not torch.compiler.is_compiling()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast, if it is on, has matrices multiplied in. Not every device knows it: 'meta' does not."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the kernel that is fastest for these, without gradients where it is not `F.linear` itself."""
    if not is_served(x, weight):
        return F.linear(x, weight, bias)

    dim_out, dim_in = weight.shape
    rows = x.numel() // dim_in
    if rows in FEW_ROWS and dim_out % SLICES == 0 and weight.is_contiguous():
        columns = x.reshape(rows, dim_in).t().expand(SLICES, -1, -1)
        out = torch.bmm(weight.view(SLICES, -1, dim_in), columns).view(dim_out, rows)
        out = out.t().contiguous().view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    if HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


class RecomputingLinear(torch.autograd.Function):
    """`product(fn(x, *params), weight, bias)`, of which `x` is kept and not what `fn` makes of it.

    Chen et al. 2016, arXiv 1604.06174, section 4.1: what is cheap to compute is dropped, what is dear is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fn: Callable[..., Tensor] | None,
        dtype: torch.dtype | None,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        *params: Tensor,
    ) -> Tensor:
        ctx.fn, ctx.dtype = fn, dtype
        ctx.save_for_backward(weight, bias, x, *params)

        x = x if fn is None else fn(x, *params)
        if dtype is None:
            return product(x, weight, bias)
        # by hand: what autocast casts itself it would keep, without its gradient, for whoever uses the weight next
        with torch.autocast(x.device.type, enabled=False):
            return product(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *inputs = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # gradients end at the inputs, which in a graph of gradients have a history of their own
        create_graph = torch.is_grad_enabled()
        inputs = [t.view_as(t) if create_graph else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        autocast = nullcontext() if ctx.dtype is None else torch.autocast(grad.device.type, dtype=ctx.dtype)
        with torch.enable_grad(), autocast:
            x = inputs[0] if ctx.fn is None else ctx.fn(*inputs)

        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0).to(bias.dtype)
        grads: list[Tensor | None] = [None] * len(inputs)
        if x.requires_grad:
            grad_x = linear(grad, weight.t().to(grad.dtype)).to(x.dtype)
            wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
            found = (
                torch.autograd.grad(x, [inputs[i] for i in wanted], grad_x, create_graph=create_graph)
                if ctx.fn
                else [grad_x]
            )
            for i, each in zip(wanted, found, strict=True):
                grads[i] = each
        return None, None, grad_weight, grad_bias, *grads


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x`, of `(rows, dim_out)` and `(rows, dim_in)`."""
    if x.shape[1] >= grad.shape[1]:
        return linear(grad.t(), x.t())
    # oneDNN copies its first factor's transpose: let it be the narrow one
    if x.shape[1] * grad.shape[1] >= MIN_WIDENING:
        return linear(x.t(), grad.t()).t()
    return grad.t() @ x


def as_function(part: Part) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A part as a function of its input and of the tensors it has, whatever a wrapper has put in their place."""
    if isinstance(part, RMSNorm):
        return rms_norm, (part.gamma,)
    if isinstance(part, nn.LayerNorm):
        eps = part.eps
        return lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, eps), (part.weight, part.bias)
    return part, ()


class Linear(nn.Linear):
    """`nn.Linear` on `linear`: `layer(x, after=norm)` is `layer(norm(x))`."""

    def forward(self, x: Tensor, after: Part | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, after)


class Chain(nn.Sequential):
    """`nn.Sequential`, where what stands between two linear maps is not kept for the backward pass.

    It is formed again there, so it has to give the same again: an activation, a norm, no dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        between: nn.Module | None = None
        for part in self:
            if isinstance(part, Linear):
                x, between = part(x, between), None
            else:
                x, between = x if between is None else between(x), part
        return x if between is None else between(x)


def begin_at_zero(module: nn.Module | None) -> None:
    """Makes a map one that gives zeros, where there is one."""
    for p in () if module is None else module.parameters():
        nn.init.zeros_(p)
