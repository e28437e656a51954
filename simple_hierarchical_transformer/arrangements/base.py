"""What arrangements have in common: how levels get their tokens, and what a pass returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from ..compressors import Source
from ..merges import Contribution
from ..ops.recompute import recompute

if TYPE_CHECKING:
    from ..config import Config
    from ..memory import BlockState, Memory
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..rows import Rows

R = TypeVar('R')


class MergeSpec(NamedTuple):
    """A merge that an arrangement needs."""

    members: Sequence[int]
    """The indices of the levels that it pools."""
    recipients: Sequence[int]
    """The indices in `members` of the levels that it adds to."""
    strides: Sequence[int] | None = None
    """The strides of the members' tokens, counted in tokens of the finest member. Default: the levels' strides."""


@dataclass(frozen=True)
class Request:
    """What a pass is asked for, besides its ids."""

    ablated: frozenset[int] = frozenset()
    """The compressions of the levels that merges and logits do not read."""
    merge: bool = True
    """Whether merges run."""
    contributions: list[Contribution] | None = None
    """A list that gets the `Contribution` of each merge."""
    final_levels: Collection[int] | None = None
    """The indices of the levels whose final tokens are used. None: all."""


@dataclass
class LevelOutputs:
    """What the levels make of a chunk."""

    inputs: list[Tensor]
    """Each level's tokens as its first block gets them, `(batch, ceil(n / stride), dim)`."""
    tokens: list[Tensor]
    """Each level's tokens as its last block and merge return them, likewise."""
    codes: Tensor | None = None
    """The coarsest feature map of the autoencoder, if there is one."""
    pondered: dict[int, Tensor] = field(default_factory=dict)
    """The ponder cost of the tokens of levels that halt, `(batch, ceil(n / stride))`, by the index of the level."""
    pieces: dict[int, Pieces] = field(default_factory=dict)
    """Where the tokens of placed levels stand, by the index of the level."""


class Arrangement:
    """How the levels of a model run. It owns no weights: it declares what to build, and receives the model."""

    nested: ClassVar[bool] = False
    """Whether levels run one inside the other. Then a level reads the tokens of the next finer one, and a merge joins
    two neighbors. Otherwise all levels read the embeddings, and a merge follows every layer."""

    def check(self, config: Config) -> None:
        """Raises ValueError where the options do not fit the arrangement."""
        if any(level.is_placed for level in config.levels):
            raise ValueError(f"boundaries are for arrangement = 'hourglass', got {config.arrangement!r}")
        if config.merge == 'skip':
            raise ValueError(f"merge = 'skip' is for arrangement = 'hourglass', got {config.arrangement!r}")

    def sources(self, config: Config) -> list[Source]:
        """The source of each level's compressor."""
        raise NotImplementedError

    def merges(self, config: Config) -> list[MergeSpec]:
        """The merges to build. With `share_layers`, merges of all layers are one."""
        raise NotImplementedError

    def run(
        self, model: HierarchicalTransformer, ids: Tensor, embeds: Tensor, memory: Memory, request: Request
    ) -> LevelOutputs:
        """Runs all levels on ids `(batch, n)` with their embeddings `(batch, n, dim_embed)`.

        Puts the next state into `memory`.
        """
        raise NotImplementedError


def compress(
    model: HierarchicalTransformer, i: int, finer: Tensor, before: Tensor | None, position: int
) -> tuple[Tensor, Tensor | None]:
    """Level i's tokens of finer ones `(batch, n, dim)`, the first of index `position`; and the next state."""
    norm = model.post_token_emb_norms[i]
    x, after = model.compressors[i](finer, before, position)
    # the residual stream keeps the dtype of the weights, also under autocast
    return norm(x.to(getattr(norm, 'weight', model.token_emb.weight).dtype)), after


def run_block(
    model: HierarchicalTransformer, layer: int, i: int, x: Tensor, before: BlockState | None, start: int | Rows
) -> tuple[Tensor, BlockState | None]:
    """Layer `layer` of level i, and its next state. `start` is the index of the first of its tokens x."""
    if model.step_embeds:
        x = x + model.step_embeds[i][layer]
    return model.block(layer, i)(x, before, start)


def checkpointed(
    model: HierarchicalTransformer, modules: Sequence[nn.Module], fn: Callable[..., R], *args: object
) -> R:
    """`fn(*args)`, recomputed in the backward pass if the model has `gradient_checkpointing`."""
    return recompute(fn, modules, *args) if model.gradient_checkpointing else fn(*args)
