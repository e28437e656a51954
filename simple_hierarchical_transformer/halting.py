"""Adaptive computation time: each token decides how many layers it passes through."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# a token halts once the sum of its probabilities is this close to 1
EPS = 0.01


class Pondered(NamedTuple):
    """The progress of a level's tokens `(batch, seq)`."""

    output: Tensor
    """The weighted sum of their steps so far, `(batch, seq, dim)`."""
    halted: Tensor
    """The sum of their halting probabilities so far, `(batch, seq)`."""
    running: Tensor
    """Which tokens have not halted, bool `(batch, seq)`."""
    cost: Tensor
    """Their ponder cost: the number of steps, and the remainder once they halt. `(batch, seq)`."""


class AdaptiveHalting(nn.Module):
    """Halts tokens whose halting probabilities sum to 1. Their output is the mean of their steps, weighted by these
    probabilities.

    A halted token no longer changes, and other tokens still attend to it. The probability of a token depends only on
    that token, which keeps the model causal. Graves 2016, arXiv 1603.08983; per position: Dehghani et al. 2019, arXiv
    1807.03819.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_halt = nn.Linear(dim, 1)
        nn.init.ones_(self.to_halt.bias)

    def begin(self, x: Tensor) -> Pondered:
        zeros = x.new_zeros(x.shape[:2])
        return Pondered(torch.zeros_like(x), zeros, torch.ones_like(zeros, dtype=torch.bool), zeros)

    def forward(self, old: Tensor, new: Tensor, pondered: Pondered, last: bool) -> tuple[Tensor, Pondered]:
        """Halts tokens after a step. `old` and `new` are the tokens before and after it, `(batch, seq, dim)`.

        With `last`, all tokens halt. Returns the tokens for the next step, and the progress.
        """
        output, halted, running, cost = pondered
        probability = self.to_halt(new)[..., 0].to(halted.dtype).sigmoid()
        halts = running & (torch.full_like(running, last) | (halted + probability >= 1 - EPS))
        remainder = (1 - halted) * halts
        continues = running & ~halts
        weight = remainder + probability * continues
        output = output + weight[..., None] * new
        after = Pondered(output, halted + probability * continues, continues, cost + running + remainder)
        return torch.where(running[..., None], new, old), after
