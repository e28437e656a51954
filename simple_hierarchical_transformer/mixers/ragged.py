"""Ragged chunks for mixers that know only chunks whose rows are all alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import Rows
from .base import MixerState


def mix_rows(mixer: Any, x: Tensor, state: MixerState, rows: Rows) -> tuple[Tensor, MixerState]:
    """The mixer on a ragged chunk x `(batch, n, dim)`, and the next state.

    The mixer runs once for each group of rows of the same length, and of the same start if its results depend on
    positions. Outputs of padding are zeros. A row without tokens keeps its state. At least one row has tokens.
    """
    if getattr(mixer, 'takes_rows', False):
        return mixer(x, state, rows)
    groups = rows.groups(by_start=getattr(mixer, 'uses_position', True))
    in_place = not torch.is_grad_enabled()
    outs: list[Tensor] = []
    states: list[MixerState] = []
    for members, start, length in groups:
        held = tuple(tensor.index_select(0, members) for tensor in state)
        out, after = mixer(x.index_select(0, members)[:, :length], held, start)
        outs.append(F.pad(out, (0, 0, 0, x.shape[1] - length)))
        states.append(after)

    index, out = torch.cat([group.members for group in groups]), torch.cat(outs)
    write = Tensor.index_copy_ if in_place else Tensor.index_copy
    new = (torch.cat(tensors) for tensors in zip(*states, strict=True))
    state = tuple(write(old, 0, index, each.to(old.dtype)) for old, each in zip(state, new, strict=True))
    return out.new_zeros(len(x), *out.shape[1:]).index_copy(0, index, out), state
