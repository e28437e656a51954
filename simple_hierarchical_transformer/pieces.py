"""Where the tokens of a placed level stand in a chunk.

A rule of `boundaries` cuts the finer tokens of each row into pieces, and a placed level has one token for each piece.
So its rows have different lengths. They are padded at the right, up to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .boundaries import Marks
from .checks import check_output
from .levels import Grid, Level
from .memory import PlacedState
from .ops.tracing import is_exporting, is_transformed, outside_graphs
from .rows import Rows

# the largest number of finer tokens in a piece, unless a piece is intended to have more than a quarter of that
LONGEST = 32


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x `(batch, n, ...)` at `index` `(batch, k)`: `(batch, k, ...)`."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + rows).flatten()).unflatten(0, index.shape)


@dataclass(frozen=True)
class Frame:
    """Where the tokens of a level stand among the ids of a chunk `(batch, ids)`."""

    positions: Tensor
    """The position in the chunk of each token, `(batch, n)`."""
    starts: Tensor | int
    """The number of tokens before the chunk, `(batch,)` or the same for all rows."""
    lengths: Tensor | None = None
    """The number of tokens of each row, `(batch,)`. None if each row has n."""
    dense: bool = False
    """Whether each id of the text has a token."""

    @classmethod
    def of_grid(cls, grid: Grid, position: int, ids: Tensor) -> Frame:
        """The frame of a level with a fixed stride."""
        places = torch.arange(ids.shape[1], device=ids.device)[grid.at(position)]
        return cls(places.expand(ids.shape[0], -1), grid.count(position), dense=grid.stride == 1)

    @property
    def places(self) -> Tensor:
        """0, 1, ..., n - 1: `(n,)`."""
        return torch.arange(self.positions.shape[1], device=self.positions.device)

    @property
    def exists(self) -> Tensor | None:
        """Which tokens are no padding, bool `(batch, n)`. None for all."""
        return None if self.lengths is None else self.places < self.lengths[:, None]

    @property
    def index(self) -> Tensor:
        """The index of each token in its row, `(batch, n)`, and -1 for padding."""
        starts = self.starts[:, None] if isinstance(self.starts, Tensor) else self.starts
        index = (self.places + starts).expand(self.positions.shape)
        exists = self.exists
        return index if exists is None else torch.where(exists, index, -1)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a chunk of finer tokens `(batch, n, dim)`, and the tokens `(batch, k, dim)` that end them."""

    boundary: Tensor
    """At which finer tokens a piece ends, bool `(batch, n)`."""
    ended: Tensor
    """The number of pieces that have ended in the chunk at each finer token, itself included: `(batch, n)`."""
    probability: Tensor | None
    """The probability of a boundary at each finer token, `(batch, n)`, if the rule learns it."""
    finer: Frame
    """The frame of the finer tokens."""
    frame: Frame
    """The frame of the level's tokens."""
    at: Tensor
    """The finer token at each of the level's tokens, `(batch, k)`. 0 for padding."""
    start: Rows | int
    """The start of the level's rows, as blocks take it."""
    tokens: Tensor
    """The finer tokens, `(batch, n, dim)`."""
    ids: int
    """The number of ids of the chunk."""

    @property
    def lengths(self) -> Tensor:
        """The number of tokens that each row has in the chunk, `(batch,)`."""
        return cast(Tensor, self.frame.lengths)

    @property
    def positions(self) -> Tensor:
        """The position in the chunk of each of the level's tokens, `(batch, k)`."""
        return self.frame.positions

    @property
    def exists(self) -> Tensor:
        """Which of the level's tokens are no padding, bool `(batch, k)`."""
        return cast(Tensor, self.frame.exists)

    @property
    def at_positions(self) -> Tensor:
        """Which positions of the chunk have one of the level's tokens, bool `(batch, ids)`."""
        if self.finer.dense:
            return self.boundary
        marks = self.boundary.new_zeros(self.boundary.shape[0], self.ids + 1)
        places = torch.where(self.exists, self.positions, self.ids)
        return marks.scatter(1, places, True)[:, : self.ids]

    def pick(self, x: Tensor, fill: float | None = None) -> Tensor:
        """Of values at each position `(batch, ids, ...)` those at the level's tokens, `(batch, k, ...)`.

        Padding has the value `fill`, or any value where that is None.
        """
        picked = take(x, self.positions)
        if fill is None:
            return picked
        exists = self.exists
        return picked.masked_fill(~exists.view(*exists.shape, *(1,) * (x.ndim - 2)), fill)

    def pick_finer(self, x: Tensor, fill: float) -> Tensor:
        """Of values at each position `(batch, ids)` those at the finer tokens, `(batch, n)`, `fill` for padding."""
        picked, exists = take(x, self.finer.positions), self.finer.exists
        return picked if exists is None else picked.masked_fill(~exists, fill)

    def last(self, x: Tensor, before: Tensor) -> Tensor:
        """The last of the level's tokens x `(batch, k, dim)` of each row, or of `before` `(batch, 1, dim)`."""
        return take(torch.cat((before.to(x.dtype), x), dim=1), self.lengths[:, None])

    def spread(self, x: Tensor, before: Tensor | None, ended: Tensor | None = None) -> Tensor:
        """At each finer token the level's latest token of x `(batch, k, dim)`: `(batch, n, dim)`.

        Args:
            x: the level's tokens.
            before: the last token before the chunk, `(batch, 1, dim)`. None if the sequence starts here.
            ended: the number of pieces that have ended, if not at finer tokens. Default: `self.ended`.
        """
        ended = self.ended if ended is None else ended
        if before is None:
            return take(x, ended - 1)
        return take(torch.cat((before.to(x.dtype), x), dim=1), ended)

    def spread_to_positions(self, x: Tensor, before: Tensor | None) -> Tensor:
        """The level's latest token at each position of the chunk, `(batch, ids, dim)`."""
        return self.spread(x, before, self.at_positions.long().cumsum(1))


