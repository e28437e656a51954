"""Cross entropy of a linear head without materialising all logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import autocast_dtype, linear, matrix_of

# how many logits are in memory at a time; few enough rows would leave the matmul short of work
CHUNK = 1 << 22
MIN_CHUNK_ROWS = 128


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with each chunk's gradients formed while its logits are at hand.

    So logits live for a chunk only, and nothing is computed twice: Hsu et al. 2024, arXiv 2410.10989, section 3.2.
    Those gradients have no graph of their own. A backward pass with `create_graph` forms the logits again, whole.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype, train: bool
    ) -> Tensor:
        rows, sets = targets.shape
        size = len(weight) // sets
        chunk = max(CHUNK // size, MIN_CHUNK_ROWS)

        # gradients are formed without what all rows are divided by, which is too small for half precision
        top = row_weights.amax().clamp(min=torch.finfo(row_weights.dtype).tiny) if rows else row_weights.new_ones(())
        given, row_weights = row_weights, row_weights / top
        total = row_weights.new_zeros(())
        grad_x = torch.zeros_like(x, dtype=row_weights.dtype) if train else None
        grad_weight = (torch.empty_like if rows else torch.zeros_like)(weight) if train else None
        inputs = x.to(dtype)

        for k in range(sets):
            part = slice(k * size, (k + 1) * size)
            matrix = weight[part].to(dtype)
            # counted so that a compiler has a graph for each number of chunks, not of rows
            for i in range(-(-rows // chunk)):
                at = slice(i * chunk, (i + 1) * chunk)
                target, scale = targets[at, k, None], row_weights[at, k, None]
                logits = linear(inputs[at], matrix)
                log_probs = logits.to(row_weights.dtype).log_softmax(dim=-1)
                total = total - (log_probs.gather(1, target) * scale).sum()
                if grad_x is None or grad_weight is None:
                    continue
                # softmax minus one-hot; the weight of a row goes to the smaller factor
                grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(scale)).to(dtype)
                grad_x[at] += linear(grad, matrix.t()) * scale
                scaled = (inputs[at] * scale).to(dtype)
                if i == 0:
                    grad_weight[part] = grad.t() @ scaled
                elif dtype == weight.dtype:
                    grad_weight[part].addmm_(grad.t(), scaled)
                else:
                    grad_weight[part] += grad.t() @ scaled

        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight, top, x, weight, targets, given)
            ctx.dtype = dtype
        return total * top

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, grad_weight, top, x, weight, targets, row_weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            # views, so that gradients end at these inputs although one may depend on the other
            x, weight = x.view_as(x), weight.view_as(weight)
            logits = F.linear(x.to(ctx.dtype), weight.to(ctx.dtype))
            loss = weighted_cross_entropy(logits, targets, row_weights)
            wanted = [t for t in (x, weight) if t.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in (x, weight)), None, None, None, None
        grad = grad * top
        # a large vocabulary's gradient is the largest tensor there is: copied only where it may be asked for again
        again = graph_is_kept() or grad_weight.dtype != grad.dtype
        grad_weight = (grad_weight * grad).to(grad_weight.dtype) if again else grad_weight.mul_(grad)
        return (grad_x * grad).to(x.dtype), grad_weight, None, None, None, None


def graph_is_kept() -> bool:
    """Whether the backward pass that runs may run again (`retain_graph`)."""
    ask = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', None)
    return torch.compiler.is_compiling() or ask is None or ask()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """The weighted sum of the cross entropies of `x @ weight.T`, of which no more than a chunk is ever in memory.

    x: `(rows, dim)`; weight: `(sets * num_tokens, dim)`, a matrix for each of the sets; targets and row_weights:
    `(rows, sets)`. Logits are formed in autocast's dtype, if it is on; softmax and sums in float32 at least. Under the
    transforms of torch.func, and for second derivatives, the logits of all rows are formed at once.
    """
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
    train = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    row_weights = row_weights.to(torch.promote_types(x.dtype, torch.float32))
    # logits that are no wider than what they are made of need no chunks, and a GPU takes half the time for them at
    # once; but not in float16, whose gradients would be too small
    few = x.is_cuda and len(weight) <= x.shape[-1] and dtype != torch.float16
    if few or torch._C._are_functorch_transforms_active():
        # the transforms of torch.func see through plain operations alone
        return weighted_cross_entropy(F.linear(x, weight), targets, row_weights)
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, row_weights, dtype, train)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """The same of logits that are at hand, `(rows, sets * num_tokens)`."""
    log_probs = logits.unflatten(-1, (targets.shape[1], -1)).to(row_weights.dtype).log_softmax(-1)
    return -(log_probs.gather(-1, targets[..., None])[..., 0] * row_weights).sum()


def cross_entropy(
    x: Tensor,
    head: nn.Module,
    targets: Tensor,
    ignore_index: int,
    *,
    count: Tensor | None = None,
    sample: float = 1.0,
) -> Tensor:
    """Mean over the targets that are not ignored; zero, and not nan, where all of them are.

    x: `(batch, seq, dim)`; targets: `(batch, seq)`, or `(batch, seq, sets)` where each token has several; head: maps x
    to `sets * num_tokens` logits. With `sample` below 1, that share of the tokens is drawn at random, and the
    expectation is the loss over all. With `count`, the sum over targets divided by that.

    A plain head without a bias runs as `linear_cross_entropy`. Any other is called, with x as it comes, or with the
    drawn tokens `(tokens, dim)`.
    """
    targets = (targets[..., None] if targets.ndim == 2 else targets).flatten(0, 1)
    counted = targets != ignore_index
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = 1 / (counted.sum() if count is None else count).clamp(min=1).to(exact)
    # an ignored target may be no id at all
    targets = targets.masked_fill(~counted, 0)

    rows = len(targets)
    drawn = max(round(sample * rows), 1) if rows else 0
    if drawn < rows:
        # each row stands for as many as were left out, so that the expectation is the mean over all
        scale = scale * (rows / drawn)
        index = torch.randperm(rows, device=x.device)[:drawn]
        x, targets, counted = x.flatten(0, 1)[index], targets[index], counted[index]
    weight, bias = matrix_of(head) or (None, None)
    if weight is None or bias is not None:
        return weighted_cross_entropy(head(x).flatten(0, -2), targets, counted * scale)
    return linear_cross_entropy(x.flatten(0, -2), weight, targets, counted * scale)
