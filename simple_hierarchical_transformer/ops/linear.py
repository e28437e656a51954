"""Linear maps, by the faster of two kernels, that keep little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

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
Matrix = tuple[Tensor, Tensor | None]


def register_plain(module_class: type[nn.Module]) -> type[nn.Module]:
    """Registers a class whose call a fused route may replace: it draws no random numbers and changes no state."""
    PLAIN[module_class] = module_class.forward
    return module_class


# each with its `forward`, which a library that patches classes may replace
PLAIN: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.LayerNorm, RMSNorm, nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh)
}
# tensors that the kernels here may read; quantized and sharded ones are subclasses with operations of their own
DENSE = {Tensor, nn.Parameter}
DENSE_OR_NONE = {*DENSE, type(None)}


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the `forward` of a registered class and nothing else.

    False for subclasses and wrappers (LoRA, parametrizations), compiled or patched modules, and modules with hooks,
    their own or global ones. A fused route must call those.
    """
    kind = type(module)
    return (
        # looked up first: modules of TorchScript have no `forward` to ask the class for
        kind in PLAIN and PLAIN[kind] is kind.forward and is_untouched(module) and not _has_any_global_hook()
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the `forward` of its class: it has no hooks, and is not patched or compiled."""
    return not has_hooks(module) and 'forward' not in module.__dict__ and module._compiled_call_impl is None


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on the module itself."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_dense(*tensors: Tensor | None) -> bool:
    """Whether the kernels here may read these tensors: none of them is a tensor subclass."""
    return DENSE_OR_NONE.issuperset(map(type, tensors))


def chain(x: Tensor, *parts: Part) -> Tensor:
    """`parts` applied to x in turn, where what stands before a linear map is not kept for the backward pass.

    A part is a module, or a function of one tensor that has no parameters and gives the same each time. A norm or an
    activation followed by a linear map runs as one operation (`linear`) where both are plain (`is_plain`). All other
    parts are called, so hooks fire, and wrappers, replaced modules and dropout take effect.
    """
    if not torch.is_grad_enabled() or is_traced():
        for part in parts:
            matrix = matrix_of(part)
            x = part(x) if matrix is None else product(x, *matrix)
        return x
    before: Part | None = None
    for part in parts:
        matrix = matrix_of(part)
        if matrix is not None:
            x, before = linear(x, *matrix, after=before), None
            continue
        x = x if before is None else before(x)
        before = part
    return x if before is None else before(x)


def matrix_of(part: Part) -> Matrix | None:
    """The weight `(dim_out, dim_in)` and bias of a plain linear map, None for any other part.

    A Conv1d without groups, padding or dilation counts as the map of its windows, `(dim_in * taps)` numbers each.
    """
    kind = type(part)
    if (kind is not nn.Linear and kind is not nn.Conv1d) or not is_plain(part):  # type: ignore[arg-type]
        return None
    # an attribute of a module takes longer to find
    weights = part._parameters  # type: ignore[attr-defined]
    if weights.get('weight') is None or 'bias' not in weights or not is_dense(*weights.values()):
        return None
    weight, bias = weights['weight'], weights['bias']
    if kind is nn.Conv1d and (part.groups, part.padding, part.dilation) != (1, (0,), (1,)):  # type: ignore[attr-defined]
        return None
    return (weight if kind is nn.Linear else weight.flatten(1)), bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, after: Part | None = None) -> Tensor:
    """`F.linear(after(x), weight, bias)`, and `after` is a cheap part: a norm, an activation, a gathering of windows.

    Where `after` is plain, only `x` is kept for the backward pass, which forms `after(x)` again. In a feed-forward that
    halves the memory, and the product is not computed twice, as it would be by a checkpoint around both.

    float32 on a CPU runs on faster kernels than `F.linear` has. A step of generation multiplies each weight by a
    vector or a few, so its time is the time to read the weights. The BLAS reads them at half the memory's speed or
    less. A batched product, whose batches are slices of the weight, reaches the memory's speed for a row or two,
    oneDNN's kernel for more. oneDNN is also faster than the BLAS for many rows (benchmarks/linear.py).
    """
    function = None if after is None else as_function(after)
    if after is not None and function is None:
        x, after = after(x), None
    fn, params = function or (None, ())
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *params))
    if trains and not is_traced() and (after is not None or is_served(x, weight)):
        dtype = None if weight.dtype == torch.float64 else autocast_dtype(x.device)
        return RecomputingLinear.apply(fn, dtype, weight, bias, x, *params)
    x = x if after is None else after(x)
    return F.linear(x, weight, bias) if trains else product(x, weight, bias)


def is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether the faster kernels are for these: float32 on a CPU, outside of autocast, and nothing traces."""
    return (
        x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.device.type == 'cpu'
        and is_dense(x, weight)
        and autocast_dtype(x.device) is None
        and not is_traced()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast, if it is on, has matrices multiplied in. Not every device knows it: 'meta' does not."""
    # a question that not every version of the compiler can trace; 'meta' is not compiled for
    asks = not torch.compiler.is_compiling()
    if (asks and not torch.amp.is_autocast_available(device.type)) or not torch.is_autocast_enabled(device.type):
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


def as_function(part: Part) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """A part as a function of its input and its parameters, None where only a call of the part is right."""
    module = part.func if isinstance(part, partial) else part
    if not isinstance(module, nn.Module):
        return part, ()
    if not is_plain(module):
        return None
    if isinstance(module, RMSNorm):
        return (rms_norm, (module.gamma,)) if is_dense(module.gamma) else None
    if isinstance(module, nn.LayerNorm):
        eps = module.eps
        return (
            (lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, eps), (module.weight, module.bias))
            if module.weight is not None and module.bias is not None and is_dense(module.weight, module.bias)
            else None
        )
    if module._parameters or module._modules or getattr(module, 'inplace', False):
        # a gradient could not reach the first two, and what is kept must stay as it is
        return None
    # `forward` and not a call, so that hooks registered after the forward pass do not fire in the backward pass
    return (partial(module.forward, **part.keywords) if isinstance(part, partial) else module.forward), ()


@register_plain
class Chain(nn.Sequential):
    """`nn.Sequential` that runs as a `chain`."""

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, *self)


def effective_weight(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix `(dim_out, dim_in)` that a linear map of `like` `(..., dim_in)` multiplies by.

    A wrapped map (LoRA) is asked for what it makes of each unit vector.
    """
    matrix = matrix_of(layer)
    if matrix is not None:
        return matrix[0]
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return (layer(units) - layer(torch.zeros_like(units))).t()


def begin_at_zero(module: nn.Module | None) -> None:
    """Makes a map one that gives zeros, where there is one."""
    for p in () if module is None else module.parameters():
        nn.init.zeros_(p)
