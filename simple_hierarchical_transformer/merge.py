"""Where the levels tell each other what they know."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .levels import Level
from .linear import Chain, Linear
from .norm import RMSNorm
from .state import keep

Coarse = tuple[Tensor | None, ...]


class Contribution(NamedTuple):
    """What each level gives to those that a merge adds to. Both are keyed by the receiving level's compression."""

    norms: dict[int, Tensor]
    """`(batch, tokens, levels)`: how far the update moves, as a Euclidean norm, where a level is left out of it."""
    weights: dict[int, Tensor]
    """For merging by attention its weights `(batch, tokens, heads, levels, 1 + merge_window)`, the token at hand first;
    for merging by concatenation each level's share `(levels,)` of the squared weights that read."""


def concat_levels(
    tokens: Sequence[Tensor], strides: Sequence[int], coarse: Coarse | None = None, position: int = 0
) -> tuple[Tensor, Coarse | None]:
    """All levels' tokens side by side at each position: `(batch, n, sum of dims)`.

    A level token of stride s is repeated for its s positions. The chunk begins at `position`, and where that is in
    the middle of a stride, the token that stands for its first positions is the last of the chunk before: `coarse`
    has one `(batch, 1, dim)` for each level of a stride. `n` is the length of the finest level at hand, which has
    stride 1 wherever a model predicts from it.
    """
    n = max(x.shape[1] for x in tokens)
    columns: list[Tensor] = []
    kept: list[Tensor | None] = []

    for x, stride, last in zip(tokens, strides, coarse or (None,) * len(tokens), strict=True):
        begun = position % stride
        if begun and last is not None:
            x = torch.cat((last, x), dim=1)
        # a chunk may be too short to have one
        kept.append(keep(last, x[:, -1:]) if x.shape[1] else last)
        columns.append(x if stride == 1 else x.repeat_interleave(stride, dim=1)[:, begun : begun + n])

    return torch.cat(columns, dim=-1), coarse and tuple(kept)


def without(x: Tensor, dims: Sequence[int], silent: Collection[int]) -> Tensor:
    """Columns side by side, of widths `dims`, with those numbered in `silent` at zero."""
    if not silent:
        return x
    return torch.cat([torch.zeros_like(y) if i in silent else y for i, y in enumerate(x.split(list(dims), -1))], -1)


class HierarchicalMerge(nn.Module):
    """Pools what all levels know at each position and adds it to the levels named in `into`.

    Takes and returns one `(batch, ceil(n / stride), dim)` for each level. A level of stride s receives what was
    pooled at positions 0, s, 2s, ... Pooling is a feed-forward over all levels' tokens, concatenated.

    Args:
        levels: all that meet.
        into: which of them receive, by their place among `levels`.
        strides: how many tokens of the finest among them each one's tokens stand apart; their strides by default.
    """

    def __init__(self, levels: Sequence[Level], into: Sequence[int], strides: Sequence[int] | None = None) -> None:
        super().__init__()
        self.compressions = [level.compression for level in levels]
        self.strides = [level.stride for level in levels] if strides is None else list(strides)
        self.dims = [level.dim for level in levels]
        self.into = tuple(into)
        self.build(levels)

    def build(self, levels: Sequence[Level]) -> None:
        dim_in, dim_out = sum(self.dims), sum(self.dims[i] for i in self.into)
        self.net = Chain(
            RMSNorm(dim_in),
            Linear(dim_in, 2 * dim_out),
            nn.SiLU(),
            Linear(2 * dim_out, dim_out),
        )

    @property
    def kept(self) -> list[int]:
        """How many tokens of each level a state keeps."""
        return [int(stride > 1) for stride in self.strides]

    def initial_state(self, batch_size: int, like: Tensor) -> Coarse:
        return tuple(
            like.new_zeros(batch_size, count, dim) if count else None
            for count, dim in zip(self.kept, self.dims, strict=True)
        )

    def forward(
        self,
        tokens: Sequence[Tensor],
        coarse: Coarse | None = None,
        position: int = 0,
        silent: Collection[int] = (),
        contributions: list[Contribution] | None = None,
    ) -> tuple[list[Tensor], Coarse | None]:
        """`silent` levels, by their compression, are left out; what each gives is added to `contributions`."""
        out = [i for i, c in enumerate(self.compressions) if c in silent]
        gathered, coarse = self.gather(tokens, coarse, position)
        updates, weights = self.updates(gathered, out)
        if contributions is not None:
            contributions.append(self.contribution(gathered, updates, weights, out))

        merged = list(tokens)
        for i, update in zip(self.into, updates, strict=True):
            merged[i] = merged[i] + update
        return merged, coarse

    def gather(self, tokens: Sequence[Tensor], coarse: Coarse | None, position: int) -> tuple[Any, Coarse | None]:
        """What updates are made of, and the state after it."""
        joined, coarse = concat_levels(tokens, self.strides, coarse, position)
        return (joined, position), coarse

    def updates(self, gathered: Any, silent: Collection[int]) -> tuple[list[Tensor], list[Tensor]]:
        """For each receiving level what is added to its tokens, and the weights that made it."""
        joined, position = gathered
        pooled = self.net(without(joined, self.dims, silent))
        sizes = [self.dims[i] for i in self.into]
        strides = [self.strides[i] for i in self.into]
        updates = [
            update[:, -position % stride :: stride]
            for update, stride in zip(pooled.split(sizes, dim=-1), strides, strict=True)
        ]
        return updates, []

    def weights(self, found: list[Tensor]) -> list[Tensor]:
        """For each receiving level, how much each level weighs."""
        norm, to_inner, *_ = list[Any](self.net)
        squares = (to_inner.weight * norm.gamma).square().sum(dim=0)
        shares = torch.stack([each.sum() for each in squares.split(self.dims)]) / squares.sum()
        return [shares for _ in self.into]

    @torch.no_grad()
    def contribution(
        self, gathered: Any, updates: Sequence[Tensor], found: list[Tensor], silent: Collection[int]
    ) -> Contribution:
        moved = []
        for each in range(len(self.dims)):
            others, _ = self.updates(gathered, {*silent, each})
            moved.append([(update - other).norm(dim=-1) for update, other in zip(updates, others, strict=True)])
        receivers = [self.compressions[i] for i in self.into]
        norms = [torch.stack(each, dim=-1) for each in zip(*moved, strict=True)]
        return Contribution(
            dict(zip(receivers, norms, strict=True)),
            dict(zip(receivers, [w.detach() for w in self.weights(found)], strict=True)),
        )


