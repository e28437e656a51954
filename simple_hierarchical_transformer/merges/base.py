"""What merges have in common: each pools what the levels know at a position and adds it to some of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..levels import Grid, Level
from ..memory import keep
from ..ops.linear import Part, chain
from ..ops.tracing import first_of

MergeState = tuple[Tensor | None, ...]


class Contribution(NamedTuple):
    """What each level contributes to the levels that a merge adds to. Both dicts are keyed by their compression.

    Levels are in the order of `hierarchies`. In an hourglass a merge has two: the finer one and the next coarser.
    """

    norms: dict[int, Tensor]
    """`(batch, tokens, levels)`: the Euclidean norm of the change of the update when a level is left out."""
    weights: dict[int, Tensor]
    """Of a merge by attention its weights `(batch, tokens, heads, levels, 1 + merge_window)`, the newest token first.
    Of other merges each level's share `(levels,)` of the squared input weights. 0 for an ablated level."""


def at_each_position(
    tokens: Sequence[Tensor],
    strides: Sequence[int],
    state: MergeState | None = None,
    position: int = 0,
    parts: Sequence[Sequence[Part]] | None = None,
) -> tuple[list[Tensor], MergeState | None]:
    """Each level's latest token at every position, `(batch, n, dim)`, or what its `parts`, a chain, make of it.

    A token of a level of stride s is repeated for its s positions. If the chunk starts, at `position`, in the middle of
    a stride, the first positions belong to the last token of the previous chunk: `state` holds that token, `(batch, 1,
    dim)`, for each strided level. `n` is the length of the finest level, which has stride 1 in a model.
    """
    n = tokens[min(range(len(strides)), key=strides.__getitem__)].shape[1]
    columns: list[Tensor] = []
    kept: list[Tensor | None] = []
    for i, (x, stride, last) in enumerate(zip(tokens, strides, state or (None,) * len(tokens), strict=True)):
        since = Grid(stride).since(position)
        if since and last is not None:
            x = torch.cat((last, x), dim=1)
        # a short chunk may have no token of this level
        kept.append(keep(last, x[:, -1:] if x.shape[1] or last is None else last))
        if parts is not None:
            x = chain(x, *parts[i])
        columns.append(x if stride == 1 else first_of(x.repeat_interleave(stride, dim=1)[:, since:], n))
    return columns, state and tuple(kept)


def concat_levels(
    tokens: Sequence[Tensor], strides: Sequence[int], state: MergeState | None = None, position: int = 0
) -> tuple[Tensor, MergeState | None]:
    """All levels' latest tokens at every position, concatenated: `(batch, n, sum of dims)`. See `at_each_position`."""
    columns, state = at_each_position(tokens, strides, state, position)
    return torch.cat(columns, dim=-1), state


def zero_columns(x: Tensor, dims: Sequence[int], ablated: Collection[int]) -> Tensor:
    """x `(..., sum of dims)` with zeros in the columns of the levels whose numbers are in `ablated`."""
    if not ablated:
        return x
    return torch.cat([torch.zeros_like(y) if i in ablated else y for i, y in enumerate(x.split(list(dims), -1))], -1)


