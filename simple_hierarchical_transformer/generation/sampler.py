"""Sampling of ids from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_int, check_number


@dataclass(frozen=True)
class Sampler:
    """Draws the next id of each row from its logits.

    Args:
        temperature: divides the logits. 0 always takes the most likely id.
        filter_thres: share of the vocabulary, the least likely ids, that is never drawn. Applies only if `top_k`,
            `top_p` and `min_p` are all None.
        top_k: draw from this many of the most likely ids.
        top_p: draw from the most likely ids that together reach this probability (Holtzman et al. 2019, arXiv
            1904.09751).
        min_p: draw from ids with at least this share of the most likely id's probability (Nguyen et al. 2024, arXiv
            2407.01082).
        generator: the source of random numbers. None uses PyTorch's default generator.
        repetition_penalty: divides positive logits of ids seen before and multiplies negative ones (CTRL, Keskar et al.
            2019, arXiv 1909.05858, section 4.1). 1 changes nothing.

    Raises:
        ValueError: a value is not allowed.
    """

    temperature: float = 1.0
    filter_thres: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_number('temperature', self.temperature)
        if not isinstance(self.generator, (torch.Generator, type(None))):
            raise ValueError(f'generator must be a torch.Generator, got {self.generator!r}')
        if not check_number('repetition_penalty', self.repetition_penalty):
            raise ValueError('repetition_penalty must be above 0, got 0')
        if self.top_k is not None:
            check_int('top_k', self.top_k)
        if self.filter_thres is None:
            raise ValueError('filter_thres must be between 0 and 1, got None')
        for name in ('filter_thres', 'top_p', 'min_p'):
            value = getattr(self, name)
            if value is not None and (check_number(name, value) > 1 or (name == 'top_p' and value == 0)):
                raise ValueError(
                    f'{name} must be {"above" if name == "top_p" else "between"} 0 and at most 1, got {value!r}'
                )

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draws one id for each row.

        Args:
            logits: `(batch, num_tokens)`.
            seen: bool `(batch, num_tokens)`, the ids that `repetition_penalty` applies to.

        Returns:
            int64 `(batch,)`.

        Raises:
            ValueError: the largest logit of a row is not finite.
        """
        if seen is not None and self.repetition_penalty != 1:
            values = logits.float()
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(values > 0, values / penalty, values * penalty), values)
        if self.temperature == 0:
            check_largest(logits)
            return logits.argmax(dim=-1)

        values, ids = logits.float().topk(self.candidates(logits.shape[-1]), dim=-1)
        check_largest(values[:, :1])
        # relative to the largest logit, so that a tiny temperature cannot overflow
        exact = torch.float32 if logits.device.type == 'mps' else torch.float64
        probs = ((values - values[:, :1]).to(exact) / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= self.top_p, 0)
        if self.min_p is not None:
            probs = probs.masked_fill(probs < self.min_p * probs[:, :1], 0)
        # torch.multinomial computes the same, but its checks synchronize twice with a GPU
        arrivals = torch.empty_like(probs).exponential_(generator=self.generator)
        return ids.gather(-1, (probs / arrivals).argmax(dim=-1, keepdim=True)).squeeze(-1)

    def candidates(self, num_tokens: int) -> int:
        """The number of most likely ids that can be drawn, before `top_p` and `min_p` apply."""
        if self.top_k is not None:
            return min(int(self.top_k), num_tokens)
        if self.top_p is not None or self.min_p is not None:
            return num_tokens
        # rounded first, because (1 - 0.9) * 30 is slightly above 3 and its ceiling would be 4
        return max(math.ceil(round((1 - self.filter_thres) * num_tokens, 6)), 1)


def check_largest(logits: Tensor) -> None:
    """Raises ValueError if the largest logit of a row of `(batch, n)` is not finite. NaN counts as the largest."""
    # a finite sum proves that all are finite. A sum may also overflow, or include ids that are excluded by -inf
    if math.isfinite(logits.sum(dtype=torch.float32).item()):
        return
    largest = logits.amax(dim=-1)
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f'logits must be finite to draw an id from, and the largest of row {row} is {largest[row].item()}: '
            'the weights or the state are not finite, or too large for their dtype'
        )
