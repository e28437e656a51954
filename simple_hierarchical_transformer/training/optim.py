"""Optimizers, the course of the learning rate, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..checks import check_choice
from ..embeddings import NGramEmbedding
from .sharded import full, reshard, shard_like

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'constant', 'wsd')
FUSED = ('cpu', 'cuda', 'xpu')
RULES = ('adamw', 'muon', 'rows')

# what makes kernels and time scales is no matrix that a token is multiplied with
KERNELS = ('ssm', 'shift_ssm', 'short_conv', 'filters')
# of which a step reads few rows
NGRAMS = ('ngram_emb',)
# rows that are looked up
LOOKUPS = ('token_emb', 'recall_emb', 'step_embeds')
# these, and what maps to ids, have a row for each id: nothing that a rotation means anything to
TABLES = (*LOOKUPS, 'halting', 'to_logits', 'to_recon', 'to_prophet', 'to_quantized', 'to_ids')


class MixedOptimizer(torch.optim.AdamW):
    """AdamW, and for groups that name another `rule` that one: one optimizer, one course of the learning rate.

    'muon': a matrix moves by its momentum, orthogonalised by a Newton-Schulz iteration, times `0.2 * sqrt(max(rows,
    columns))`, which is as far as AdamW would move it. A convolution's kernel counts as a matrix of its output
    channels. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, arXiv
    2502.16982, eq. 4.

    'rows': of a table those rows move that have a gradient, sparse or dense, each by it over the root of the mean
    square that its gradients had, without a momentum: what was not read stays as it is, at no cost. With a sum
    in the mean's place that is Adagrad with one number a row, as in Lerer et al. 2019, arXiv 1903.12287.

    Args:
        params: groups of parameters; those with `rule='muon'` must have two dimensions or more, those with
            `rule='rows'` exactly two.
        momentum: of the groups with `rule='muon'`.
        iterations: of Newton-Schulz.
        settings: what torch.optim.AdamW takes.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, momentum: float = 0.95, iterations: int = 5, **settings: Any
    ) -> None:
        super().__init__([{'rule': 'adamw', **group} for group in params], **settings)
        # fused AdamW would scale and skip by itself, and the other rules do neither: a scaler does both for all groups
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group.update(momentum=momentum, iterations=iterations)
            check_choice('rule', rule := group['rule'], RULES)
            shapes = [tuple(p.shape) for p in group['params']]
            if wrong := [s for s in shapes if (rule == 'muon' and len(s) < 2) or (rule == 'rows' and len(s) != 2)]:
                kind = 'matrices' if rule == 'muon' else 'tables'
                raise ValueError(f'{rule} is for {kind}, got parameters of shape {", ".join(map(str, wrong))}')

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group['rule'] == 'adamw']
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group['rule'] == 'muon':
                self.step_matrices(group)
            elif group['rule'] == 'rows':
                self.step_rows(group)
        return loss

    def step_matrices(self, group: dict[str, Any]) -> None:
        """Moves the matrices of a group, those of one shape together."""
        params = [p for p in group['params'] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]['momentum'] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        # Nesterov's: where the momentum will be after another such gradient
        ahead = [grad.lerp(momentum, group['momentum']) for grad, momentum in zip(grads, momenta, strict=True)]

        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, each in zip(params, ahead, strict=True):
            matrix = full(each).flatten(1)
            by_shape.setdefault(matrix.shape, []).append((p, matrix))
        for shape, entries in by_shape.items():
            moved = [p for p, _ in entries]
            directions = orthogonalise(torch.stack([matrix for _, matrix in entries]), group['iterations'])
            moves = [shard_like(each.view(p.shape), p) for p, each in zip(moved, directions, strict=True)]
            torch._foreach_mul_(moved, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(moved, moves, alpha=-0.2 * math.sqrt(max(shape)) * group['lr'])

    def step_rows(self, group: dict[str, Any]) -> None:
        """Moves the rows of a group's tables that have a gradient."""
        decay, lr, eps = group['betas'][1], group['lr'], group['eps']
        for p in group['params']:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                # one number a row, sharded as the table is
                state['mean_square'] = torch.zeros_like(p.detach()[:, :1])
            held = state['mean_square']
            if p.grad.is_sparse:
                grad = p.grad.coalesce()
                [rows], values = grad.indices(), grad.values()
                means = mean_squares(held[rows], values, decay)
                held[rows] = means
                p.index_add_(0, rows, values / (means.sqrt() + eps), alpha=-lr)
            else:
                held.copy_(mean_squares(held, p.grad, decay))
                p.addcdiv_(p.grad, held.sqrt() + eps, value=-lr)


def state_shapes(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, tuple[int, ...]]]:
    """Of each parameter of a `MixedOptimizer` the tensors that a step keeps for it, by name, and their shapes."""

    def of(p: nn.Parameter, rule: str) -> dict[str, tuple[int, ...]]:
        if rule == 'muon':
            return dict(momentum=tuple(p.shape))
        if rule == 'rows':
            return dict(mean_square=(len(p), 1))
        return dict(step=(), exp_avg=tuple(p.shape), exp_avg_sq=tuple(p.shape))

    return {p: of(p, group['rule']) for group in optimizer.param_groups for p in group['params']}


