"""Optimizers, the course of the learning rate, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharded import full, reshard, shard_like

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'constant', 'wsd')
FUSED = ('cpu', 'cuda', 'xpu')

# what makes kernels and time scales is no matrix that a token is multiplied with
KERNELS = ('ssm', 'shift_ssm', 'short_conv', 'filters')
# tables of ids and what maps to ids have a row for each id: nothing that a rotation means anything to
TABLES = ('token_emb', 'to_logits', 'to_recon', 'to_prophet', 'to_quantized', 'to_ids', 'step_embeds', 'halting')


class Muon(torch.optim.AdamW):
    """Muon for the groups with `muon=True`, AdamW for the others: one optimizer, one learning rate.

    A matrix moves by its momentum, orthogonalised by a Newton-Schulz iteration, times `0.2 * sqrt(max(rows, columns))`,
    which is as far as AdamW would move it. A convolution's kernel counts as a matrix of its output channels.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, arXiv 2502.16982, eq. 4.

    Args:
        params: groups of parameters; those with `muon=True` must have two dimensions or more.
        momentum: of the groups with `muon=True`.
        iterations: of Newton-Schulz.
        settings: what torch.optim.AdamW takes.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, momentum: float = 0.95, iterations: int = 5, **settings: Any
    ) -> None:
        super().__init__([{'muon': False, **group} for group in params], **settings)
        for group in self.param_groups:
            group.update(momentum=momentum, iterations=iterations)
            if group['muon'] and (flat := [tuple(p.shape) for p in group['params'] if p.ndim < 2]):
                raise ValueError(f'muon is for matrices, got parameters of shape {", ".join(map(str, flat))}')

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group['muon']]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group['muon']:
                self.step_matrices(group)
        return loss

    def step_matrices(self, group: dict[str, Any]) -> None:
        """Moves the matrices of a group, those of one shape together."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p in group['params']:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state['momentum'] = torch.zeros_like(p)
            state['momentum'].lerp_(p.grad, 1 - group['momentum'])
            # Nesterov's: where the momentum will be after another such gradient
            ahead = full(p.grad.lerp(state['momentum'], group['momentum'])).flatten(1)
            by_shape.setdefault(ahead.shape, []).append((p, ahead))

        for shape, entries in by_shape.items():
            moves = orthogonalise(torch.stack([ahead for _, ahead in entries]), group['iterations'])
            scale = 0.2 * math.sqrt(max(shape))
            for (p, _), move in zip(entries, moves, strict=True):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(shard_like(move.view(p.shape), p), alpha=group['lr'] * scale)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings the singular values of each of `(count, rows, columns)` close to 1 (to between 0.7 and 1.2, mostly).

    A quintic Newton-Schulz iteration with Jordan's coefficients, in bfloat16 where the device multiplies that natively,
    else in float32.
    """
    native = matrices.device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if native else torch.float32)
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.mT).to(matrices.dtype)


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """AdamW, fused where there is such a kernel, or Muon. Weights of two dimensions and more decay, others, and biases
    and kernels of whatever shape, do not.

    `device` is where the model will be, where that is not where it is.
    """
    named = list(model.named_parameters())
    tables: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for key, p in named:
        parts = set(key.split('.'))
        if p.ndim < 2 or key.endswith('bias') or parts & set(KERNELS):
            others.append(p)
        else:
            (tables if parts & set(TABLES) else matrices).append(p)
    if name == 'muon':
        groups = [
            dict(params=matrices, weight_decay=weight_decay, muon=True),
            dict(params=tables, weight_decay=weight_decay),
            dict(params=others, weight_decay=0.0),
        ]
        return Muon([group for group in groups if group['params']], lr=lr, betas=betas)
    fused = all((device or p.device).type in FUSED for _, p in named)
    return torch.optim.AdamW(
        [dict(params=matrices + tables, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)],
        lr=lr,
        betas=betas,
        fused=fused,
    )


def learning_rate(progress: float, *, highest: float, schedule: str, warmup: float) -> float:
    """The learning rate at `progress`, from 0 to 1 over the run: up over the share `warmup` of it, then on by schedule.

    'cosine' falls to a tenth, 'linear' to 0; 'constant' stays; 'wsd' (warm-up, stable, decay) stays until the last
    fifth, over which it falls to 0.
    """
    if progress < warmup:
        return highest * max(progress / warmup, 0.01)
    after = (progress - warmup) / (1 - warmup)
    if schedule == 'cosine':
        return highest * (0.55 + 0.45 * math.cos(math.pi * after))
    if schedule == 'linear':
        return highest * (1 - after)
    return highest * (min(1.0, (1 - progress) / 0.2) if schedule == 'wsd' else 1.0)


class WeightAverage:
    """An exponential moving average of a model's weights, which takes their place where it is scored or saved.

    The decay is warmed up, so that the first steps are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.decay = decay
        self.updates = 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach() for p in self.parameters], self.updates)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        # full weights that were gathered for a forward pass would outlive the swap
        reshard(self.model)
        for p, average in zip(self.parameters, self.averages, strict=True):
            weight = p.detach().clone()
            p.copy_(average)
            average.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the averages inside, and themselves again after."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
