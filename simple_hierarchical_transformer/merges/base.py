"""Where the levels tell each other what they know."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..levels import Level
from ..memory import keep
from ..ops.export import first_of
from ..ops.linear import Chain, Part, begin_at_zero, chain, effective_weight, is_plain, linear, matrix_of
from ..ops.norm import RMSNorm

MergeState = tuple[Tensor | None, ...]


class Contribution(NamedTuple):
    """What each level gives to those that a merge adds to. Both are keyed by the receiving level's compression.

    Levels stand in the order of `hierarchies`; in an hourglass a merge has two, the finer one and the next coarser.
    """

    norms: dict[int, Tensor]
    """`(batch, tokens, levels)`: how far the update moves, as a Euclidean norm, where a level is left out of it."""
    weights: dict[int, Tensor]
    """For merging by attention its weights `(batch, tokens, heads, levels, 1 + merge_window)`, the token at hand first;
    for merging by concatenation each level's share `(levels,)` of the squared weights that read. 0 for a level that is
    silent."""


def at_each_position(
    tokens: Sequence[Tensor],
    strides: Sequence[int],
    state: MergeState | None = None,
    position: int = 0,
    parts: Sequence[Sequence[Part]] | None = None,
) -> tuple[list[Tensor], MergeState | None]:
    """What each level's token at a position says: `(batch, n, dim)` each, or what its `parts` in turn make of it.

    A level token of stride s is repeated for its s positions. The chunk begins at `position`, and where that is in
    the middle of a stride, the token that stands for its first positions is the last of the chunk before: `state`
    has one `(batch, 1, dim)` for each level of a stride. `n` is the length of the finest level at hand, which has
    stride 1 wherever a model predicts from it.
    """
    n = tokens[min(range(len(strides)), key=strides.__getitem__)].shape[1]
    columns: list[Tensor] = []
    kept: list[Tensor | None] = []

    for i, (x, stride, last) in enumerate(zip(tokens, strides, state or (None,) * len(tokens), strict=True)):
        begun = position % stride
        if begun and last is not None:
            x = torch.cat((last, x), dim=1)
        # a chunk may be too short to have one
        kept.append(keep(last, x[:, -1:] if x.shape[1] or last is None else last))
        if parts is not None:
            x = chain(x, *parts[i])
        columns.append(x if stride == 1 else first_of(x.repeat_interleave(stride, dim=1)[:, begun:], n))

    return columns, state and tuple(kept)


def concat_levels(
    tokens: Sequence[Tensor], strides: Sequence[int], state: MergeState | None = None, position: int = 0
) -> tuple[Tensor, MergeState | None]:
    """All levels' tokens side by side at each position, as `at_each_position` has them: `(batch, n, sum of dims)`."""
    columns, state = at_each_position(tokens, strides, state, position)
    return torch.cat(columns, dim=-1), state


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
            nn.Linear(dim_in, 2 * dim_out),
            nn.SiLU(),
            nn.Linear(2 * dim_out, dim_out),
        )

    def begin_at_zero(self) -> None:
        """Nothing is added at first."""
        begin_at_zero(self.net[-1])

    def initial_state(self, batch_size: int, like: Tensor) -> MergeState:
        """Each strided level's last token, `(batch, 1, dim)`."""
        return tuple(
            like.new_zeros(batch_size, 1, dim) if stride > 1 else None
            for stride, dim in zip(self.strides, self.dims, strict=True)
        )

    def forward(
        self,
        tokens: Sequence[Tensor],
        state: MergeState | None = None,
        position: int = 0,
        silent: Collection[int] = (),
        contributions: list[Contribution] | None = None,
        wanted: Collection[int] | None = None,
    ) -> tuple[list[Tensor], MergeState | None]:
        """`silent` levels, by their compression, are left out; what each gives is added to `contributions`.

        `wanted` are those levels, by their place, whose merged tokens are read; by default all. Others may come back
        as they are.
        """
        updates, state = self.found(tokens, state, position, silent, contributions, wanted)
        merged = list(tokens)
        for i, update in zip(self.receiving(wanted), updates, strict=True):
            merged[i] = merged[i] + update
        return merged, state

    def receiving(self, wanted: Collection[int] | None) -> Sequence[int]:
        """The levels that are added to, where those in `wanted` are read."""
        return self.into

    def found(
        self,
        tokens: Sequence[Tensor],
        state: MergeState | None,
        position: int,
        silent: Collection[int],
        contributions: list[Contribution] | None,
        wanted: Collection[int] | None = None,
    ) -> tuple[list[Tensor], MergeState | None]:
        """What is added to each level that receives, and the state after it."""
        out = [i for i, c in enumerate(self.compressions) if c in silent]
        gathered, state = self.gather(tokens, state, position, self.receiving(wanted))
        updates = self.updates(gathered, out)
        if contributions is not None:
            contributions.append(self.contribution(gathered, updates, out))
        return updates, state

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, receiving: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        """What updates are made of, and the state after it."""
        joined, state = concat_levels(tokens, self.strides, state, position)
        return (joined, position), state

    def updates(self, gathered: Any, silent: Collection[int]) -> list[Tensor]:
        """For each receiving level what is added to its tokens."""
        joined, position = gathered
        joined = without(joined, self.dims, silent)
        sizes = [self.dims[i] for i in self.into]
        starts = [slice(-position % self.strides[i], None, self.strides[i]) for i in self.into]
        strided = any(self.strides[i] > 1 for i in self.into)
        matrix = matrix_of(self.net[-1]) if strided and is_plain(self.net) and len(self.net) == 4 else None
        if matrix is None:
            pooled = self.net(joined).split(sizes, dim=-1)
            return [each[:, own] for each, own in zip(pooled, starts, strict=True)]

        # a strided level does not use what is pooled between its tokens
        norm, to_inner, act, _ = cast(Any, self.net)
        inner = chain(joined, norm, to_inner)
        weight, bias = matrix
        biases: Any = [None] * len(sizes) if bias is None else bias.split(sizes)
        return [
            linear(inner[:, own], rows, each, after=act)
            for own, rows, each in zip(starts, weight.split(sizes), biases, strict=True)
        ]

    def weights(self, gathered: Any, silent: Collection[int]) -> list[Tensor]:
        """For each receiving level, how much each level weighs."""
        norm, to_inner, *_ = cast(Any, self.net)
        squares = (effective_weight(to_inner, gathered[0]) * gain_of(norm)).square().sum(dim=0)
        shares = torch.stack([each.sum() for each in without(squares, self.dims, silent).split(self.dims)])
        # where nobody is heard, nobody has a share
        shares = shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)
        return [shares for _ in self.into]

    @torch.no_grad()
    def contribution(self, gathered: Any, updates: Sequence[Tensor], silent: Collection[int]) -> Contribution:
        moved = []
        for each in range(len(self.dims)):
            others = self.updates(gathered, {*silent, each})
            moved.append([(update - other).norm(dim=-1) for update, other in zip(updates, others, strict=True)])
        receivers = [self.compressions[i] for i in self.into]
        norms = [torch.stack(each, dim=-1) for each in zip(*moved, strict=True)]
        return Contribution(
            dict(zip(receivers, norms, strict=True)),
            dict(zip(receivers, self.weights(gathered, silent), strict=True)),
        )


