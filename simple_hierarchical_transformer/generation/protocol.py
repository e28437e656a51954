"""The interface of models that this package can generate with."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor, nn

from ..memory import State


class StatefulModel(Protocol):
    """A language model that reads a sequence in chunks and carries a state from one chunk to the next.

    `generate`, `stream` and `score` use only these members. A call may also accept `logits_to_keep`, an int: the
    model then returns logits of that many last positions only, `(batch, logits_to_keep, num_tokens)`. Generation passes
    1 to models whose `forward` names this argument, because it samples from the last position alone.
    """

    num_tokens: int
    """Size of the vocabulary."""
    seq_len: int
    """The longest sequence that the model reads without a state."""
    ignore_index: int
    """The id that scores ignore."""
    token_emb: nn.Embedding
    """The embedding of ids. Ids are moved to its device."""

    def __call__(self, ids: Tensor, *, state: State | None = None, return_state: Literal[True]) -> tuple[Tensor, State]:
        """Logits `(batch, n, num_tokens)` of ids `(batch, n)` that follow `state`, and the state after them."""

    def check_state(self, state: State, ids: Tensor) -> None:
        """Raises ValueError if `ids` cannot be read after `state`."""
