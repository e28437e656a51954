"""The result of one pass of the model up to the logits, which objectives read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .memory import State
from .merges import Contribution
from .pieces import Pieces


@dataclass
class Read:
    """The result of a pass over ids `(batch, n)`, up to the logits."""

    embeds: Tensor
    """The embeddings, `(batch, n, max(dim))`."""
    inputs: list[Tensor]
    """Each level's tokens as its first block gets them, `(batch, ceil(n / stride), dim)`."""
    tokens: list[Tensor]
    """Each level's final tokens, of the same shape."""
    features: Tensor
    """The final tokens of the levels that predict, concatenated at each position: `(batch, n, sum of their dims)`."""
    codes: Tensor | None
    """The autoencoder's coarsest feature map, if there is one."""
    pondered: dict[int, Tensor]
    """The ponder cost of the tokens of levels that halt, `(batch, ceil(n / stride))`, by the index of the level."""
    pieces: dict[int, Pieces]
    """Where the tokens of placed levels stand, by the index of the level. Their `inputs` and `tokens` have `(batch, k,
    dim)`, with padding after the tokens of each row."""
    contributions: list[Contribution]
    """The contribution of each level to each merge, if requested."""
    state: State | None
    """The state after these ids, if a state was given or requested."""
