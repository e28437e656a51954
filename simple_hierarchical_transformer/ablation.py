"""Ablation of levels: `with model.ablate(8): ...` shows what a level is worth."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .arrangements import arrangement_of
from .checks import is_int
from .levels import Level

M = TypeVar('M', bound='Ablatable')


class Ablations(threading.local):
    """The levels that each thread has ablated, by their compressions. Every thread starts with `ablated`.

    Ablations may end in any order. A copy or a pickle has none. This is no context variable, because the compiler
    cannot trace those.
    """

    def __init__(self, ablated: frozenset[int] = frozenset()) -> None:
        self.active: tuple[frozenset[int], ...] = (ablated,)
        self.ablated = ablated

    def __reduce__(self) -> tuple[type[Ablations], tuple[()]]:
        return Ablations, ()

    def begin(self, ablated: frozenset[int]) -> None:
        self.active = (*self.active, ablated)
        self.ablated = self.ablated | ablated

    def end(self, ablated: frozenset[int]) -> None:
        active = list(self.active)
        active.remove(ablated)
        self.active, self.ablated = tuple(active), frozenset().union(*active)


class Ablatable(nn.Module):
    """The methods of a model whose levels can be ablated."""

    levels: Sequence[Level]
    predict_from: Sequence[int]
    arrangement: str
    reversible: bool
    ablations: Ablations

    @contextmanager
    def ablate(self: M, *hierarchies: int) -> Iterator[M]:
        """Ablates the levels of these compressions inside a `with` block: `with model.ablate(8): loss, _ = model(...)`.

        Merges and logits read zeros in their place. Merges by attention attend to the other levels only. The ablated
        levels go on themselves, so the loss shows what their contribution is worth. In an hourglass, the levels inside
        an ablated one are ablated with it, for the logits too.

        Only calls from the same thread are affected.

        Raises:
            ValueError: there is no such level, or no level that predicts would be left.
        """
        compressions = [level.compression for level in self.levels]
        if not hierarchies or any(not is_int(c) or c not in compressions for c in hierarchies):
            raise ValueError(f'ablate takes one or more of hierarchies {compressions}, got {hierarchies}')
        ablated = frozenset(hierarchies)
        if arrangement_of(self).nested:
            ablated |= {c for c in compressions if c > min(hierarchies)}
        together = self.silent | ablated
        if all(compressions[i] in together for i in self.predict_from):
            raise ValueError(f'ablate must leave a level to predict, got {hierarchies}: ablated are {sorted(together)}')
        self.ablations.begin(ablated)
        try:
            yield self
        finally:
            self.ablations.end(ablated)

    @property
    def silent(self) -> frozenset[int]:
        """The compressions of the levels that are ablated in this thread."""
        return self.ablations.ablated

    def _replicate_for_data_parallel(self) -> Any:
        # nn.DataParallel runs replicas in threads of their own
        replica: Any = super()._replicate_for_data_parallel()
        replica.ablations = Ablations(self.silent)
        return replica
