"""The terms of the loss: one file each, listed in `OBJECTIVES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .autoencoder import Autoencoding
from .base import Batch as Batch
from .base import Objective as Objective
from .next_latent import NextLatent
from .next_token import NextToken
from .parts import LossParts as LossParts
from .parts import split_counts as split_counts
from .parts import total_loss as total_loss
from .pieces import PieceShare as PieceShare
from .ponder import Ponder
from .prophet import Prophet
from .quantized import Quantized
from .quantized import quantize as quantize
from .quantized import quantized_tokens as quantized_tokens
from .ratio import Ratio as Ratio
from .reconstruction import Reconstruction
from .surprise import Surprised as Surprised

if TYPE_CHECKING:
    from ..config import Config

# the order of `LossParts.named` and of `count_targets`, and that in which modules are built
OBJECTIVES: tuple[type[Objective], ...] = (
    NextToken, Reconstruction, Prophet, Quantized, NextLatent, Ponder, Autoencoding, Ratio, Surprised,
    PieceShare,
)  # fmt: skip


def build_objectives(config: Config) -> list[Objective]:
    """The objectives that a configuration asks for."""
    return [each for kind in OBJECTIVES for each in kind.from_config(config)]
