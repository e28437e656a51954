"""The loss and its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..levels import Level
from .base import Objective


@dataclass(frozen=True, eq=False)
class LossParts:
    """The losses that `(loss, parts)` is made of. Unpacks as `ce, next_latent, recon, next_latent_per_hierarchy`.

    `loss = sum(model.loss_weights[name] * part for name, part in parts.named.items())`.
    """

    ce: Tensor
    """Cross entropy of the next token in nats, averaged over targets that are not ignored."""
    next_latent: Tensor
    """Next-latent losses of all levels, each already times its weight."""
    recon: Tensor
    """Reconstruction losses of all compressed levels, before `recon_loss_weight`."""
    next_latent_per_hierarchy: tuple[Tensor, ...]
    """Each level's next-latent loss before its weight, zero for a level that has none."""
    named: dict[str, Tensor]
    """All that is on, before its weight, level by level: 'ce', 'recon/8x', 'prophet/8x', 'quantized/8x',
    'autoencoder', 'next_latent/8x', 'ponder/8x', 'ratio/8x', 'surprise/8x', 'pieces/8x'."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ce, self.next_latent, self.recon, self.next_latent_per_hierarchy))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]


# wrappers look for tensors among what a model returns
register_pytree_node(
    LossParts,
    lambda parts: ([*parts, parts.named], None),
    lambda fields, _: LossParts(*fields),
)


def total_loss(
    objectives: Sequence[Objective], losses: dict[str, Tensor], levels: Sequence[Level]
) -> tuple[Tensor, LossParts]:
    """The weighted sum of the losses, a scalar, and its parts. `losses` are by the names of the objectives."""
    weighted = {each.name: each.weight * losses[each.name] for each in objectives}
    zero = losses['ce'].new_zeros(())
    return sum(weighted.values(), zero), LossParts(
        ce=losses['ce'],
        next_latent=sum((weighted[each.name] for each in objectives if each.kind == 'next_latent'), zero),
        recon=sum((losses[each.name] for each in objectives if each.kind == 'recon'), zero),
        next_latent_per_hierarchy=tuple(losses.get(f'next_latent/{level.compression}x', zero) for level in levels),
        named=losses,
    )


def split_counts(objectives: Sequence[Objective], counts: Tensor) -> list[Sequence[Tensor]]:
    """The counts of each objective, from those of all in a row `(counts,)`.

    Raises ValueError where there are not as many as the objectives have terms.
    """
    sizes = [each.terms for each in objectives]
    if not isinstance(counts, Tensor) or counts.shape != (sum(sizes),):
        got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f'counts must be what count_targets returns, of shape ({sum(sizes)},), got {got}')
    return [each.unbind() for each in counts.split(sizes)]
