"""The interface of a rule that places the tokens of a level."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Marks(NamedTuple):
    """What a rule says of finer tokens."""

    boundary: Tensor
    """Whether a piece ends at each of them, bool `(batch, n)`. The level has one token for each piece."""
    probability: Tensor | None = None
    """The probability of a boundary at each of them, `(batch, n)`, if the rule learns it."""


class Boundaries(nn.Module):
    """Decides which tokens of the finer level end a piece. A coarser level has a token at each of them.

    A rule sees a finer token and the `reach` tokens before it, and nothing later. So it has no state: the model keeps
    the last `reach` tokens for the next chunk. The first token of a sequence is always a boundary.

    To write a rule, define a subclass with `forward`, and pass an instance as the option `boundaries`.
    """

    reach: int = 1
    """The number of earlier tokens that the rule reads, at least 1."""
    reads_tokens: ClassVar[bool] = True
    """Whether it reads the vectors of the tokens, and not only their ids."""
    marks_ids: ClassVar[bool] = False
    """Whether it marks all ids instead of finer tokens. It then gets the ids of all positions, and no vectors. A piece
    ends at the first finer token from a marked id on."""

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Marks | Tensor:
        """Marks the last n of `reach + n` finer tokens.

        Args:
            x: the vectors, `(batch, reach + n, dim)`, zeros before the sequence. If `reads_tokens` is False, it has
                only n tokens.
            ids: the id at the position of each token, `(batch, reach + n)`, -1 before the sequence.
            index: the index in its row of each of the last n tokens, `(batch, n)`. -1 for padding.

        Returns:
            `Marks`, or only their `boundary`, bool `(batch, n)`.
        """
        raise NotImplementedError
