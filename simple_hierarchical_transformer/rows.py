"""Rows of a ragged chunk: sequences of different lengths, each at a position of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Rows:
    """Where each row of a chunk of tokens `(batch, n, dim)` begins, and how many of its tokens exist.

    The tokens of a row come first, and padding follows them. A causal module that reads a row from the left never reads
    padding before tokens.

    Args:
        starts: the number of tokens of each row before the chunk.
        lengths: the number of tokens of each row in the chunk, at most `n`.
        device: the device of `starts_on_device` and `lengths_on_device`.
    """

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.starts = list(starts)
        self.lengths = list(lengths)
        self.device = device

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

    def last(self, x: Tensor, before: Tensor) -> Tensor:
        """The last token of each row of x `(batch, n, dim)`, or of `before` `(batch, 1, dim)` in an empty row."""
        joined = torch.cat((before.to(x.dtype), x), dim=1)
        index = self.lengths_on_device[:, None, None].expand(-1, 1, x.shape[-1])
        return joined.gather(1, index)
