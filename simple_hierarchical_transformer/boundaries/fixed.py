"""Rules without weights: every k-th token, words, sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from .base import Boundaries

LETTERS = (*range(ord('0'), ord('9') + 1), *range(ord('A'), ord('Z') + 1), *range(ord('a'), ord('z') + 1))
# bytes 0x80 to 0xBF continue a character of UTF-8
CONTINUATIONS = range(0x80, 0xC0)
SENTENCE_ENDS = b'.!?\n'


class Every(Boundaries):
    """A boundary at every `count`-th finer token: a fixed stride."""

    reads_tokens: ClassVar[bool] = False

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def extra_repr(self) -> str:
        return str(self.count)

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Tensor:
        return index % self.count == 0


class RunStarts(Boundaries):
    """Marks each id of a set whose predecessor is not in the set: the first of every run.

    Args:
        members: the ids of the set.
        num_tokens: the size of the vocabulary.
    """

    reads_tokens: ClassVar[bool] = False
    marks_ids: ClassVar[bool] = True
    is_member: Tensor

    def __init__(self, members: Iterable[int], num_tokens: int) -> None:
        super().__init__()
        # one more for -1, which stands before the sequence
        table = torch.zeros(num_tokens + 1, dtype=torch.bool)
        table[list(members)] = True
        self.register_buffer('is_member', table, persistent=False)

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Tensor:
        inside = self.is_member[ids]
        return inside[:, 1:] & ~inside[:, :-1]


def words(num_tokens: int) -> RunStarts:
    """The word rule of SpaceByte, Slagle 2024, arXiv 2404.14408, section 2.

    A byte is spacelike if it is no ASCII letter, no digit and no continuation byte of UTF-8. A boundary is at each
    spacelike byte that follows another kind of byte. Ids from 256 on count as spacelike.
    """
    others = {*LETTERS, *CONTINUATIONS}
    return RunStarts([each for each in range(num_tokens) if each not in others], num_tokens)


def sentences(num_tokens: int) -> RunStarts:
    """Marks the first of each run of `.`, `!`, `?` and newlines.

    It cannot look ahead, so dots in abbreviations and numbers are boundaries too. Above words, a sentence ends with the
    word that the mark ends, or with the next word if other marks stand between.
    """
    return RunStarts(SENTENCE_ENDS, num_tokens)
