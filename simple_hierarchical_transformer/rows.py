"""Rows of a ragged chunk: sequences of different lengths, each at a position of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowGroup(NamedTuple):
    """Rows of a ragged chunk that have the same number of tokens."""

    members: Tensor
    """Which rows: int64 `(rows,)`."""
    start: int
    """The number of tokens before the chunk, if all rows of the group agree in it."""
    length: int
    """The number of tokens of each row in the chunk, at least 1."""


class Rows:
    """Where each row of a chunk of tokens `(batch, n, dim)` begins, and how many of its tokens exist.

    The tokens of a row come first, and padding follows them. A causal module that reads a row from the left never reads
    padding before tokens.

    Args:
        starts: the number of tokens of each row before the chunk.
        lengths: the number of tokens of each row in the chunk, at most `n`.
        device: the device of the tensors that it returns.
    """

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.starts = list(starts)
        self.lengths = list(lengths)
        self.device = device
        self.results: dict[Hashable, Any] = {}

    def once(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make()`, computed once for all layers. It must depend only on the rows and on `what`."""
        if what not in self.results:
            self.results[what] = make()
        return self.results[what]

    @property
    def end(self) -> int:
        """The largest number of tokens of a row up to the end of the chunk."""
        return max(start + length for start, length in zip(self.starts, self.lengths, strict=True))

    @cached_property
    def starts_on_device(self) -> Tensor:
        """int64 `(batch,)`."""
        return torch.tensor(self.starts, device=self.device)

    @cached_property
    def lengths_on_device(self) -> Tensor:
        """int64 `(batch,)`."""
        return torch.tensor(self.lengths, device=self.device)

    def common_start(self, n: int) -> int | None:
        """The start of all rows if they begin together and have `n` tokens each, otherwise None."""
        first = self.starts[0]
        together = all(start == first for start in self.starts)
        return first if together and all(length == n for length in self.lengths) else None

    def with_tokens(self, n: int) -> tuple[Tensor, Rows | int] | None:
        """The rows that have tokens in a chunk of `n`, int64 `(rows,)`, and their start, as blocks take it.

        None if all rows have tokens, or none has.
        """
        members = [row for row, length in enumerate(self.lengths) if length]
        if len(members) in (0, len(self.lengths)):
            return None
        rows = Rows([self.starts[row] for row in members], [self.lengths[row] for row in members], self.device)
        common = rows.common_start(n)
        return torch.tensor(members, device=self.device), rows if common is None else common

    def positions(self, n: int) -> Tensor:
        """The position of each token of a chunk of `n`, as if padding were tokens too: int64 `(batch, n)`."""
        count = torch.arange(n, device=self.device)
        return self.once(('positions', n), lambda: self.starts_on_device[:, None] + count)

    def last(self, x: Tensor, before: Tensor) -> Tensor:
        """The last token of each row of x `(batch, n, dim)`, or of `before` `(batch, 1, dim)` in an empty row.

        n is at least 1. The result has the wider dtype of both.
        """
        lengths = self.lengths_on_device[:, None, None]
        newest = x.gather(1, (lengths - 1).clamp(min=0).expand(-1, 1, x.shape[-1])) if x.shape[1] > 1 else x
        return torch.where(lengths > 0, newest, before)

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` tokens of each row in the chunk: their rows and their indices in it, int64 `(tokens,)`."""

        def find() -> tuple[Tensor, Tensor]:
            # on the CPU, because a GPU would have to wait for the number of tokens
            lengths = torch.tensor(self.lengths)[:, None]
            token = torch.arange(max(self.lengths))
            row, token = ((token < lengths) & (token >= lengths - count)).nonzero(as_tuple=True)
            return row.to(self.device), token.to(self.device)

        return self.once(('newest', count), find)

    def pieces(self, n: int, size: int) -> list[Rows]:
        """The rows of consecutive pieces of a chunk of `n` tokens, `size` tokens each but for the last one."""
        if n <= size:
            return [self]

        def piece(first: int) -> Rows:
            done = [min(length, first) for length in self.lengths]
            lengths = [min(length, first + size) - before for length, before in zip(self.lengths, done, strict=True)]
            starts = [start + before for start, before in zip(self.starts, done, strict=True)]
            return Rows(starts, lengths, self.device)

        return self.once(('pieces', n, size), lambda: [piece(first) for first in range(0, n, size)])

    def groups(self, by_start: bool) -> list[RowGroup]:
        """The rows that have tokens, in groups of equal lengths, and with `by_start` also of equal starts."""

        def find() -> list[RowGroup]:
            members: dict[tuple[int, int], list[int]] = {}
            for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
                if length:
                    members.setdefault((start if by_start else 0, length), []).append(row)
            return [
                RowGroup(torch.tensor(rows, device=self.device), start, length)
                for (start, length), rows in members.items()
            ]

        return self.once(('groups', by_start), find)
