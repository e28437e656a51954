"""Rules that place the tokens of a level: one file for each kind, listed in `BOUNDARIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .base import Boundaries as Boundaries
from .base import Marks as Marks
from .fixed import Every, sentences, words
from .fixed import RunStarts as RunStarts
from .learned import LearnedBoundaries as LearnedBoundaries
from .surprise import Surprise as Surprise


@dataclass(frozen=True)
class Finer:
    """What a rule is built for."""

    dim: int
    """The width of the finer tokens."""
    num_tokens: int
    """The size of the vocabulary."""
    spacing: float
    """The intended number of finer tokens in a piece."""


BOUNDARIES: dict[str, Callable[[Finer], Boundaries]] = dict(
    every=lambda finer: Every(round(finer.spacing)),
    words=lambda finer: words(finer.num_tokens),
    sentences=lambda finer: sentences(finer.num_tokens),
    learned=lambda finer: LearnedBoundaries(finer.dim),
    surprise=lambda finer: Surprise(finer.dim, finer.num_tokens, finer.spacing),
    rise=lambda finer: Surprise(finer.dim, finer.num_tokens, finer.spacing, rise=True),
)
# rules that read ids as bytes, and rules that a head learns
OF_BYTES = ('words', 'sentences')
OF_SURPRISE = ('surprise', 'rise')