def gain_of(norm: nn.Module) -> Any:
    """What a norm scales each channel by, 1 where it has no such weight."""
    return getattr(norm, 'gamma', getattr(norm, 'weight', 1.0))


class LinearMerge(HierarchicalMerge):
    """Adds to a level one linear map of each other level's token at its position.

    Maps are taken of a level's own tokens, before they are repeated for the positions that they stand for: of all
    merges the one that costs least, and the coarser the level the less.
    """

    def build(self, levels: Sequence[Level]) -> None:
        # a level tells itself nothing
        self.heard = [[i for i in self.into if i != j] for j in range(len(levels))]
        self.norms = nn.ModuleList(RMSNorm(dim) if self.heard[j] else nn.Identity() for j, dim in enumerate(self.dims))
        self.to_others = nn.ModuleList(
            nn.Linear(dim, sum(self.dims[i] for i in self.heard[j]), bias=False) if self.heard[j] else nn.Identity()
            for j, dim in enumerate(self.dims)
        )

    def begin_at_zero(self) -> None:
        for each in self.to_others:
            begin_at_zero(each)

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, receiving: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        parts = [
            (norm, to) if heard else () for to, norm, heard in zip(self.to_others, self.norms, self.heard, strict=True)
        ]
        columns, state = at_each_position(tokens, self.strides, state, position, parts)
        told = {}
        for j, (column, heard) in enumerate(zip(columns, self.heard, strict=True)):
            for i, each in zip(
                heard, column.split([self.dims[i] for i in heard], dim=-1) if heard else (), strict=True
            ):
                told[i, j] = each[:, -position % self.strides[i] :: self.strides[i]]
        return (told, tokens), state

    def updates(self, gathered: Any, silent: Collection[int]) -> list[Tensor]:
        told, tokens = gathered
        updates = []
        for i in self.into:
            others = [each for (to, j), each in told.items() if to == i and j not in silent]
            updates.append(sum(others[1:], others[0]) if others else torch.zeros_like(tokens[i]))
        return updates

    def weights(self, gathered: Any, silent: Collection[int]) -> list[Tensor]:
        found = []
        for i in self.into:
            like = gathered[1][i]
            shares = []
            for j, (to, norm, heard) in enumerate(zip(self.to_others, self.norms, self.heard, strict=True)):
                share = like.new_zeros(())
                if i in heard and j not in silent:
                    weight = effective_weight(to, gathered[1][j])
                    rows = weight.split([self.dims[k] for k in heard])[heard.index(i)]
                    share = (rows * gain_of(norm)).square().sum()
                shares.append(share)
            total = torch.stack(shares)
            found.append(total / total.sum().clamp(min=torch.finfo(total.dtype).tiny))
        return found


