"""Embeddings of the last few ids at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import keep

# odd, so that a product with it loses nothing modulo 2^64: 2^64 over the golden ratio, as a signed number (Knuth, The
# Art of Computer Programming, volume 3, section 6.4)
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


class NGramEmbedding(nn.EmbeddingBag):
    """The sum of one vector for each n in `orders`, found by the n ids that end at a position: `(batch, n, dim)`.

    The ids are hashed to a row of a table, one table for each n, so that n-grams may share a row. Pagnoni et al. 2024,
    arXiv 2412.09871; the hash is multiplicative. Time `O(seq * len(orders) * dim)`, whatever the rows.

    With `sparse` its gradient is a sparse tensor of the rows that were read. `training.optim.build_optimizer` turns it
    on for a CPU and moves those rows alone; torch.optim.AdamW and others take no sparse gradients.

    Its state are the ids before, `(batch, max(orders) - 1)`, each plus 1, and 0 where there was none.

    Args:
        dim: width of the vectors.
        orders: how many ids an n-gram has, each at least 2.
        rows: of each table, a power of two.
        dropout: share of the vectors that training leaves out, each by chance, the others grown in turn. A table keeps
            what followed each rare n-gram, and from the second reading of a text on that is mistaken for knowledge.
    """

    def __init__(self, dim: int, orders: Sequence[int], rows: int, dropout: float = 0.0) -> None:
        # a table begins where the one before ends
        super().__init__(len(orders) * rows, dim, mode='sum')
        self.orders = tuple(orders)
        self.rows = rows
        self.dropout = dropout

    def reset_parameters(self) -> None:
        # what was never read says nothing
        nn.init.zeros_(self.weight)

    def initial_state(self, batch_size: int, like: Tensor) -> Tensor:
        return torch.zeros(batch_size, max(self.orders) - 1, dtype=torch.long, device=like.device)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """ids: `(batch, n)`."""
        before = max(self.orders) - 1
        ids = ids.long() + 1
        ids = F.pad(ids, (before, 0)) if state is None else torch.cat((state, ids), dim=1)
        rows = self.find(ids)
        weights = None
        # what is scored or written on the way through a training run is without gradients
        if self.dropout and self.training and torch.is_grad_enabled():
            weights = F.dropout(torch.ones(rows.shape, dtype=self.weight.dtype, device=rows.device), self.dropout)
            weights = weights.flatten(0, 1)
        vectors = super().forward(rows.flatten(0, 1), per_sample_weights=weights)
        return vectors.unflatten(0, rows.shape[:2]), keep(state, ids[:, -before:])

    def find(self, ids: Tensor) -> Tensor:
        """The rows of the n-grams that end at each of the last ids: `(batch, n, len(orders))`."""
        before = max(self.orders) - 1
        bits = self.rows.bit_length() - 1
        n = ids.shape[1] - before
        found: list[Tensor] = []
        hashed = torch.zeros_like(ids[:, :n])
        for back in range(before + 1):
            hashed = (hashed + ids[:, before - back : before - back + n]) * GOLDEN
            if back + 1 in self.orders:
                # the high bits are the well mixed ones; a shift of a negative number brings ones along
                mixed = (hashed ^ (hashed >> 32)) * GOLDEN
                found.append(((mixed >> (64 - bits)) & (self.rows - 1)) + len(found) * self.rows)
        return torch.stack(found, dim=-1)