def mean_squares(before: Tensor, grad: Tensor, decay: float) -> Tensor:
    """The running mean of each row's mean square, `(rows, 1)`; where the gradient is zero it stays."""
    # the norm reads a table once, where squares would be written and read
    squares = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square() / grad.shape[-1]
    return torch.where(squares > 0, before.lerp(squares, 1 - decay), before)


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
    table_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    device: torch.device | None = None,
    sparse: bool = True,
) -> torch.optim.Optimizer:
    """AdamW, fused where there is such a kernel, or Muon. Weights of two dimensions and more decay, others, and biases
    and kernels of whatever shape, do not.

    Tables of ids, and what maps to ids, have a learning rate of their own, `table_lr`, where it is given. Each group
    has its share of `lr` as `scale`, for whoever sets it anew. Tables of n-grams always move by rows, and do not decay.

    Args:
        model: whose parameters.
        name: 'adamw' or 'muon'.
        lr: of what has no learning rate of its own.
        weight_decay: of matrices and tables.
        table_lr: that of tables.
        betas: of AdamW; the second of rows, too.
        device: where the model will be, where that is not where it is.
        sparse: whether tables of n-grams get sparse gradients on a CPU. Not where weights will be
            sharded, or the step compiled.
    """
    named = list(model.named_parameters())
    tables: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    ngrams: list[nn.Parameter] = []
    for key, p in named:
        parts = set(key.split('.'))
        if parts & set(NGRAMS):
            ngrams.append(p)
        elif p.ndim < 2 or key.endswith('bias') or parts & set(KERNELS):
            others.append(p)
        else:
            (tables if parts & set(TABLES) else matrices).append(p)
    scale = 1.0 if table_lr is None else table_lr / lr
    groups: list[dict[str, Any]] = [
        dict(params=matrices, weight_decay=weight_decay, rule=name),
        dict(params=tables, weight_decay=weight_decay, scale=scale),
        dict(params=others, weight_decay=0.0),
        dict(params=ngrams, weight_decay=0.0, rule='rows', scale=scale),
    ]
    groups = [{'scale': 1.0, 'lr': lr * group.get('scale', 1.0), **group} for group in groups if group['params']]
    for module in model.modules():
        if isinstance(module, NGramEmbedding):
            # on a GPU a dense gradient costs little
            module.sparse = sparse and (device or module.weight.device).type == 'cpu'
    # on 'meta' there is no such kernel, whatever it stands for
    fused = all((device or p.device).type in FUSED and not p.is_meta for _, p in named)
    return MixedOptimizer(groups, lr=lr, betas=betas, fused=fused)


def learning_rate(progress: float, *, highest: float, schedule: str, warmup: float) -> float:
    """The learning rate at `progress`, from 0 to 1 over the run: up over the share `warmup` of it, then on by schedule.

    'cosine' falls to a tenth, 'linear' to 0; 'constant' stays; 'wsd' (warm-up, stable, decay) stays until the last
    fifth, over which it falls to 0. A warm-up that reaches into that fifth shortens the decay. After the end, the rate
    stays what it was there.
    """
    progress = min(progress, 1.0)
    if progress < warmup:
        return highest * max(progress / warmup, 0.01)
    after = (progress - warmup) / (1 - warmup)
    if schedule == 'cosine':
        return highest * (0.55 + 0.45 * math.cos(math.pi * after))
    if schedule == 'linear':
        return highest * (1 - after)
    decay = min(0.2, 1 - warmup)
    return highest * (min(1.0, (1 - progress) / decay) if schedule == 'wsd' else 1.0)


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
