"""How the levels of a model run: one file for each arrangement."""

from __future__ import annotations

from typing import Protocol

from .base import Arrangement as Arrangement
from .base import LevelOutputs as LevelOutputs
from .base import MergeSpec as MergeSpec
from .base import Request as Request
from .hourglass import Hourglass
from .parallel import Parallel
from .parallel import compress_all as compress_all
from .reversible import Reversible

ARRANGEMENTS: dict[str, Arrangement] = dict(parallel=Parallel(), hourglass=Hourglass(), reversible=Reversible())


class Arranged(Protocol):
    """A configuration, or a model."""

    @property
    def arrangement(self) -> str: ...
    @property
    def reversible(self) -> bool: ...


def arrangement_of(arranged: Arranged) -> Arrangement:
    """The arrangement of a configuration or a model. Reversible layers are an arrangement of parallel levels."""
    reversible = arranged.reversible and arranged.arrangement == 'parallel'
    return ARRANGEMENTS['reversible' if reversible else arranged.arrangement]
