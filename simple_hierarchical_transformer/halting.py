"""Adaptive computation time: each token decides how many layers it takes."""

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
    """Halts tokens whose halting probabilities sum to 1. Their output is the mean of their steps, weighted by these.

    A halted token stays as it is, and other tokens still attend to it. A token's probability depends on that token
    only, which keeps the model causal. Graves 2016, arXiv 1603.08983; per position: Dehghani et al. 2019, arXiv
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
        """The tokens `(batch, seq, dim)` that the next step gets, from those before and after a step; and the progress.

        With `last`, all tokens halt.
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