def longest_piece(level: Level, finer: Level) -> int:
    """The largest number of finer tokens in a piece of a placed level."""
    intended = level.spacing / finer.spacing
    return max(LONGEST, math.ceil(4 * intended)) if level.max_piece is None else level.max_piece


def capacity(counts: Tensor, n: int, spacing: float) -> int:
    """The number of tokens that rows with `counts` tokens `(batch,)` of n finer ones are padded to.

    It is the largest count. Under a compiler it is one of a few sizes, so that there are few graphs. No token is ever
    left out. On 'meta', where nothing can be counted, it is what `spacing` gives.
    """
    if counts.is_meta or n == 0:
        return math.ceil(n / spacing)
    if is_transformed() or is_exporting():
        # values cannot be read there
        return n
    # a chunk without tokens would leave weights without a gradient, which DDP and FSDP wait for
    most = max(outside_graphs(largest, counts), int(torch.is_grad_enabled()))
    if not torch.compiler.is_compiling():
        return most
    size = n // int(spacing) + 1
    while size < most:
        size *= 2
    return min(size, n)


def largest(counts: Tensor) -> int:
    return int(counts.max())


def rows_of(starts: Tensor, lengths: Tensor, n: int) -> Rows | int:
    """The start of rows of n tokens, as blocks take it: an int if it is the same for all rows and none has padding."""
    both = torch.stack((starts, lengths)).tolist()
    rows = Rows(both[0], both[1], starts.device)
    common = rows.common_start(n)
    return rows if common is None else common


def recent(x: Tensor, before: Tensor | None, reach: int, fill: float) -> Tensor:
    """x `(batch, n, ...)` after the `reach` values before it. None if the sequence starts here."""
    if before is None:
        before = x.new_full((x.shape[0], reach, *x.shape[2:]), fill)
    return torch.cat((before.to(x.dtype), x), dim=1)


def kept(x: Tensor, frame: Frame, reach: int) -> Tensor:
    """The last `reach` values of each row of `recent` ones x."""
    if frame.lengths is None:
        return x[:, x.shape[1] - reach :]
    return take(x, frame.lengths[:, None] + torch.arange(reach, device=x.device))


def check_marks(found: Marks | Tensor, like: Tensor) -> Marks:
    """What a rule returned for tokens or ids `like` `(batch, n)`. Raises ValueError if it is not that."""
    marks = found if isinstance(found, Marks) else Marks(found)
    check_output('boundaries', marks.boundary, tuple(like.shape), like)
    if marks.boundary.dtype != torch.bool:
        raise ValueError(f'boundaries must return a bool tensor, got {marks.boundary.dtype}')
    if marks.probability is not None:
        check_output('boundaries', marks.probability, tuple(like.shape), like)
        if not marks.probability.is_floating_point():
            raise ValueError(f'boundaries must return floating-point probabilities, got {marks.probability.dtype}')
    return marks


def since_last(marked: Tensor, finer: Frame, pending: Tensor | None) -> tuple[Tensor, Tensor]:
    """At which finer tokens an id was marked since the one before them, bool `(batch, n)`.

    Args:
        marked: the marked ids, bool `(batch, ids)`.
        finer: the frame of the finer tokens.
        pending: whether an id was marked since the last finer token before the chunk, bool `(batch,)`.

    Returns:
        The boundaries, and the next `pending`.
    """
    count = marked.long().cumsum(1)
    first = count.new_zeros(len(count), 1) if pending is None else -pending.long()[:, None]
    up_to = torch.cat((first, take(count, finer.positions)), dim=1)
    n = finer.positions.shape[1] if finer.lengths is None else finer.lengths[:, None]
    last = up_to[:, -1:] if isinstance(n, int) else up_to.gather(1, n)
    return up_to[:, 1:] > up_to[:, :-1], (count[:, -1:] > last)[:, 0]


