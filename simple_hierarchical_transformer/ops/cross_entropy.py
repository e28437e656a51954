"""Cross entropy of a linear head, without holding all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import linear, matrix_of
from .precision import autocast_dtype, no_autocast
from .tracing import is_transformed

# the most logits in memory at a time, and the fewest rows for which a matrix product is efficient
CHUNK = 1 << 22
MIN_CHUNK_ROWS = 128


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`, whose forward pass also computes the gradients, chunk by chunk.

    Logits exist for one chunk at a time, and nothing is computed twice: Hsu et al. 2024, arXiv 2410.10989, section 3.2.
    These gradients have no graph. A backward pass with `create_graph` computes all logits again at once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype, train: bool
    ) -> Tensor:
        rows, sets = targets.shape
        size = len(weight) // sets
        chunk = max(CHUNK // size, MIN_CHUNK_ROWS)

        # gradients leave out the factor that all rows share, because it is too small for half precision
        top = row_weights.amax().clamp(min=torch.finfo(row_weights.dtype).tiny) if rows else row_weights.new_ones(())
        given, row_weights = row_weights, row_weights / top
        total = row_weights.new_zeros(())
        grad_x = torch.zeros_like(x, dtype=row_weights.dtype) if train else None
        grad_weight = (torch.empty_like if rows else torch.zeros_like)(weight) if train else None
        inputs = x.to(dtype)

        for k in range(sets):
            part = slice(k * size, (k + 1) * size)
            matrix = weight[part].to(dtype)
            # a loop over chunk numbers: a compiler then makes a graph for each number of chunks, not of rows
            for i in range(-(-rows // chunk)):
                at = slice(i * chunk, (i + 1) * chunk)
                target, scale = targets[at, k, None], row_weights[at, k, None]
                logits = linear(inputs[at], matrix)
                log_probs = logits.to(row_weights.dtype).log_softmax(dim=-1)
                total = total - (log_probs.gather(1, target) * scale).sum()
                if grad_x is None or grad_weight is None:
                    continue
                # softmax minus one-hot; the row weight multiplies the smaller factor
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, top, x, weight, targets, row_weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            # views make gradients stop at these inputs, even if one of them depends on the other
            x, weight = x.view_as(x), weight.view_as(weight)
            logits = F.linear(x.to(ctx.dtype), weight.to(ctx.dtype))
            loss = weighted_cross_entropy(logits, targets, row_weights)
            inputs = [t for t in (x, weight) if t.requires_grad]
            grads = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
            return *(next(grads) if t.requires_grad else None for t in (x, weight)), None, None, None, None
        grad = grad * top
        # the gradient of a large vocabulary is the largest tensor of all: copy it only if a second pass may need it
        copies = graph_is_kept() or grad_weight.dtype != grad.dtype
        grad_weight = (grad_weight * grad).to(grad_weight.dtype) if copies else grad_weight.mul_(grad)
        return (grad_x * grad).to(x.dtype), grad_weight, None, None, None, None


def graph_is_kept() -> bool:
    """Whether the current backward pass keeps its graph, so that it may run again (`retain_graph`)."""
    ask = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', None)
    return torch.compiler.is_compiling() or ask is None or ask()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """Weighted sum of the cross entropies of the logits `x @ weight.T`, in nats. Holds one chunk of logits at a time.

    Logits have the dtype of autocast, if it is on. Softmax and sums run in float32 or float64. The transforms of
    torch.func and second derivatives form the logits of all rows at once.

    Args:
        x: `(rows, dim)`.
        weight: `(sets * num_tokens, dim)`, one matrix for each set.
        targets: ids, `(rows, sets)`.
        row_weights: the weight of each cross entropy, `(rows, sets)`.
    """
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
    train = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    row_weights = row_weights.to(torch.promote_types(x.dtype, torch.float32))
    # logits that are no wider than their inputs need no chunks, and a GPU computes them at once in half the time. Not
    # in float16, where gradients would underflow
    is_small = x.is_cuda and len(weight) <= x.shape[-1] and dtype != torch.float16
    if is_small or is_transformed():
        return weighted_cross_entropy(F.linear(x, weight), targets, row_weights)
    with no_autocast(x.device):
        return _LinearCrossEntropy.apply(x, weight, targets, row_weights, dtype, train)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """Weighted sum of the cross entropies of logits `(rows, sets * num_tokens)`. See `linear_cross_entropy`."""
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
    """Mean cross entropy over the targets that are not ignored, in nats. Zero, not NaN, if all are ignored.

    A plain head without a bias runs as `linear_cross_entropy`. Any other head is called with `x`, or with the sampled
    tokens `(tokens, dim)`.

    Args:
        x: `(batch, seq, dim)`.
        head: maps `x` to `sets * num_tokens` logits.
        targets: `(batch, seq)`, or `(batch, seq, sets)` where each token has several targets.
        ignore_index: the target to ignore.
        count: divides the sum over targets in place of the number of targets.
        sample: the share of tokens to draw at random. The expected value is the loss over all tokens.
    """
    targets = (targets[..., None] if targets.ndim == 2 else targets).flatten(0, 1)
    counted = targets != ignore_index
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = 1 / (counted.sum() if count is None else count).clamp(min=1).to(exact)
    # an ignored target need not be a valid id
    targets = targets.masked_fill(~counted, 0)

    rows = len(targets)
    drawn = max(round(sample * rows), 1) if rows else 0
    if drawn < rows:
        # the drawn rows stand for all rows, so that the expectation is the mean over all
        scale = scale * (rows / drawn)
        index = torch.randperm(rows, device=x.device)[:drawn]
        x, targets, counted = x.flatten(0, 1)[index], targets[index], counted[index]
    weight, bias = matrix_of(head) or (None, None)
    if weight is None or bias is not None:
        return weighted_cross_entropy(head(x).flatten(0, -2), targets, counted * scale)
    return linear_cross_entropy(x.flatten(0, -2), weight, targets, counted * scale)
