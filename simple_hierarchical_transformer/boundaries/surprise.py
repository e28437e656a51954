"""Boundaries where the next id is hard to predict: Pagnoni et al. 2024, arXiv 2412.09871, section 2.3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.precision import KeepsExact, exact_dtype
from ..ops.tracing import is_transformed
from .base import Boundaries

# logits in memory at a time
CHUNK = 1 << 22
# tokens that the threshold is calibrated on
SAMPLE = 1 << 14
# the weight of a new batch in the threshold's moving average: with a smaller one, the threshold stays behind where the
# entropy falls fast, and no token exceeds it for many steps
RATE = 0.3


class Surprise(KeepsExact, Boundaries):
    """A boundary where the entropy of the next id exceeds a threshold.

    A linear head on the finer tokens predicts the next id. No gradient flows from it into the tokens. Training mode
    moves the threshold so that one in `spacing` tokens exceeds it: a moving average of the quantile of each batch,
    which takes effect in the next one. Before the first training step, only the first token is a boundary.

    Args:
        dim: the width of the finer tokens.
        num_tokens: the size of the vocabulary.
        spacing: the intended number of finer tokens in a piece.
        rise: compare not the entropy, but its rise from one token to the next, with the threshold.
    """

    roles: ClassVar[Mapping[str, str]] = dict(to_logits='head')
    exact = ('threshold',)
    threshold: Tensor

    def __init__(self, dim: int, num_tokens: int, spacing: float, rise: bool = False) -> None:
        super().__init__()
        self.spacing = spacing
        self.rise = rise
        self.norm = RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        self.register_buffer('threshold', torch.tensor(math.inf, dtype=exact_dtype()))

    def extra_repr(self) -> str:
        return f'spacing={self.spacing}, rise={self.rise}'

    @torch.no_grad()
    def entropy(self, x: Tensor) -> Tensor:
        """The entropy of the next id after tokens `(batch, n, dim)`, in nats: `(batch, n)`."""
        rows = x.detach().flatten(0, 1)
        found = []
        for part in rows.split(max(CHUNK // self.to_logits.weight.shape[0], 1)):
            logits = chain(part, self.norm, self.to_logits)
            log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
            found.append(-(log_probs.exp() * log_probs).sum(dim=-1))
        return torch.cat(found).view(x.shape[:2])

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Tensor:
        if self.rise:
            entropy = self.entropy(x)
            measure = entropy[:, 1:] - entropy[:, :-1]
        else:
            measure = self.entropy(x[:, 1:])
        boundary = measure > self.threshold
        # transforms of torch.func cannot write a buffer
        if self.training and torch.is_grad_enabled() and not is_transformed():
            # without this batch's own boundaries, which must not depend on later tokens
            self.calibrate(measure, index > 0)
        return boundary

    @torch.no_grad()
    def calibrate(self, measure: Tensor, counted: Tensor) -> None:
        """Moves the threshold towards the value that one in `spacing` of the counted tokens exceeds.

        Both are `(batch, n)`.
        """
        # without a sync, and without a shape that depends on the data
        measure = measure.detach().masked_fill(~counted, math.nan).flatten()[:SAMPLE]
        if not len(measure):
            return
        found = measure.to(self.threshold.dtype).nanquantile(1 - 1 / self.spacing)
        moved = torch.where(self.threshold.isinf(), found, torch.lerp(self.threshold, found, RATE))
        # runs skip a step whose loss is not finite
        self.threshold.copy_(torch.where(found.isfinite(), moved, self.threshold))
