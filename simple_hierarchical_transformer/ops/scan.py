"""Linear recurrences over a sequence: step by step where it is short, by blocks side by side where it is long."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .export import first_of, side_of_square


def scan(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """`h[:, t] = a[:, t] * h[:, t - 1] + b[:, t]`, from `h[:, -1] = initial`, or zeros. Real or complex.

    b and the result: `(batch, seq, ...)`; a: a shape that broadcasts to b's; initial: `(batch, ...)`.

    The sequence falls into about `sqrt(seq)` blocks. All of them run side by side from zeros, step by step, and what
    each block's end carries on to the next is added after: `2 * sqrt(seq)` steps one after the other, and three times
    the operations of the recurrence itself. Blelloch 1990, "Prefix Sums and Their Applications", has it for a tree.
    Nothing is divided by a product of gates, so a gate of zero does no harm. Under the transforms of torch.func it runs
    step by step.
    """
    if initial is None:
        initial = torch.zeros_like(b[:, 0])
    if b.shape[1] == 1:
        return torch.addcmul(b, a, initial[:, None])
    if torch._C._are_functorch_transforms_active():
        # the transforms of torch.func see through plain operations alone
        steps = [initial]
        for gate, added in zip(a.unbind(1), b.unbind(1), strict=True):
            steps.append(gate * steps[-1] + added)
        return torch.stack(steps[1:], dim=1)
    return _Scan.apply(a, b, initial)


def _forward(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    n = b.shape[1]
    size = side_of_square(n)
    # as many as a compiler can count whatever the length is
    blocks = size if torch.compiler.is_compiling() else -(-n // size)

    def in_blocks(t: Tensor) -> Tensor:
        # steps first, so that each step's tokens lie together
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, blocks * size - n))
        return t.unflatten(1, (blocks, size)).movedim(2, 0).contiguous()

    gates, h = in_blocks(a), in_blocks(b)
    # what the blocks' beginnings are multiplied by up to each step
    reached = torch.empty_like(gates)
    reached[0] = gates[0]
    for t in range(1, size):
        torch.mul(gates[t], reached[t - 1], out=reached[t])
        h[t].addcmul_(gates[t], h[t - 1])
    carried = [initial]
    for k in range(blocks - 1):
        carried.append(torch.addcmul(h[-1, :, k], reached[-1, :, k], carried[-1]))
    h.addcmul_(reached, torch.stack(carried, dim=1))
    return first_of(h.movedim(0, 2).flatten(1, 2), n)


class _Scan(torch.autograd.Function):
    """The gradient of a recurrence is the recurrence run backwards, of which nothing but `h` need be kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
        h = _forward(a, b, initial)
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, initial = ctx.saved_tensors
        # the gate of the step after, from the last step back
        after = F.pad(a[:, 1:].conj(), (0, 0) * (a.ndim - 2) + (0, 1)).flip(1)
        # a graph of gradients needs a recurrence that has a gradient itself
        run = scan if torch.is_grad_enabled() else _forward
        grad_b = run(after, grad.flip(1), torch.zeros_like(initial)).flip(1)
        before = torch.cat((initial[:, None], h[:, :-1]), dim=1)
        grad_a = (grad_b * before.conj()).sum_to_size(a.shape)
        return grad_a, grad_b, a[:, 0].conj() * grad_b[:, 0]
