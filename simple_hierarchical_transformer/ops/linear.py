"""Linear maps on the faster of two kernels, which store little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .norm import RMSNorm, rms_norm
from .precision import autocast_dtype, no_autocast
from .tracing import is_traced

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
# a weight with fewer elements costs more to dispatch than to multiply
MIN_WEIGHT = 1 << 15
# for weights with more outputs than inputs: with fewer elements, the BLAS computes the gradient faster
MIN_WIDENING = 1 << 19
# the number of slices of a weight: enough for the threads of a desktop computer, and a divisor of most widths
SLICES = 32
FEW_ROWS = (1, 2)

Part = Callable[[Tensor], Tensor]
Matrix = tuple[Tensor, Tensor | None]


def register_plain(module_class: type[nn.Module]) -> type[nn.Module]:
    """Register a class whose call a fused route may replace: it draws no random numbers and changes no state."""
    PLAIN[module_class] = module_class.forward
    return module_class


# each class with its `forward`: libraries that patch classes may replace this
PLAIN: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.LayerNorm, RMSNorm, nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh)
}
# types of tensors that the kernels here may read; quantized and sharded tensors are subclasses that override operations
DENSE = {Tensor, nn.Parameter}
DENSE_OR_NONE = {*DENSE, type(None)}


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the `forward` of a registered class and nothing else.

    False for subclasses and wrappers (LoRA, parametrizations), for compiled or patched modules, and where hooks are
    registered, on the module or globally. A fused route must call such modules.
    """
    kind = type(module)
    return (
        # the lookup comes first: classes of TorchScript modules have no `forward`
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
    """Whether the kernels here may read these tensors: none is a tensor subclass."""
    return DENSE_OR_NONE.issuperset(map(type, tensors))


def chain(x: Tensor, *parts: Part) -> Tensor:
    """Apply `parts` to `x` in turn, without storing the input of a linear map for the backward pass.

    A part is a module, or a deterministic function of one tensor without parameters. A norm or an activation followed
    by a linear map runs as one operation (`linear`) where both are plain (`is_plain`). All other parts are called.
    Hooks, wrappers, replaced modules and dropout therefore take effect.
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
    """The weight `(dim_out, dim_in)` and bias of a plain linear map. None for any other part.

    A Conv1d without groups, padding or dilation is a linear map of its windows, of `dim_in * taps` values each.
    """
    kind = type(part)
    if (kind is not nn.Linear and kind is not nn.Conv1d) or not isinstance(part, nn.Module) or not is_plain(part):
        return None
    # the table is faster to read than attributes of a module
    weights = part._parameters
    weight = weights.get('weight')
    if weight is None or 'bias' not in weights or not is_dense(*weights.values()):
        return None
    if kind is nn.Conv1d and (part.groups, part.padding, part.dilation) != (1, (0,), (1,)):
        return None
    return (weight if kind is nn.Linear else weight.flatten(1)), weights['bias']


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, after: Part | None = None) -> Tensor:
    """`F.linear(after(x), weight, bias)`. Where `after` is plain, the backward pass computes `after(x)` again.

    Only `x` is stored then. This halves the memory of a feed-forward. A checkpoint around both would also compute the
    product twice.

    float32 on a CPU runs on faster kernels than those of `F.linear` (benchmarks/speed/linear.py). A step of generation
    multiplies each weight by one vector or a few, so its time is the time to read the weights. The BLAS reads them at
    half the memory bandwidth or less. A batched product, whose batches are slices of the weight, reaches the memory
    bandwidth for one row or two. oneDNN's kernel reaches it for more rows, and is also faster than the BLAS for many
    rows.

    Args:
        x: `(..., dim)`.
        weight: `(dim_out, dim_in)`.
        bias: `(dim_out,)`.
        after: a cheap part that runs before the product, such as a norm, an activation or a gathering of windows.
            It maps `x` to `(..., dim_in)`.

    Returns:
        `(..., dim_out)`.
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
    """Whether the faster kernels support these tensors: float32 on a CPU, without autocast or tracing."""
    return (
        x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.device.type == 'cpu'
        and is_dense(x, weight)
        and autocast_dtype(x.device) is None
        and not is_traced()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on the fastest kernel. The result has a gradient only if that kernel is `F.linear` itself."""
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
    """`product(fn(x, *params), weight, bias)`, which stores `x` instead of `fn(x)`.

    Chen et al. 2016, arXiv 1604.06174, section 4.1: drop the results of cheap operations, keep those of expensive ones.
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
        # cast explicitly: autocast would cache its cast of the weight, which has no gradient here, and use it later
        with no_autocast(x.device):
            return product(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *inputs = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # gradients must stop at the inputs, which with `create_graph` have a graph of their own
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
            trained = [i for i, t in enumerate(inputs) if t.requires_grad]
            found = (
                torch.autograd.grad(x, [inputs[i] for i in trained], grad_x, create_graph=create_graph)
                if ctx.fn
                else [grad_x]
            )
            for i, each in zip(trained, found, strict=True):
                grads[i] = each
        return None, None, grad_weight, grad_bias, *grads


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x`, `(dim_out, dim_in)`, for grad `(rows, dim_out)` and x `(rows, dim_in)`."""
    if x.shape[1] >= grad.shape[1]:
        return linear(grad.t(), x.t())
    # oneDNN copies the transpose of its first factor: make that the narrow one
    if x.shape[1] * grad.shape[1] >= MIN_WIDENING:
        return linear(x.t(), grad.t()).t()
    return grad.t() @ x


def as_function(part: Part) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """A part as a function of its input and its parameters. None where the part itself must be called."""
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
        # gradients would not reach parameters, and an operation in place would overwrite the stored input
        return None
    # `forward` instead of a call: hooks registered after the forward pass must not fire in the backward pass
    return (partial(module.forward, **part.keywords) if isinstance(part, partial) else module.forward), ()


@register_plain
class Chain(nn.Sequential):
    """An `nn.Sequential` that runs as a `chain`."""

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, *self)


def effective_weight(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix `(dim_out, dim_in)` of a linear map of `like` `(..., dim_in)`.

    A wrapped map (LoRA) is applied to the unit vectors.
    """
    matrix = matrix_of(layer)
    if matrix is not None:
        return matrix[0]
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return (layer(units) - layer(torch.zeros_like(units))).t()


def begin_at_zero(module: nn.Module | None) -> None:
    """Set all parameters of a module to zero, if there is a module."""
    for p in () if module is None else module.parameters():
        nn.init.zeros_(p)