class Receiver(nn.Module):
    """How one level attends to all: its queries, and each level's keys and values for it."""

    def __init__(self, level: Level, dims: Sequence[int], window: int) -> None:
        super().__init__()
        inner = level.heads * level.dim_head
        self.heads = level.heads
        self.to_q = Linear(level.dim, inner, bias=False)
        self.to_kv = nn.ModuleList(Linear(dim, 2 * inner, bias=False) for dim in dims)
        # which level, and how long ago
        self.bias = nn.Parameter(torch.zeros(level.heads, len(dims), 1 + window))
        self.to_out = Linear(inner, level.dim, bias=False)


class AttentionMerge(HierarchicalMerge):
    """Each receiving level's token attends over all levels' tokens at its position, and the `window` before each.

    A level's token at a position is its last up to there. Tokens are normed, and projected from their level's width;
    a learned bias for each head says which level a key is of, and how long ago. Vaswani et al. 2017, arXiv 1706.03762.

    Time and memory `O(tokens * levels * (1 + window))`. Its state are each level's last tokens.
    """

    def __init__(
        self, levels: Sequence[Level], into: Sequence[int], strides: Sequence[int] | None = None, *, window: int = 0
    ) -> None:
        self.window = window
        super().__init__(levels, into, strides)

    def build(self, levels: Sequence[Level]) -> None:
        self.norms = nn.ModuleList(RMSNorm(dim) for dim in self.dims)
        self.receivers = nn.ModuleDict({str(i): Receiver(levels[i], self.dims, self.window) for i in self.into})

    @property
    def kept(self) -> list[int]:
        return [self.window + int(stride > 1) for stride in self.strides]

    def gather(self, tokens: Sequence[Tensor], coarse: Coarse | None, position: int) -> tuple[Any, Coarse | None]:
        rows, kept, begins = [], [], []
        for x, stride, norm, last in zip(
            tokens, self.strides, self.norms, coarse or (None,) * len(tokens), strict=True
        ):
            begin = -(-position // stride)
            if last is not None:
                x, begin = torch.cat((last, x), dim=1), begin - last.shape[1]
                last = keep(last, x[:, -last.shape[1] :])
            kept.append(last)
            rows.append(norm(x))
            begins.append(begin)
        counts = [x.shape[1] for x in tokens]
        return (rows, begins, counts, position), coarse and tuple(kept)

    def updates(self, gathered: Any, silent: Collection[int]) -> tuple[list[Tensor], list[Tensor]]:
        updates, weights = [], []
        for i in self.into:
            if len(silent) == len(self.dims):
                # nobody is left to attend to
                update, weight = self.attend(i, (), *gathered)
                update, weight = torch.zeros_like(update), torch.zeros_like(weight)
            else:
                update, weight = self.attend(i, silent, *gathered)
            updates.append(update)
            weights.append(weight)
        return updates, weights

    def attend(
        self, i: int, silent: Collection[int], rows: list[Tensor], begins: list[int], counts: list[int], position: int
    ) -> tuple[Tensor, Tensor]:
        to: Any = self.receivers[str(i)]
        stride, device = self.strides[i], rows[i].device
        # the position of each receiving token
        first = -(-position // stride)
        at = (first + torch.arange(counts[i], device=device)) * stride
        back = torch.arange(1 + self.window, device=device)

        keys, values, seen = [], [], []
        for j, (x, begin) in enumerate(zip(rows, begins, strict=True)):
            token = (at // self.strides[j])[:, None] - back
            kv = to.to_kv[j](x).unflatten(-1, (2, to.heads, -1))
            # (batch, tokens, 1 + window, heads, dim_head), twice
            kv = kv.index_select(1, (token - begin).clamp(min=0).flatten()).unflatten(1, token.shape)
            keys.append(kv[:, :, :, 0])
            values.append(kv[:, :, :, 1])
            seen.append(token >= 0 if j not in silent else torch.zeros_like(token, dtype=torch.bool))
        key, value, mask = torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(seen, dim=1)

        own = rows[i][:, rows[i].shape[1] - counts[i] :]
        query = to.to_q(own).unflatten(-1, (to.heads, -1))
        scores = torch.einsum('bnhd,bnkhd->bnhk', query, key) * query.shape[-1] ** -0.5
        scores = scores.to(to.bias.dtype) + to.bias.flatten(1)
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
        out = torch.einsum('bnhk,bnkhd->bnhd', weights.to(value.dtype), value)
        return to.to_out(out.flatten(2)), weights.unflatten(-1, (len(rows), -1))

    def weights(self, found: list[Tensor]) -> list[Tensor]:
        return found
