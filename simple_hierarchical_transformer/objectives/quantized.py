"""A level token predicts the discrete ids of the level's next token, which a fixed random quantizer gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_entropy import CHUNK, cross_entropy
from ..ops.precision import no_autocast
from .base import Batch, Objective, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..read import Read


class RandomProjectionQuantizer(nn.Module):
    """Discrete ids of vectors, by matrices that are drawn once and never trained.

    It normalises x to mean 0 and variance 1, projects it, and returns the index of the nearest direction in each of
    several codebooks: `(..., dim)` to `(..., codebooks)`, int64 in `[0, size)`. BEST-RQ: Chiu et al. 2022, arXiv
    2202.01855; with several codebooks: Zhang et al. 2023, arXiv 2303.01037.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, dim: int, *, codebooks: int, size: int, dim_code: int) -> None:
        super().__init__()
        projection, codebook = torch.empty(codebooks, dim, dim_code), torch.randn(codebooks, size, dim_code)
        for matrix in projection:
            nn.init.xavier_normal_(matrix)
        # saved with the weights: other matrices would give other ids
        self.register_buffer('projection', projection)
        self.register_buffer('codebook', F.normalize(codebook, dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.to(self.projection.dtype), x.shape[-1:])
        with no_autocast(x.device):
            # the length of a projection does not change which direction is nearest
            ids = [
                torch.cat(
                    [(rows @ p @ c.t()).argmax(dim=-1) for rows in x.flatten(0, -2).split(max(CHUNK // len(c), 1))]
                )
                for p, c in zip(self.projection, self.codebook, strict=True)
            ]
        return torch.stack(ids, dim=-1).view(*x.shape[:-1], len(self.codebook))


@dataclass(frozen=True, kw_only=True)
class Quantized(Objective):
    kind: ClassVar[str] = 'quantized'
    containers: ClassVar[Mapping[str, str | None]] = dict(to_quantized='head', quantizers=None)

    codebooks: int = 1

    @classmethod
    def from_config(cls, config: Config) -> list[Quantized]:
        weights = config.values('quantized_loss_weight')
        return cls.per_level(config, weights, codebooks=config.quantizer_codebooks)

    def modules(self, config: Config) -> dict[str, nn.Module]:
        assert self.level is not None
        dim, size = config.levels[self.level].dim, config.quantizer_codebook_size
        return {
            'to_quantized': nn.Linear(dim, self.codebooks * size, bias=False),
            'quantizers': RandomProjectionQuantizer(
                dim, codebooks=self.codebooks, size=size, dim_code=config.quantizer_dim
            ),
        }

    @property
    def targets_per_token(self) -> int:
        return self.codebooks

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        """Which tokens count: -1 for one that ends in an ignored id, else 0. The ids depend on what was read."""
        last = batch.at_tokens(self.stride, pieces)[:, 1:, None].expand(-1, -1, self.codebooks)
        return Targets(torch.where(last == batch.ignore_index, -1, 0), -1)

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        assert self.level is not None
        values, ignored = self.targets_of(read, batch)
        divisors = self.divisors(batch, counts)
        ids: Tensor = model.quantizers[str(self.level)](quantized_tokens(model, read)[self.level].detach())
        if ids.shape[-1] != self.codebooks:
            raise ValueError(
                f'quantizers of hierarchy {self.compression} must return {self.codebooks} ids for each token, as '
                f'quantizer_codebooks says, got {ids.shape[-1]}'
            )
        loss = cross_entropy(
            read.tokens[self.level][:, :-1],
            model.to_quantized[str(self.level)],
            ids[:, 1:].masked_fill(values == ignored, ignored),
            ignored,
            count=None if divisors is None else divisors[0],
        )
        return loss * self.scale if self.placed else loss


def quantized_tokens(model: HierarchicalTransformer, read: Read) -> list[Tensor]:
    """Each level's tokens that `quantize_from` names."""
    return read.inputs if model.quantize_from == 'compressed' else read.tokens


def quantize(model: HierarchicalTransformer, tokens: Sequence[Tensor]) -> list[Tensor | None]:
    """The ids `(batch, tokens, codebooks)` of each level's tokens, None where the level has no quantizer."""
    return [model.quantizers[str(i)](x.detach()) if str(i) in model.quantizers else None for i, x in enumerate(tokens)]
