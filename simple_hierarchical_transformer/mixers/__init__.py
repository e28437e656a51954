"""What mixes a level's tokens: one contract, a registry by name."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor, nn

from ..levels import Level
from .attention import Attention
from .gateloop import GateLoop, SimpleGateLoop
from .hyena import Hyena
from .lsh import LSHAttention
from .ssm import H3, S4D

__all__ = [
    'H3',
    'MIXERS',
    'S4D',
    'Attention',
    'GateLoop',
    'Hyena',
    'LSHAttention',
    'Mixer',
    'SimpleGateLoop',
    'build_mixer',
]


class Mixer(Protocol):
    """What a block needs of its token mixer, which norms its input itself.

    A class of modules is built with what its constructor names of `dim`, `dim_head`, `heads` and `window`, the level's
    settings; `length`, how many tokens a phase has in a pass of `seq_len` ids; `layer`, the number of the block from 0;
    `backend`, the model's `attn_backend`; and with the level's `mixer_kwargs`. It may have a method `products(n)` that
    tells the operations of a pass over n tokens, products with weights aside, for a run's account of its cost. If it
    has a part `to_out`, that is what begins at zero by `zero_init`. A mixer whose state grows has a method
    `with_room(state, tokens)`, which returns the state with room for so many tokens: a block calls it first, with
    tensors that phases lead, `(phases, batch, ...)`.
    """

    def __call__(
        self, x: Tensor, state: tuple[Tensor, ...] | None, start: int
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """x: `(batch, seq, dim)`, tokens `start` to `start + seq` of each sequence; returns the same shape, causally.

        Without a state `start` is 0, and None is returned beside. With one, `(batch, ...)` tensors that hold what is
        needed of the tokens before, that of after comes back: tensors of the same shapes, and the same ones written
        in place where gradients are disabled.
        """

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """The state before the first token of `batch` sequences, in the dtype and on the device of `like`."""


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
    """A level's mixer, or None where a window of 0 leaves attention out.

    Raises ValueError where `mixer_kwargs` has what its class does not take.
    """
    mixer = MIXERS[level.mixer] if isinstance(level.mixer, str) else level.mixer
    parameters = inspect.signature(mixer).parameters
    settings = dict(
        dim=level.dim, dim_head=level.dim_head, heads=level.heads, window=level.window, length=length, layer=layer,
        backend=backend,
    )  # fmt: skip
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    own = [name for name in parameters if name not in settings]
    for name in level.mixer_kwargs:
        if name in settings or (name not in own and not takes_any):
            raise ValueError(
                f'mixer_kwargs of hierarchy {level.compression} must be of {", ".join(own) or "none"} for mixer '
                f'{mixer.__name__}, got {name!r}'
            )
    if not level.mixes:
        return None
    return mixer(**{name: value for name, value in settings.items() if name in parameters}, **level.mixer_kwargs)
