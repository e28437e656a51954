"""What trains the levels: ids that come and that were, quantized ids, and the next latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from ..checks import check_number, check_sequence
from ..ops.cross_entropy import CHUNK
from ..ops.cross_entropy import cross_entropy as cross_entropy
from ..ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
from ..ops.linear import Chain, autocast_dtype

LatentLoss = Callable[[Tensor, Tensor], Tensor]


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
    'autoencoder', 'next_latent/8x', 'ponder/8x'."""

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


class Part(NamedTuple):
    """A part of the loss: one of the seven kinds, for one level or for all."""

    kind: str
    weight: float
    level: int | None = None
    compression: int = 0

    @property
    def name(self) -> str:
        return self.kind if self.level is None else f'{self.kind}/{self.compression}x'


def seen_ids(ids: Tensor, *, compression: int, stride: int, ignore_index: int, offset: int = 0) -> Tensor:
    """The ids that each level token's compressor saw, `(batch, ceil((seq - offset) / stride), compression)`.

    Before the first of ids `(batch, seq)` stands `ignore_index`.
    """
    return id_windows(F.pad(ids, (compression - 1, 0), value=ignore_index)[:, offset:], compression, stride)


def coming_ids(labels: Tensor, *, compression: int, stride: int, ignore_index: int, offset: int = 0) -> Tensor:
    """The ids that come after each level token, `(batch, ceil((seq - offset) / stride), compression)`.

    labels: `(batch, seq)`, the id that comes after each position. After the last of them stands `ignore_index`.
    """
    return id_windows(F.pad(labels, (0, compression - 1), value=ignore_index)[:, offset:], compression, stride)


def id_windows(ids: Tensor, size: int, stride: int) -> Tensor:
    """Every window of that size, `stride` apart, `(batch, windows, size)`; none where ids `(batch, n)` are fewer."""
    return ids.unfold(1, size, stride) if ids.shape[1] >= size else ids.new_empty(len(ids), 0, size)


class RandomProjectionQuantizer(nn.Module):
    """Discrete ids of vectors, by matrices that are drawn once and never trained.

    x is normed to mean 0 and variance 1, projected, and named after the nearest direction in a codebook, for each of
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
        # saved with the weights: other matrices would be other ids
        self.register_buffer('projection', projection)
        self.register_buffer('codebook', F.normalize(codebook, dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.to(self.projection.dtype), x.shape[-1:])
        with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
            # the length of a projection does not change which direction is nearest
            ids = [
                torch.cat(
                    [(rows @ p @ c.t()).argmax(dim=-1) for rows in x.flatten(0, -2).split(max(CHUNK // len(c), 1))]
                )
                for p, c in zip(self.projection, self.codebook, strict=True)
            ]
        return torch.stack(ids, dim=-1).view(*x.shape[:-1], -1)


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
        self.net = Chain(*net)

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
    counts: Sequence[Tensor] | None = None,
) -> Tensor:
    """How well `dynamics` rolls a level's latents forward, a step for each of `rollout_weights`.

    latents, summaries: `(batch, seq, dim)`; valid: `(batch, seq)`, which tokens count as targets. Every step starts
    from the same first `seq - steps` latents, so a sequence no longer than the rollout adds zero. Targets are
    detached. With `decay`, each token's step is further scaled by exp(-decay * its summed loss of the steps before):
    a rollout that has gone astray is not worth following. With `counts`, each step's sum is divided by its own of them
    instead of by how many targets count.

    Next-latent prediction: Teoh et al. 2025, arXiv 2511.05963.
    """
    steps = len(rollout_weights)
    starts = max(latents.shape[1] - steps, 0)
    counts = rollout_counts(valid, steps) if counts is None else counts
    targets = latents.detach()

    pred = latents[:, :starts]
    total, so_far = latents.new_zeros(()), latents.new_zeros(())

    for step, (weight, count) in enumerate(zip(rollout_weights, counts, strict=True), 1):
        reached = slice(step, step + starts)
        pred = dynamics(pred, summaries[:, reached])
        loss = per_token(loss_fn(pred, targets[:, reached]), pred)

        weighted = loss * weight if decay is None else loss * weight * (-decay * so_far).exp()
        so_far = so_far + loss.detach()

        total = total + (weighted * valid[:, reached]).sum() / count.clamp(min=1)

    return total


def rollout_counts(valid: Tensor, steps: int) -> list[Tensor]:
    """How many targets each step of a rollout has; valid: `(batch, seq)`, which tokens count as such."""
    starts = max(valid.shape[1] - steps, 0)
    return [valid[:, step : step + starts].sum() for step in range(1, steps + 1)]
