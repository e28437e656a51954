"""Adaptive computation time: how many steps each token takes."""

from __future__ import annotations

import torch
from torch import nn

from simple_hierarchical_transformer.halting import AdaptiveHalting


def test_each_token_halts_independently() -> None:
    """A token's output is the mean of its steps, weighted by its probabilities. The last weight is the remainder."""
    steps, n = 5, 40
    halt = AdaptiveHalting(6).double()
    nn.init.normal_(halt.to_halt.weight)
    made = torch.randn(steps, 2, n, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.zeros(2, n, 6, dtype=torch.float64)
    pondered, seen = halt.begin(tokens), []
    for i in range(steps):
        tokens, pondered = halt(tokens, made[i], pondered, i == steps - 1)
        seen.append(tokens)
    taken = set()
    for b in range(2):
        for t in range(n):
            total, output = torch.zeros((), dtype=torch.float64), 0
            for i in range(steps):
                probability = halt.to_halt(made[i, b, t]).sigmoid()[0]
                if total + probability >= 0.99 or i == steps - 1:
                    break
                total, output = total + probability, output + probability * made[i, b, t]
            torch.testing.assert_close(pondered.output[b, t], output + (1 - total) * made[i, b, t])
            torch.testing.assert_close(pondered.cost[b, t], i + 1 + 1 - total)
            # a token that has halted does not change
            assert all(torch.equal(x[b, t], made[min(k, i), b, t]) for k, x in enumerate(seen))
            taken.add(i)
    assert len(taken) > 2
