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
from ..ops.linear import Chain, autocast_dtype, linear, matrix_of

# how many logits are in memory at a time; few enough rows would leave the matmul short of work
CHUNK = 1 << 22
MIN_CHUNK_ROWS = 128

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


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with each chunk's gradients formed while its logits are at hand.

    So logits live for a chunk only, and nothing is computed twice: Hsu et al. 2024, arXiv 2410.10989, section 3.2.
    Those gradients have no graph of their own. A backward pass with `create_graph` forms the logits again, whole.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, dtype: torch.dtype, train: bool
    ) -> Tensor:
        rows, sets = targets.shape
        size = len(weight) // sets
        chunk = max(CHUNK // size, MIN_CHUNK_ROWS)

        # gradients are formed without what all rows are divided by, which is too small for half precision
        top = row_weights.amax().clamp(min=torch.finfo(row_weights.dtype).tiny) if rows else row_weights.new_ones(())
        given, row_weights = row_weights, row_weights / top
        total = row_weights.new_zeros(())
        grad_x = torch.zeros_like(x, dtype=row_weights.dtype) if train else None
        grad_weight = (torch.empty_like if rows else torch.zeros_like)(weight) if train else None
        inputs = x.to(dtype)

        for k in range(sets):
            part = slice(k * size, (k + 1) * size)
            matrix = weight[part].to(dtype)
            # counted so that a compiler has a graph for each number of chunks, not of rows
            for i in range(-(-rows // chunk)):
                at = slice(i * chunk, (i + 1) * chunk)
                target, scale = targets[at, k, None], row_weights[at, k, None]
                logits = linear(inputs[at], matrix)
                log_probs = logits.to(row_weights.dtype).log_softmax(dim=-1)
                total = total - (log_probs.gather(1, target) * scale).sum()
                if grad_x is None or grad_weight is None:
                    continue
                # softmax minus one-hot; the weight of a row goes to the smaller factor
                grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(scale)).to(dtype)
                grad_x[at] += linear(grad, matrix.t()) * scale
                scaled = (inputs[at] * scale).to(dtype)
                if i == 0:
                    grad_weight[part] = grad.t() @ scaled
                elif dtype == weight.dtype:
                    grad_weight[part].addmm_(grad.t(), scaled)
                else:
                    grad_weight[part] += grad.t() @ scaled

        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight, top, x, weight, targets, given)
            ctx.dtype = dtype
        return total * top

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, grad_weight, top, x, weight, targets, row_weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            # views, so that gradients end at these inputs although one may depend on the other
            x, weight = x.view_as(x), weight.view_as(weight)
            logits = F.linear(x.to(ctx.dtype), weight.to(ctx.dtype))
            loss = weighted_cross_entropy(logits, targets, row_weights)
            wanted = [t for t in (x, weight) if t.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in (x, weight)), None, None, None, None
        grad = grad * top
        # a large vocabulary's gradient is the largest tensor there is: copied only where it may be asked for again
        again = graph_is_kept() or grad_weight.dtype != grad.dtype
        grad_weight = (grad_weight * grad).to(grad_weight.dtype) if again else grad_weight.mul_(grad)
        return (grad_x * grad).to(x.dtype), grad_weight, None, None, None, None


def graph_is_kept() -> bool:
    """Whether the backward pass that runs may run again (`retain_graph`)."""
    ask = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', None)
    return torch.compiler.is_compiling() or ask is None or ask()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """The weighted sum of the cross entropies of `x @ weight.T`, of which no more than a chunk is ever in memory.

    x: `(rows, dim)`; weight: `(sets * num_tokens, dim)`, a matrix for each of the sets; targets and row_weights:
    `(rows, sets)`. Logits are formed in autocast's dtype, if it is on; softmax and sums in float32 at least. Under the
    transforms of torch.func, and for second derivatives, the logits of all rows are formed at once.
    """
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
    train = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    row_weights = row_weights.to(torch.promote_types(x.dtype, torch.float32))
    # logits that are no wider than what they are made of need no chunks, and a GPU takes half the time for them at
    # once; but not in float16, whose gradients would be too small
    few = x.is_cuda and len(weight) <= x.shape[-1] and dtype != torch.float16
    if few or torch._C._are_functorch_transforms_active():
        # the transforms of torch.func see through plain operations alone
        return weighted_cross_entropy(F.linear(x, weight), targets, row_weights)
    with nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, row_weights, dtype, train)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """The same of logits that are at hand, `(rows, sets * num_tokens)`."""
    log_probs = logits.unflatten(-1, (targets.shape[1], -1)).to(row_weights.dtype).log_softmax(-1)
    return -(log_probs.gather(-1, targets[..., None])[..., 0] * row_weights).sum()


def cross_entropy(
    x: Tensor,
    head: nn.Module,
    targets: Tensor,
    ignore_index: int,
    *,
    count: Tensor | None = None,
    sample: float = 1.0,
) -> Tensor:
    """Mean over the targets that are not ignored; zero, and not nan, where all of them are.

    x: `(batch, seq, dim)`; targets: `(batch, seq)`, or `(batch, seq, sets)` where each token has several; head: maps x
    to `sets * num_tokens` logits. With `sample` below 1, that share of the tokens is drawn at random, and the
    expectation is the loss over all. With `count`, the sum over targets divided by that.

    A plain head without a bias runs as `linear_cross_entropy`. Any other is called, with x as it comes, or with the
    drawn tokens `(tokens, dim)`.
    """
    targets = (targets[..., None] if targets.ndim == 2 else targets).flatten(0, 1)
    counted = targets != ignore_index
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = 1 / (counted.sum() if count is None else count).clamp(min=1).to(exact)
    # an ignored target may be no id at all
    targets = targets.masked_fill(~counted, 0)

    rows = len(targets)
    drawn = max(round(sample * rows), 1) if rows else 0
    if drawn < rows:
        # each row stands for as many as were left out, so that the expectation is the mean over all
        scale = scale * (rows / drawn)
        index = torch.randperm(rows, device=x.device)[:drawn]
        x, targets, counted = x.flatten(0, 1)[index], targets[index], counted[index]
    weight, bias = matrix_of(head) or (None, None)
    if weight is None or bias is not None:
        return weighted_cross_entropy(head(x).flatten(0, -2), targets, counted * scale)
    return linear_cross_entropy(x.flatten(0, -2), weight, targets, counted * scale)


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
