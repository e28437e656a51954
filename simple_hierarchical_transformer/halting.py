"""Adaptive computation time: each token decides how many steps it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# what a token may be short of 1 when it ends
EPS = 0.01


class Pondered(NamedTuple):
    """How far the tokens of a level have come."""

    output: Tensor
    """The mean of their steps so far, each by its weight: `(batch, seq, dim)`."""
    halted: Tensor
    """The sum of their probabilities to end so far, `(batch, seq)`."""
    running: Tensor
    """Which go on, `(batch, seq)`."""
    cost: Tensor
    """What they have pondered: their steps and, once they end, what they were short of 1 before: `(batch, seq)`."""


class AdaptiveHalting(nn.Module):
    """Ends tokens where their probabilities to end sum to 1, and gives the mean of their steps by those probabilities.

    A token that has ended stays as it is, and others go on seeing it. Its probability hangs on itself, so that it is
    causal. Graves 2016, arXiv 1603.08983; per position: Dehghani et al. 2019, arXiv 1807.03819.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_halt = nn.Linear(dim, 1)
        nn.init.ones_(self.to_halt.bias)

    def begin(self, x: Tensor) -> Pondered:
        zeros = x.new_zeros(x.shape[:2])
        return Pondered(torch.zeros_like(x), zeros, torch.ones_like(zeros, dtype=torch.bool), zeros)

    def forward(self, old: Tensor, new: Tensor, pondered: Pondered, last: bool) -> tuple[Tensor, Pondered]:
        """From tokens `(batch, seq, dim)` before and after a step, those that the next one gets.

        All that have not ended end with the `last`.
        """
        output, halted, running, cost = pondered
        probability = self.to_halt(new)[..., 0].to(halted.dtype).sigmoid()
        ends = running & (torch.full_like(running, last) | (halted + probability >= 1 - EPS))
        left = (1 - halted) * ends
        goes_on = running & ~ends
        weight = left + probability * goes_on
        output = output + weight[..., None] * new
        after = Pondered(output, halted + probability * goes_on, goes_on, cost + running + left)
        return torch.where(running[..., None], new, old), after
