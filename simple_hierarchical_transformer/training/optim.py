"""Optimizers, learning rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..checks import check_choice
from .roles import HEAD, KERNEL, LOOKUP, MATRIX, ROWS, VECTOR, walk
from .sharded import full, reshard, shard_like

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'constant', 'wsd')
FUSED = ('cpu', 'cuda', 'xpu')
RULES = ('adamw', 'muon', 'rows')


class MixedOptimizer(torch.optim.AdamW):
    """AdamW with other update rules for some groups of parameters: one optimizer for the whole model.

    The key `rule` of a group names its rule. The default is 'adamw'.

    'muon' updates matrices. It orthogonalises the momentum by a Newton-Schulz iteration and scales it by
    `0.2 * sqrt(max(rows, columns))`, so that updates have the size of AdamW's. A convolution kernel counts as a matrix
    with one row for each output channel. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale: Liu
    et al. 2025, arXiv 2502.16982, eq. 4.

    'rows' updates the rows of a table that have a gradient, sparse or dense. It divides each row's gradient by the root
    of the running mean of its mean square, and has no momentum. Rows that were not read stay as they are and cost
    nothing. With a sum instead of the mean this is Adagrad with one number a row, as in Lerer et al. 2019, arXiv
    1903.12287.

    Args:
        params: groups of parameters. Those with `rule='muon'` must have two dimensions or more, those with
            `rule='rows'` exactly two.
        momentum: the momentum of groups with `rule='muon'`.
        iterations: the number of Newton-Schulz iterations.
        settings: further arguments of `torch.optim.AdamW`.

    Raises:
        ValueError: a group names an unknown rule, or has a parameter of the wrong number of dimensions.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, momentum: float = 0.95, iterations: int = 5, **settings: Any
    ) -> None:
        super().__init__([{'rule': 'adamw', **group} for group in params], **settings)
        # fused AdamW would unscale gradients and skip steps itself. The other rules do not, so the scaler must do both
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
        """Updates the matrices of a group. Matrices of one shape are orthogonalised together."""
        params = [p for p in group['params'] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]['momentum'] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        # Nesterov momentum: the momentum after one more gradient of this value
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
        """Updates those rows of a group's tables that have a gradient."""
        decay, lr, eps = group['betas'][1], group['lr'], group['eps']
        for p in group['params']:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                # one number for each row, sharded as the table is
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
    """The names and shapes of the tensors that a `MixedOptimizer` keeps for each parameter after a step."""

    def of(p: nn.Parameter, rule: str) -> dict[str, tuple[int, ...]]:
        if rule == 'muon':
            return dict(momentum=tuple(p.shape))
        if rule == 'rows':
            return dict(mean_square=(len(p), 1))
        return dict(step=(), exp_avg=tuple(p.shape), exp_avg_sq=tuple(p.shape))

    return {p: of(p, group['rule']) for group in optimizer.param_groups for p in group['params']}


def mean_squares(before: Tensor, grad: Tensor, decay: float) -> Tensor:
    """Updates the running mean of each row's mean square, `(rows, 1)`. Rows with a gradient of zero keep theirs."""
    # a norm reads the table once; squares would be written and read again
    squares = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square() / grad.shape[-1]
    return torch.where(squares > 0, before.lerp(squares, 1 - decay), before)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings the singular values of matrices `(count, rows, columns)` close to 1: most end between 0.7 and 1.2.

    Runs a quintic Newton-Schulz iteration with Jordan's coefficients, in bfloat16 where the device multiplies it
    natively, else in float32.
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
    """Builds AdamW or Muon for a model, with one group for each kind of weight.

    AdamW is fused where PyTorch has a fused kernel. `roles.walk` names the kind of each weight. Matrices and tables
    decay. Vectors, biases and kernels do not. Tables of n-grams are always updated by rows and do not decay.

    If `table_lr` is given, it is the learning rate of tables of ids and of the maps to ids. Each group keeps the
    ratio of its rate to `lr` as `scale`, so that a schedule can set all rates from one.

    Args:
        model: the model to train.
        name: 'adamw' or 'muon'.
        lr: the learning rate of all other groups.
        weight_decay: the weight decay of matrices and tables.
        table_lr: the learning rate of tables and of the maps to ids. Default: `lr`.
        betas: the betas of AdamW. The row-wise rule uses the second one, too.
        device: the device that the model will move to, if it is not there yet.
        sparse: whether tables of n-grams get sparse gradients on a CPU. Give False if weights will be sharded or steps
            will be compiled.
    """
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    rows: list[nn.Parameter] = []
    group_of = {MATRIX: matrices, LOOKUP: tables, HEAD: tables, VECTOR: others, KERNEL: others, ROWS: rows}
    grouped: set[nn.Parameter] = set()
    for visit in walk(model):
        for weight in visit.weights:
            if weight.parameter not in grouped:
                grouped.add(weight.parameter)
                group_of[weight.role].append(weight.parameter)
            module: Any = visit.module
            if weight.role == ROWS and hasattr(module, 'sparse'):
                # on a GPU a dense gradient costs little
                module.sparse = sparse and (device or weight.parameter.device).type == 'cpu'
    scale = 1.0 if table_lr is None else table_lr / lr
    groups: list[dict[str, Any]] = [
        dict(params=matrices, weight_decay=weight_decay, rule=name),
        dict(params=tables, weight_decay=weight_decay, scale=scale),
        dict(params=others, weight_decay=0.0),
        dict(params=rows, weight_decay=0.0, rule='rows', scale=scale),
    ]
    groups = [{'scale': 1.0, 'lr': lr * group.get('scale', 1.0), **group} for group in groups if group['params']]
    # 'meta' has no fused kernels
    fused = all((device or p.device).type in FUSED and not p.is_meta for p in grouped)
    return MixedOptimizer(groups, lr=lr, betas=betas, fused=fused)


def learning_rate(progress: float, *, highest: float, schedule: str, warmup: float) -> float:
    """The learning rate at `progress`, which goes from 0 to 1 over the run.

    The rate rises to `highest` over the first share `warmup` of the run and then follows the schedule. 'cosine' falls
    to a tenth and 'linear' to 0. 'constant' stays at `highest`. 'wsd' (warm-up, stable, decay) stays there until the
    last fifth, in which it falls to 0. A warm-up that reaches into that fifth shortens the decay. After the end, the
    rate stays constant.
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
    """An exponential moving average of a model's weights, used to score and to save it.

    The decay warms up, so that the average quickly forgets the first steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.decay = decay
        self.updates = 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights to the average. Call this after each step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach() for p in self.parameters], self.updates)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights and their averages."""
        # otherwise full weights that a forward pass gathered would outlive the swap
        reshard(self.model)
        for p, average in zip(self.parameters, self.averages, strict=True):
            weight = p.detach().clone()
            p.copy_(average)
            average.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