def place(
    rule: Callable[..., Marks | Tensor],
    spacing: float,
    x: Tensor,
    ids: Tensor,
    finer: Frame,
    before: PlacedState | None,
    *,
    longest: int | None = None,
    position: int = 0,
) -> tuple[Pieces, PlacedState | None]:
    """Cuts finer tokens x `(batch, n, dim)` into pieces.

    Args:
        rule: one of `boundaries`.
        spacing: the expected number of finer tokens in a piece.
        x: the finer tokens.
        ids: the ids of the chunk, `(batch, ids)`.
        finer: the frame of the finer tokens.
        before: the state before the chunk.
        longest: the largest number of finer tokens in a piece. Where the rule finds no boundary for so long, there is
            one nevertheless, with a probability of 1.
        position: the number of ids before the chunk.

    Returns:
        The pieces, and the next state, whose `down` and `up` are still those of `before`.
    """
    reach: int = getattr(rule, 'reach', 1)
    reads_tokens: bool = getattr(rule, 'reads_tokens', True)
    marks_ids: bool = getattr(rule, 'marks_ids', False)
    index, pending = finer.index, None if before is None else before.pending
    read = ids if finer.dense or marks_ids else take(ids, finer.positions)
    all_ids = recent(read, None if before is None else before.ids, reach, -1)
    vectors = recent(x, None if before is None else before.finer, reach, 0) if reads_tokens else x
    if marks_ids:
        places = torch.arange(position, position + ids.shape[1], device=ids.device).expand_as(ids)
        marks = check_marks(rule(x[:, :0], all_ids, places), ids)
        if not finer.dense:
            boundary, pending = since_last(marks.boundary, finer, pending)
            marks = Marks(boundary)
    else:
        # a rule may need at least one token
        marks = check_marks(rule(vectors, all_ids, index) if x.shape[1] else index == 0, index)
    # without a sync: no token of a chunk later than the first has index 0
    boundary = (marks.boundary | (index == 0)) & (index >= 0)
    probability = marks.probability
    cut = None if before is None else before.cut
    if longest is not None and x.shape[1]:
        # the boundary that the rule found last, at each token
        found_at = torch.where(boundary, index, 0).cummax(1).values
        found_at = found_at if cut is None else found_at.maximum(cut[:, None])
        cut = found_at[:, -1]
        forced = (index > found_at) & ((index - found_at) % longest == 0)
        boundary = boundary | forced
        probability = None if probability is None else probability.masked_fill(forced, 1.0)

    counts = boundary.sum(1)
    n, k = x.shape[1], capacity(counts, x.shape[1], spacing)
    ended = boundary.long().cumsum(1)
    slots = torch.where(boundary, ended - 1, k)
    places = torch.arange(n, device=x.device).expand_as(slots)
    at = slots.new_zeros(x.shape[0], k + 1).scatter(1, slots, places)[:, :k]
    positions = take(finer.positions, at) if n else at
    starts: Tensor | int = 0 if before is None else before.count
    frame = Frame(positions, starts, counts)
    start: Rows | int = 0
    if isinstance(starts, Tensor):
        start = k if starts.is_meta else outside_graphs(rows_of, starts, counts, k)
    pieces = Pieces(boundary, ended, probability, finer, frame, at=at, start=start, tokens=x, ids=ids.shape[1])
    if before is None:
        return pieces, None
    after = PlacedState(
        count=before.count + counts,
        cut=before.cut if cut is None else cut,
        pending=before.pending if pending is None else pending,
        ids=all_ids[:, ids.shape[1] :] if marks_ids else kept(all_ids, finer, reach),
        finer=None if before.finer is None else kept(vectors, finer, reach).to(before.finer.dtype),
        down=before.down,
        up=before.up,
    )
    return pieces, after


def spread_placed(
    tokens: Sequence[Tensor], levels: Sequence[int], pieces: Mapping[int, Pieces], before: Sequence[Tensor | None]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The tokens of some levels, those of placed ones spread to the positions of the chunk.

    Args:
        tokens: the tokens of each of these levels, `(batch, k, dim)`.
        levels: the index of each.
        pieces: the pieces of placed levels, by index.
        before: the last token of each level before the chunk, `(batch, 1, dim)`.

    Returns:
        The tokens, and the last token of each placed level after the chunk by its place in `levels`, with a state.
    """
    spread, last = list(tokens), {}
    for place, (i, old) in enumerate(zip(levels, before, strict=True)):
        if i in pieces:
            spread[place] = pieces[i].spread_to_positions(tokens[place], old)
            if old is not None:
                last[place] = pieces[i].last(tokens[place], old).to(old.dtype)
    return spread, last
