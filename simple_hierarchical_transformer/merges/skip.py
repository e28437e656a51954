"""The merge of H-Net: the coarser token takes the finer token's place. Hwang et al. 2025, arXiv 2507.07955."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..levels import Level
from ..ops.linear import begin_at_zero, chain, effective_weight
from ..ops.precision import no_autocast
from .base import Merge, MergeState, at_each_position, normalised


class SkipMerge(Merge):
    """Replaces a finer token by the coarser token at its position plus a linear map of itself, which starts at zero.

    The coarser token is projected where the widths differ. The map of the finer token and the sum are computed in
    float32, also under autocast. Hwang et al. 2025, arXiv 2507.07955, section 2.3.
    """

    def build(self, levels: Sequence[Level]) -> None:
        finer, coarser = self.dims
        self.to_finer = nn.Identity() if finer == coarser else nn.Linear(coarser, finer, bias=False)
        self.residual = nn.Linear(finer, finer, bias=False)
        begin_at_zero(self.residual)

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        yield self.to_finer, n / self.strides[1]

    def zero_init(self) -> None:
        """Changes nothing: the map of the finer token starts at zero, and the coarser token must pass."""

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, updated: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        (finer, coarser), state = at_each_position(tokens, self.strides, state, position, [(), (self.to_finer,)])
        exact = torch.promote_types(finer.dtype, torch.float32)
        with no_autocast(finer.device):
            kept = chain(finer.to(exact), self.residual)
        return (finer, kept, coarser.to(exact)), state

    def updates(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        finer, kept, coarser = gathered
        terms = [term for i, term in enumerate((kept, coarser)) if i not in ablated]
        return [(sum(terms[1:], terms[0]) - finer).to(finer.dtype) if terms else -finer]

    def weights(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        finer, _, coarser = gathered
        kept = effective_weight(self.residual, finer).square().sum()
        # an identity has one weight of 1 for each channel
        like = coarser.new_zeros(1, self.dims[1])
        passed = (
            effective_weight(self.to_finer, like).square().sum()
            if self.dims[0] != self.dims[1]
            else kept.new_tensor(float(self.dims[0]))
        )
        shares = [share if i not in ablated else torch.zeros_like(share) for i, share in enumerate((kept, passed))]
        return [normalised(torch.stack(shares))]