class Merge(nn.Module):
    """Pools what all levels know at each position, and adds the result, the update, to the recipients.

    It takes and returns one `(batch, ceil(n / stride), dim)` for each level. A recipient of stride s gets the updates
    of positions 0, s, 2s, ...

    Subclasses define `build`, `token_counts`, `zero_init`, `gather`, `updates` and `weights`.

    Args:
        levels: the levels that are pooled.
        recipients: the indices in `levels` of those that the update is added to.
        strides: the stride of each level's tokens, counted in tokens of the finest level. Default: their own strides.
        window: the number of earlier tokens of each level that are read as well, if the kind of merge has a window.
    """

    window: int

    def __init__(
        self,
        levels: Sequence[Level],
        recipients: Sequence[int],
        strides: Sequence[int] | None = None,
        *,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.compressions = [level.compression for level in levels]
        self.strides = [level.stride for level in levels] if strides is None else list(strides)
        self.dims = [level.dim for level in levels]
        self.recipients = tuple(recipients)
        self.window = window
        self.build(levels)

    def build(self, levels: Sequence[Level]) -> None:
        """Creates the modules."""
        raise NotImplementedError

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        """How many tokens parts process when the merge covers n tokens of its finest level. Others process n."""
        raise NotImplementedError

    def zero_init(self) -> None:
        """Initializes the output with zeros, so that the merge adds nothing at first."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, like: Tensor) -> MergeState:
        """The last token of each strided level, `(batch, 1, dim)`, before anything was read."""
        return tuple(
            like.new_zeros(batch_size, 1, dim) if stride > 1 else None
            for stride, dim in zip(self.strides, self.dims, strict=True)
        )

    def forward(
        self,
        tokens: Sequence[Tensor],
        state: MergeState | None = None,
        position: int = 0,
        ablated: Collection[int] = (),
        contributions: list[Contribution] | None = None,
        wanted: Collection[int] | None = None,
    ) -> tuple[list[Tensor], MergeState | None]:
        """The levels' tokens with the update added, and the next state.

        Args:
            tokens: of each level, `(batch, ceil(n / stride), dim)`.
            state: the state after the previous chunk.
            position: the position of the chunk.
            ablated: the compressions of levels that are not read.
            contributions: a list that gets this merge's `Contribution`.
            wanted: the indices of the levels whose result is used. Default: all. Others may be returned unchanged.
        """
        updates, state = self.compute(tokens, state, position, ablated, contributions, wanted)
        merged = list(tokens)
        for i, update in zip(self.updated(wanted), updates, strict=True):
            merged[i] = merged[i] + update
        return merged, state

    def updated(self, wanted: Collection[int] | None) -> Sequence[int]:
        """The levels that get an update if the result of those in `wanted` is used."""
        return self.recipients

    def unread_modules(self, wanted: Collection[int]) -> list[nn.Module]:
        """The modules that have no effect if only the result of the levels in `wanted` is used."""
        return []

    def compute(
        self,
        tokens: Sequence[Tensor],
        state: MergeState | None,
        position: int,
        ablated: Collection[int],
        contributions: list[Contribution] | None,
        wanted: Collection[int] | None = None,
    ) -> tuple[list[Tensor], MergeState | None]:
        """The update of each level in `updated(wanted)`, and the next state. Arguments are those of `forward`."""
        numbers = [i for i, c in enumerate(self.compressions) if c in ablated]
        gathered, state = self.gather(tokens, state, position, self.updated(wanted))
        updates = self.updates(gathered, numbers)
        if contributions is not None:
            contributions.append(self.contribution(gathered, updates, numbers))
        return updates, state

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, updated: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        """What the updates are computed from, in a form of the subclass, and the next state."""
        raise NotImplementedError

    def updates(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        """The update of each recipient. `ablated` are numbers of levels."""
        raise NotImplementedError

    def weights(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        """The weights of the levels for each recipient, as in `Contribution`."""
        raise NotImplementedError

    @torch.no_grad()
    def contribution(self, gathered: Any, updates: Sequence[Tensor], ablated: Collection[int]) -> Contribution:
        changes = []
        for each in range(len(self.dims)):
            others = self.updates(gathered, {*ablated, each})
            changes.append([(update - other).norm(dim=-1) for update, other in zip(updates, others, strict=True)])
        recipients = [self.compressions[i] for i in self.recipients]
        norms = [torch.stack(each, dim=-1) for each in zip(*changes, strict=True)]
        return Contribution(
            dict(zip(recipients, norms, strict=True)),
            dict(zip(recipients, self.weights(gathered, ablated), strict=True)),
        )


def gain_of(norm: nn.Module) -> Tensor | float:
    """The factor of a norm for each channel, 1 if it has none."""
    gain = getattr(norm, 'gamma', getattr(norm, 'weight', None))
    return gain if isinstance(gain, Tensor) else 1.0


def normalised(shares: Tensor) -> Tensor:
    """Shares `(levels,)` scaled to a sum of 1. All stay 0 if all levels are ablated."""
    return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)
