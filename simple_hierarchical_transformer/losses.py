"""What trains the levels: cross entropy, reconstruction, and the prediction of the next latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .levels import check_number, check_sequence

LatentLoss = Callable[[Tensor, Tensor], Tensor]


class LossParts(NamedTuple):
    """The losses that `(loss, parts)` is made of: `loss = ce + next_latent + recon_loss_weight * recon`."""

    ce: Tensor
    """Cross entropy of the next token in nats, averaged over targets that are not ignored."""
    next_latent: Tensor
    """Next-latent losses of all levels, each already times its weight."""
    recon: Tensor
    """Reconstruction losses of all compressed levels, before `recon_loss_weight`."""
    next_latent_per_hierarchy: tuple[Tensor, ...]
    """Each level's next-latent loss before its weight, zero for a level that has none."""


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean over the targets that are not ignored; zero, and not nan, where all of them are.

    logits: `(..., num_tokens)`, targets: `(...)`.
    """
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction='sum')
    return total / (targets != ignore_index).sum().clamp(min=1)


def reconstruction_loss(
    logits: Tensor, ids: Tensor, *, compression: int, stride: int, ignore_index: int, offset: int = 0
) -> Tensor:
    """Cross entropy of the ids that each level token's compressor saw, those before the first of `ids` left out.

    logits: `(batch, ceil((seq - offset) / stride), compression * num_tokens)`, ids: `(batch, seq)`. The first level
    token ends at `offset`.
    """
    if not logits.shape[1]:
        return logits.sum()
    seen = F.pad(ids, (compression - 1, 0), value=ignore_index)[:, offset:].unfold(1, compression, stride)
    return cross_entropy(logits.unflatten(-1, (compression, -1)), seen, ignore_index)


def mse(pred: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(pred, target, reduction='none')


def smooth_l1(pred: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(pred, target, reduction='none')


def mse_and_cosine_sim(pred: Tensor, target: Tensor) -> Tensor:
    return 0.1 * mse(pred, target) + 0.9 * (1 - F.cosine_similarity(pred, target, dim=-1))[..., None]


# each maps (pred, target), both (batch, seq, dim), to a loss per element that broadcasts to that shape
LATENT_LOSSES: dict[str, LatentLoss] = {
    'mse_and_cosine_sim': mse_and_cosine_sim,
    'mse': mse,
    'smooth_l1': smooth_l1,
}


def find_latent_loss(named: str | LatentLoss) -> LatentLoss:
    """The loss of that name, or the callable itself. Raises ValueError where it is neither."""
    if isinstance(named, str) and named in LATENT_LOSSES:
        return LATENT_LOSSES[named]
    if isinstance(named, str) or not callable(named):
        raise ValueError(
            f'next_latent_loss_type must be one of {", ".join(LATENT_LOSSES)}, or a callable, got {named!r}'
        )
    return named


def normalise_rollout_weights(weights: Sequence[float] | None, num_rollouts: int) -> tuple[float, ...]:
    """A weight for each step ahead, equal where none are given, that sum to 1. Raises ValueError where they cannot."""
    if weights is None:
        weights = (1.0,) * num_rollouts
    check_sequence('rollout_weights', weights)
    if len(weights) != num_rollouts:
        raise ValueError(
            f'rollout_weights must have one value for each of the {num_rollouts} num_rollouts, got {tuple(weights)!r}'
        )
    for weight in weights:
        check_number('rollout_weights', weight)
    if sum(weights) == 0:
        raise ValueError(f'rollout_weights must not all be zero, got {tuple(weights)!r}')
    return tuple(weight / sum(weights) for weight in weights)


class ChunkSummarizer(nn.Module):
    """What a level token's chunk holds: the mean of the embeddings its compressor sees, brought to the level's width.

    `(batch, seq, dim_embed)` to `(batch, ceil((seq - offset) / stride), dim)`, the first chunk ending at `offset`. At
    the start, the mean is over those that exist.
    """

    def __init__(self, *, dim_embed: int, dim: int, compression: int, stride: int) -> None:
        super().__init__()
        self.compression = compression
        self.stride = stride
        self.proj = nn.Identity() if dim == dim_embed else nn.Linear(dim_embed, dim)

    def forward(self, embeds: Tensor, offset: int = 0) -> Tensor:
        c, s = self.compression, self.stride
        if embeds.shape[1] <= offset:
            return self.proj(embeds[:, :0])
        summed = F.pad(embeds, (0, 0, c - 1, 0))[:, offset:].unfold(1, c, s).sum(dim=-1)
        end = torch.arange(summed.shape[1], device=embeds.device) * s + offset + 1
        return self.proj(summed / end.clamp(max=c)[:, None])


class LatentDynamics(nn.Module):
    """The next latent from the latent and the summary of the next chunk: `h + MLP(LayerNorm([h, summary]))`.

    h, summary and the result: `(batch, seq, dim)`. It starts as the identity. Teoh et al. 2025, arXiv 2511.05963.
    """

    def __init__(self, dim: int, *, hidden_dim: int | None = None, num_layers: int = 3) -> None:
        super().__init__()
        hidden = dim if hidden_dim is None else hidden_dim
        widths = [2 * dim, *[hidden] * (num_layers - 1), dim]

        net: list[nn.Module] = [nn.LayerNorm(2 * dim)]
        for i, (dim_in, dim_out) in enumerate(pairwise(widths)):
            if i:
                net.append(nn.GELU())
            net.append(nn.Linear(dim_in, dim_out))
        last = net[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.net = nn.Sequential(*net)

    def forward(self, h: Tensor, summary: Tensor) -> Tensor:
        return h + self.net(torch.cat((h, summary), dim=-1))


def per_token(loss: Tensor, pred: Tensor) -> Tensor:
    """A latent loss averaged over channels, `(batch, seq)`. Raises ValueError where it has not the shape of `pred`."""
    if not isinstance(loss, Tensor) or loss.ndim != pred.ndim or loss.shape[:-1] != pred.shape[:-1]:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f'next_latent_loss_type must return a loss per element, {tuple(pred.shape)}, got {got}')
    return loss.mean(dim=-1)


def next_latent_loss(
    latents: Tensor,
    summaries: Tensor,
    valid: Tensor,
    *,
    dynamics: nn.Module,
    loss_fn: LatentLoss,
    rollout_weights: Sequence[float],
    decay: float | None,
) -> Tensor:
    """How well `dynamics` rolls a level's latents forward, a step for each of `rollout_weights`.

    latents, summaries: `(batch, seq, dim)`; valid: `(batch, seq)`, which tokens count as targets. Every step starts
    from the same first `seq - steps` latents, so a sequence no longer than the rollout adds zero. Targets are
    detached. With `decay`, each token's step is further scaled by exp(-decay * its summed loss of the steps before):
    a rollout that has gone astray is not worth following.

    Next-latent prediction: Teoh et al. 2025, arXiv 2511.05963.
    """
    steps = len(rollout_weights)
    starts = max(latents.shape[1] - steps, 0)
    targets = latents.detach()

    pred = latents[:, :starts]
    total, so_far = latents.new_zeros(()), latents.new_zeros(())

    for step, weight in enumerate(rollout_weights, 1):
        reached = slice(step, step + starts)
        pred = dynamics(pred, summaries[:, reached])
        loss = per_token(loss_fn(pred, targets[:, reached]), pred)

        weighted = loss * weight if decay is None else loss * weight * (-decay * so_far).exp()
        so_far = so_far + loss.detach()

        mask = valid[:, reached]
        total = total + (weighted * mask).sum() / mask.sum().clamp(min=1)

    return total
