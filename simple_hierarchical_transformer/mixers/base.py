"""The interface of a token mixer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

MixerState = tuple[Tensor, ...]
"""The state of a mixer after some tokens: tensors `(batch, ...)`."""


class Mixer(Protocol):
    """A module that mixes the tokens of one sequence, causally. It norms its input itself.

    A block builds it with those of these arguments that its constructor names, and with the level's `mixer_kwargs`:

    - `dim`, `dim_head`, `heads`, `window`: settings of the level;
    - `length`: number of tokens of a phase in a pass over `seq_len` ids;
    - `layer`: number of the block, from 0;
    - `backend`: the model's `attn_backend`;
    - `placed`: whether boundaries in the text place the tokens of the level. Rows of a batch are then at different
      positions.

    Optional members:

    - `products(n)`: number of operations of a pass over `n` tokens, without products with weights. Training uses it to
      report costs.
    - `to_out`: the module that `zero_init` sets to zero.
    - `with_room(state, tokens)`: for a state that grows, returns the state with room for that many tokens. A block
      calls it first, with phases as the leading axis of each tensor: `(phases, batch, ...)`.
    - `static_step`: False where the operations of a step depend on its position.
    - `uses_position`: False where results do not depend on `start`. Rows of a batch at different positions can then
      run together.
    - `takes_rows`: True where `start` may also be the `Rows` of a ragged chunk, with a state. Otherwise a block calls
      the mixer once for each group of rows of the same start and length.
    """

    def __call__(self, x: Tensor, state: MixerState | None, start: int) -> tuple[Tensor, MixerState | None]:
        """Mix the tokens `x`, at positions from `start` on.

        Args:
            x: `(batch, seq, dim)`.
            state: the state of the tokens before `start`, tensors `(batch, ...)`. None if no state is kept.
            start: position of the first token; 0 without a state.

        Returns:
            The mixed tokens `(batch, seq, dim)`, and the state after them, None without a state. The new state has
            the shapes of the old one. Where gradients are disabled, it is the same tensors, written in place.
        """

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        """The state before the first token of `batch` sequences, with the dtype and device of `like`."""
