"""Linear recurrences over a sequence, in blocks that run in parallel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import first_of, is_transformed, side_of_square


def scan(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """`h[:, t] = a[:, t] * h[:, t - 1] + b[:, t]`, from `h[:, -1] = initial`. Real or complex.

    The sequence is split into about `sqrt(seq)` blocks. All blocks start from zeros and run in parallel, step by
    step. Then the end of each block is carried into the next. This takes `2 * sqrt(seq)` sequential steps, and three
    times the operations of the recurrence itself. Blelloch 1990, "Prefix Sums and Their Applications", describes it for
    a tree. It never divides by a product of gates, so a gate may be zero. Under the transforms of torch.func it runs
    step by step.

    Args:
        a: gates, of a shape that broadcasts to that of `b`.
        b: inputs, `(batch, seq, ...)`.
        initial: `(batch, ...)`, zeros by default.

    Returns:
        `h`, of the shape of `b`.
    """
    if initial is None:
        initial = torch.zeros_like(b[:, 0])
    if b.shape[1] == 1:
        return torch.addcmul(b, a, initial[:, None])
    if is_transformed():
        # these transforms see only plain operations
        steps = [initial]
        for gate, added in zip(a.unbind(1), b.unbind(1), strict=True):
            steps.append(gate * steps[-1] + added)
        return torch.stack(steps[1:], dim=1)
    return _Scan.apply(a, b, initial)


def _forward(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    n = b.shape[1]
    size = side_of_square(n)
    # under a compiler, the number of blocks must not depend on the exact length
    blocks = size if torch.compiler.is_compiling() else -(-n // size)

    def in_blocks(t: Tensor) -> Tensor:
        # steps come first, so that the tokens of one step are contiguous
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, blocks * size - n))
        return t.unflatten(1, (blocks, size)).movedim(2, 0).contiguous()

    gates, h = in_blocks(a), in_blocks(b)
    # products of gates from the beginning of each block: the factors of the carried state
    decayed = torch.empty_like(gates)
    decayed[0] = gates[0]
    for t in range(1, size):
        torch.mul(gates[t], decayed[t - 1], out=decayed[t])
        h[t].addcmul_(gates[t], h[t - 1])
    carried = [initial]
    for k in range(blocks - 1):
        carried.append(torch.addcmul(h[-1, :, k], decayed[-1, :, k], carried[-1]))
    h.addcmul_(decayed, torch.stack(carried, dim=1))
    return first_of(h.movedim(0, 2).flatten(1, 2), n)


class _Scan(torch.autograd.Function):
    """The gradient of a recurrence is the same recurrence in reverse. It needs only the gates and `h`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
        h = _forward(a, b, initial)
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, initial = ctx.saved_tensors
        # the gates of the next steps, in reverse order
        after = F.pad(a[:, 1:].conj(), (0, 0) * (a.ndim - 2) + (0, 1)).flip(1)
        # with create_graph, the reverse recurrence needs a gradient of its own
        run = scan if torch.is_grad_enabled() else _forward
        grad_b = run(after, grad.flip(1), torch.zeros_like(initial)).flip(1)
        before = torch.cat((initial[:, None], h[:, :-1]), dim=1)
        grad_a = (grad_b * before.conj()).sum_to_size(a.shape)
        return grad_a, grad_b, a[:, 0].conj() * grad_b[:, 0]
