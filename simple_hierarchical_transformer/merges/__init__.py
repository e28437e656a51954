"""How levels exchange what they know: one file for each kind of merge, listed in `MERGES`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..checks import is_int
from .attention import AttentionMerge
from .base import Contribution as Contribution
from .base import Merge as Merge
from .base import MergeState as MergeState
from .base import concat_levels as concat_levels
from .base import zero_columns as zero_columns
from .concat import ConcatMerge
from .linear import LinearMerge
from .skip import SkipMerge

MERGES: dict[str, type[Merge]] = dict(concat=ConcatMerge, linear=LinearMerge, attention=AttentionMerge, skip=SkipMerge)


def find_receivers(
    merge_into: Any, compressions: Sequence[int], predict_level: int, predict_from: Collection[int]
) -> list[int]:
    """The indices of the levels that merges add to. Raises ValueError where `merge_into` names none that predicts."""
    if merge_into == 'all':
        return list(range(len(compressions)))
    if merge_into == 'predict':
        return [predict_level]
    named = merge_into if isinstance(merge_into, (tuple, list)) else ()
    if not named or any(not is_int(c) or c not in compressions or named.count(c) > 1 for c in named):
        raise ValueError(
            f"merge_into must be 'predict', 'all' or a tuple of hierarchies {list(compressions)} that differ, got "
            f'{merge_into!r}'
        )
    found = [i for i, c in enumerate(compressions) if c in named]
    if not set(found) & set(predict_from):
        raise ValueError(
            f'merge_into must name a level that predicts, {[compressions[i] for i in predict_from]}: nothing would '
            f'reach the logits from others, got {merge_into!r}'
        )
    return found
