"""Token mixers: one file for each, a common interface, and a registry by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..levels import Level
from .attention import Attention
from .base import Mixer, MixerState
from .gateloop import GateLoop
from .h3 import H3
from .hyena import Hyena
from .lsh import LSHAttention
from .ragged import mix_rows
from .s4d import S4D
from .simple_gateloop import SimpleGateLoop

__all__ = [
    'H3',
    'MIXERS',
    'S4D',
    'Attention',
    'GateLoop',
    'Hyena',
    'LSHAttention',
    'Mixer',
    'MixerState',
    'SimpleGateLoop',
    'build_mixer',
    'mix_rows',
]

MIXERS: dict[str, type[nn.Module]] = {
    'attention': Attention,
    'lsh': LSHAttention,
    'gateloop': GateLoop,
    'simple-gateloop': SimpleGateLoop,
    's4d': S4D,
    'h3': H3,
    'hyena': Hyena,
}


def build_mixer(level: Level, *, length: int, layer: int, backend: str) -> Any:
    """The mixer of a block. None for attention with a window of 0: such a level has no attention.

    The result is both an `nn.Module` and a `Mixer`. Python has no type for that.

    Args:
        level: settings of the block's level.
        length: number of tokens of a phase in a pass over `seq_len` ids.
        layer: number of the block, from 0.
        backend: the model's `attn_backend`.

    Raises:
        ValueError: `mixer_kwargs` names an argument that the mixer does not have.
    """
    mixer = MIXERS[level.mixer] if isinstance(level.mixer, str) else level.mixer
    parameters = inspect.signature(mixer).parameters
    settings = dict(
        dim=level.dim, dim_head=level.dim_head, heads=level.heads, window=level.window, length=length, layer=layer,
        backend=backend, placed=level.is_placed,
    )  # fmt: skip
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    options = [name for name in parameters if name not in settings]
    for name in level.mixer_kwargs:
        if name in settings or (name not in options and not takes_any):
            raise ValueError(
                f'mixer_kwargs of hierarchy {level.compression} must be of {", ".join(options) or "none"} for mixer '
                f'{mixer.__name__}, got {name!r}'
            )
    if not level.mixes:
        return None
    return mixer(**{name: value for name, value in settings.items() if name in parameters}, **level.mixer_kwargs)