class Receiver(nn.Module):
    """How one level attends to all: its queries, and each level's keys and values for it."""

    def __init__(self, level: Level, dims: Sequence[int], window: int) -> None:
        super().__init__()
        inner = level.heads * level.dim_head
        self.heads, self.dim = level.heads, level.dim
        self.inner = inner
        self.to_q = nn.Linear(level.dim, inner, bias=False)
        self.to_kv = nn.ModuleList(nn.Linear(dim, 2 * inner, bias=False) for dim in dims)
        # which level, and how long ago
        self.bias = nn.Parameter(torch.zeros(level.heads, len(dims), 1 + window))
        self.to_out = nn.Linear(inner, level.dim, bias=False)


class Heard(NamedTuple):
    """What one level receives of another: keys and values, as they stand to the receiver's tokens.

    The receiver's tokens fall into groups that hear the same: `repeats` of them, where the other level's tokens stand
    farther apart than its own, else each is a group of its own.
    """

    kv: Tensor
    """`(batch, rows, 2, heads, dim_head)`; of which row `window` is the newest that the first group hears."""
    apart: int
    """How many rows groups stand apart."""
    repeats: int
    lead: int
    """How many of the first group's tokens came before the chunk."""
    token: int
    """The index of the newest token that the first group hears."""


class AttentionMerge(HierarchicalMerge):
    """Each receiving level's token attends over all levels' tokens at its position, and the `window` before each.

    A level's token at a position is its last up to there. Tokens are normed, and projected from their level's width;
    a learned bias for each head says which level a key is of, and how long ago. Vaswani et al. 2017, arXiv 1706.03762.

    Keys are views of what was projected: none is gathered, and scores are formed key by key, since each query has
    keys of its own and only a few. Time and memory `O(tokens * levels * (1 + window))`. Its state are the keys and
    values of each level's last tokens.
    """

    def __init__(
        self, levels: Sequence[Level], into: Sequence[int], strides: Sequence[int] | None = None, *, window: int = 0
    ) -> None:
        self.window = window
        super().__init__(levels, into, strides)

    def build(self, levels: Sequence[Level]) -> None:
        self.norms = nn.ModuleList(RMSNorm(dim) for dim in self.dims)
        self.receivers = nn.ModuleDict({str(i): Receiver(levels[i], self.dims, self.window) for i in self.into})

    def begin_at_zero(self) -> None:
        for to in self.receivers.values():
            begin_at_zero(to.to_out)  # type: ignore[arg-type]

    def receiving(self, wanted: Collection[int] | None) -> Sequence[int]:
        # each receiver is a part of its own
        return self.into if wanted is None else [i for i in self.into if i in wanted]

    def initial_state(self, batch_size: int, like: Tensor) -> MergeState:
        """For each receiver, each level's last keys and values that its next token may still reach back to."""
        held = []
        for i in self.into:
            to: Any = self.receivers[str(i)]
            for stride in self.strides:
                count = self.window + int(stride > self.strides[i])
                held.append(like.new_zeros(batch_size, count, 2 * to.inner) if count else None)
        return tuple(held)

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, receiving: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        before = iter(state or (None,) * len(self.into) * len(tokens))
        kept: list[Tensor | None] = []
        gathered = []
        # a state has the keys and values of every receiver, whoever is read now
        for i in self.into if state is not None else receiving:
            to: Any = self.receivers[str(i)]
            first, heard = -(-position // self.strides[i]), []
            for j, (x, norm, stride) in enumerate(zip(tokens, self.norms, self.strides, strict=True)):
                repeats, apart = max(stride // self.strides[i], 1), max(self.strides[i] // stride, 1)
                lead, token = first % repeats, first // repeats * apart
                last = next(before)
                # the index of the first row
                begin = -(-position // stride)
                if apart > 1 and not self.window:
                    # what no token of this level hears is not projected
                    x, begin, token, apart = x[:, token - begin :: apart], first, first, 1
                kv = chain(x, norm, to.to_kv[j]) if x.shape[1] or last is None else last
                if last is not None:
                    begin -= last.shape[1]
                    kv = torch.cat((last.to(kv.dtype), kv), dim=1) if x.shape[1] else kv
                    last = keep(last, kv[:, -last.shape[1] :])
                kept.append(last)
                # what stands before the first token is masked
                ahead = token - self.window - begin
                kv = kv[:, ahead:] if ahead >= 0 else F.pad(kv, (0, 0, -ahead, 0))
                heard.append(Heard(kv.unflatten(-1, (2, to.heads, -1)), apart, repeats, lead, token))
            if i in receiving:
                query = chain(tokens[i], self.norms[i], to.to_q).unflatten(-1, (to.heads, -1))
                gathered.append((to, query, heard))
        return gathered, state and tuple(kept)

    def updates(self, gathered: Any, silent: Collection[int]) -> list[Tensor]:
        return [self.attend(to, query, heard, silent)[0] for to, query, heard in gathered]

    def weights(self, gathered: Any, silent: Collection[int]) -> list[Tensor]:
        heard_of = torch.tensor([j for j in range(len(self.dims)) if j not in silent], dtype=torch.long)
        found = [self.attend(to, query, heard, silent)[1] for to, query, heard in gathered]
        wholes = [each.new_zeros(*each.shape[:3], len(self.dims), each.shape[-1]) for each in found]
        return [whole.index_copy(3, heard_of.to(whole.device), each) for whole, each in zip(wholes, found, strict=True)]

    def attend(self, to: Any, query: Tensor, heard: Sequence[Heard], silent: Collection[int]) -> tuple[Tensor, Tensor]:
        """The update `(batch, tokens, dim)`, and its weights `(batch, tokens, heads, levels, 1 + window)`.

        Levels are those that are not silent.
        """
        batch, count, heads, _ = query.shape
        members = [j for j in range(len(heard)) if j not in silent]
        if not members or not count:
            update = to.bias.new_zeros(batch, count, to.dim)
            return update, to.bias.new_zeros(batch, count, heads, len(members), 1 + self.window)
        back = torch.arange(1 + self.window, device=query.device)
        query = query * query.shape[-1] ** -0.5

        scores, values = [], []
        for level in (heard[j] for j in members):
            groups = in_groups(query, level)
            # newest first, each (batch, groups, 1, heads, dim_head)
            end = (groups.shape[1] - 1) * level.apart + 1
            rows = [level.kv[:, self.window - b : self.window - b + end : level.apart, None] for b in range(len(back))]
            values.append([row[:, :, :, 1] for row in rows])
            score = torch.stack([(groups * row[:, :, :, 0]).sum(dim=-1) for row in rows], dim=-1)
            if self.window:
                token = level.token + level.apart * torch.arange(groups.shape[1], device=query.device)
                score = score.masked_fill((token[:, None] < back)[:, None, None], -torch.inf)
            scores.append(score.flatten(1, 2)[:, level.lead : level.lead + count])
        # an index made of a list would be copied to the device, for which the host waits
        bias = torch.stack([to.bias[:, j] for j in members], dim=1) if silent else to.bias
        found = torch.stack(scores, dim=-2).to(bias.dtype) + bias
        found = found.flatten(-2).softmax(dim=-1).view_as(found)

        out: Any = 0
        for j, level_weights, rows in zip(members, found.unbind(dim=-2), values, strict=True):
            shares = in_groups(level_weights.to(query.dtype), heard[j])
            part: Any = sum(share[..., None] * row for share, row in zip(shares.unbind(dim=-1), rows, strict=True))
            out = out + part.flatten(1, 2)[:, heard[j].lead : heard[j].lead + count]
        return chain(out.flatten(2), to.to_out), found


def in_groups(x: Tensor, heard: Heard) -> Tensor:
    """Of a receiver's tokens `(batch, tokens, ...)` those that hear the same together: `(batch, groups, repeats, ...)`.

    The first and the last group are filled up with zeros.
    """
    if heard.repeats == 1:
        return x[:, :, None]
    tail = -(heard.lead + x.shape[1]) % heard.repeats
    if heard.lead or tail:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (heard.lead, tail))
    return x.unflatten(1, (-1, heard.repeats))
