"""Next-latent prediction: a level's latent and a summary of the next chunk predict the level's next latent.

Teoh et al. 2025, arXiv 2511.05963.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_number, check_output, check_sequence
from ..ops.linear import Chain
from .base import Batch, Objective, Targets

if TYPE_CHECKING:
    from ..config import Config
    from ..model import HierarchicalTransformer
    from ..pieces import Pieces
    from ..read import Read

LatentLoss = Callable[[Tensor, Tensor], Tensor]


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

    def of_pieces(self, embeds: Tensor, pieces: Pieces) -> Tensor:
        """The mean of the embeddings of each piece of a placed level, `(batch, k, dim)`."""
        marks = pieces.at_positions.long()
        # pieces end at their boundaries. What follows the last one is left out
        piece = marks.cumsum(1) - marks
        k = pieces.positions.shape[1]
        sums = embeds.new_zeros(embeds.shape[0], k + 1, embeds.shape[-1])
        sums = sums.scatter_add(1, piece[..., None].expand_as(embeds), embeds)[:, :k]
        lengths = embeds.new_zeros(embeds.shape[0], k + 1).scatter_add(1, piece, torch.ones_like(embeds[..., 0]))[:, :k]
        return self.proj(sums / lengths.clamp(min=1)[..., None])


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
    exists: Tensor | None = None,
) -> Tensor:
    """How well `dynamics` rolls a level's latents forward, a step for each of `rollout_weights`.

    latents, summaries: `(batch, seq, dim)`; valid: `(batch, seq)`, which tokens count as targets. Every step starts
    from the same first `seq - steps` latents, so a sequence no longer than the rollout adds zero. Targets are
    detached. With `decay`, each token's step is further scaled by exp(-decay * its summed loss of the steps before):
    a rollout that has gone astray is not worth following. With `counts`, each step's sum is divided by its own of them
    instead of by how many targets count. Where rows differ in length, `exists`, `(batch, seq)`, says which tokens are
    no padding.

    Next-latent prediction: Teoh et al. 2025, arXiv 2511.05963.
    """
    steps = len(rollout_weights)
    starts = max(latents.shape[1] - steps, 0)
    counts = rollout_counts(valid, steps) if counts is None else counts
    targets = latents.detach()
    # rollouts that end in padding do not start, as those that would end after the longest row
    started = None if exists is None else exists[:, steps : steps + starts]

    pred = latents[:, :starts]
    total, so_far = latents.new_zeros(()), latents.new_zeros(())

    for step, (weight, count) in enumerate(zip(rollout_weights, counts, strict=True), 1):
        reached = slice(step, step + starts)
        pred = dynamics(pred, summaries[:, reached])
        loss = per_token(loss_fn(pred, targets[:, reached]), pred)

        weighted = loss * weight if decay is None else loss * weight * (-decay * so_far).exp()
        so_far = so_far + loss.detach()

        counted = valid[:, reached] if started is None else valid[:, reached] & started
        total = total + (weighted * counted).sum() / count.clamp(min=1)

    return total


def rollout_counts(valid: Tensor, steps: int) -> list[Tensor]:
    """How many targets each step of a rollout has; valid: `(batch, seq)`, which tokens count as such."""
    starts = max(valid.shape[1] - steps, 0)
    return [valid[:, step : step + starts].sum() for step in range(1, steps + 1)]


@dataclass(frozen=True, kw_only=True)
class NextLatent(Objective):
    kind: ClassVar[str] = 'next_latent'
    containers: ClassVar[Mapping[str, str | None]] = dict(latent_dynamics=None, chunk_summarizers=None)

    loss_fn: LatentLoss = mse_and_cosine_sim
    rollout_weights: tuple[float, ...] = (1.0,)
    decay: float | None = None
    detach_summaries: bool = True

    @classmethod
    def from_config(cls, config: Config) -> list[NextLatent]:
        return cls.per_level(
            config,
            config.values('next_latent_loss_weight'),
            loss_fn=find_latent_loss(config.next_latent_loss_type),
            rollout_weights=config.rollouts,
            decay=config.rollout_decay,
            detach_summaries=config.detach_summaries,
        )

    @property
    def terms(self) -> int:
        return len(self.rollout_weights)

    def modules(self, config: Config) -> dict[str, nn.Module]:
        assert self.level is not None
        dim = config.levels[self.level].dim
        dynamics = LatentDynamics(dim, hidden_dim=config.dynamics_hidden_dim, num_layers=config.dynamics_num_layers)
        summarizer = config.summarizers[self.level]
        if summarizer is None:
            summarizer = ChunkSummarizer(
                dim_embed=config.dim_embed, dim=dim, compression=self.compression, stride=self.stride
            )
        return {'latent_dynamics': dynamics, 'chunk_summarizers': summarizer}

    def targets(self, batch: Batch, pieces: Pieces | None = None) -> Targets:
        # tokens that end in an ignored id do not count
        return Targets(batch.at_tokens(self.stride, pieces), batch.ignore_index)

    def count(self, targets: Targets) -> list[Tensor]:
        return rollout_counts(targets.counted, self.terms)

    def loss(self, model: HierarchicalTransformer, read: Read, batch: Batch, counts: Sequence[Tensor] | None) -> Tensor:
        assert self.level is not None
        key, latents, pieces = str(self.level), read.tokens[self.level], self.pieces(read)
        embeds = read.embeds.detach() if self.detach_summaries else read.embeds
        summarizer, offset = model.chunk_summarizers[key], batch.offset(self.stride)
        if isinstance(summarizer, ChunkSummarizer):
            summaries = summarizer(embeds, offset) if pieces is None else summarizer.of_pieces(embeds, pieces)
        elif pieces is None:
            # a user's module knows no offset, so its chunk starts at the level's first token
            summaries = summarizer(embeds[:, offset:]) if latents.shape[1] else latents
        else:
            # it has stride 1
            summaries = pieces.pick(summarizer(embeds))
        name = f'chunk_summarizers of hierarchy {self.compression}'
        loss = next_latent_loss(
            latents,
            check_output(name, summaries, latents.shape, embeds),
            self.targets(batch, pieces).counted,
            dynamics=model.latent_dynamics[key],
            loss_fn=self.loss_fn,
            rollout_weights=self.rollout_weights,
            decay=self.decay,
            counts=self.divisors(batch, counts),
            exists=None if pieces is None else pieces.exists,
        )
        return loss * self.scale if self.placed else loss
