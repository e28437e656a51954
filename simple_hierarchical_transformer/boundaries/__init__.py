"""Rules that place the tokens of a level: one file for each kind, listed in `BOUNDARIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .base import Boundaries as Boundaries
from .base import Marks as Marks
from .fixed import AtIds as AtIds
from .fixed import Every, sentences, words
from .learned import LearnedBoundaries as LearnedBoundaries
from .surprise import Surprise as Surprise


@dataclass(frozen=True)
class Finer:
    """What a rule is built for."""

    dim: int
    """The width of the finer tokens."""
    num_tokens: int
    """The size of the vocabulary."""
    spacing: int
    """The intended number of finer tokens in a piece."""
    rule: str | None = None
    """The rule that places the finer tokens themselves, if they are placed."""


BOUNDARIES: dict[str, Callable[[Finer], Boundaries]] = dict(
    every=lambda finer: Every(finer.spacing),
    words=lambda finer: words(finer.num_tokens),
    sentences=lambda finer: sentences(finer.num_tokens, of_words=finer.rule == 'words'),
    learned=lambda finer: LearnedBoundaries(finer.dim),
    surprise=lambda finer: Surprise(finer.dim, finer.num_tokens, finer.spacing),
    rise=lambda finer: Surprise(finer.dim, finer.num_tokens, finer.spacing, rise=True),
)
# rules that read ids as bytes, and rules that a head learns
OF_BYTES = ('words', 'sentences')
OF_SURPRISE = ('surprise', 'rise')
