"""The merge by attention: each token attends to the levels' tokens at its position."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..levels import Grid, Level
from ..memory import keep
from ..ops.linear import begin_at_zero, chain
from ..ops.norm import RMSNorm
from .base import Merge, MergeState


class Receiver(nn.Module):
    """The projections by which one level attends to all: its queries, and each level's keys and values."""

    def __init__(self, level: Level, dims: Sequence[int], window: int) -> None:
        super().__init__()
        inner = level.heads * level.dim_head
        self.heads, self.dim = level.heads, level.dim
        self.inner = inner
        self.to_q = nn.Linear(level.dim, inner, bias=False)
        self.to_kv = nn.ModuleList(nn.Linear(dim, 2 * inner, bias=False) for dim in dims)
        # by level, and by how many tokens back
        self.bias = nn.Parameter(torch.zeros(level.heads, len(dims), 1 + window))
        self.to_out = nn.Linear(inner, level.dim, bias=False)


class SourceKeys(NamedTuple):
    """Keys and values of one level, aligned to the tokens of a recipient.

    The recipient's tokens form groups that see the same keys: `repeats` tokens if the source's tokens are farther apart
    than the recipient's, else single tokens.
    """

    kv: Tensor
    """`(batch, rows, 2, heads, dim_head)`. Row `window` holds the newest token that the first group sees."""
    step: int
    """The number of rows from one group to the next."""
    repeats: int
    """The number of the recipient's tokens in a group."""
    lead: int
    """The number of tokens of the first group that came before the chunk."""
    token: int
    """The index of the newest token that the first group sees."""


class AttentionMerge(Merge):
    """Each recipient's token attends to all levels' tokens at its position, and to the `window` tokens before each.

    The token of a level at a position is its last one up to there. Tokens are normed and projected from their level's
    width. A learned bias for each head depends on the level of a key and on how many tokens back it is. Vaswani et al.
    2017, arXiv 1706.03762.

    Each query has keys of its own, and only a few. So keys are views of the projections, without a gather, and scores
    are computed key by key. Time and memory are `O(tokens * levels * (1 + window))`. The state holds the keys and
    values of each level's last tokens.
    """

    def build(self, levels: Sequence[Level]) -> None:
        self.norms = nn.ModuleList(RMSNorm(dim) for dim in self.dims)
        self.receivers = nn.ModuleDict({str(i): Receiver(levels[i], self.dims, self.window) for i in self.recipients})

    def receiver(self, i: int) -> Receiver:
        # a cast, since the module may be wrapped
        return cast(Receiver, self.receivers[str(i)])

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        for i in self.recipients:
            receiver = self.receiver(i)
            yield receiver, n / self.strides[i]
            for to_kv, stride in zip(receiver.to_kv, self.strides, strict=True):
                # without a window, tokens that no query attends to are not projected
                yield to_kv, n / max(stride, 1 if self.window else self.strides[i])

    def zero_init(self) -> None:
        for i in self.recipients:
            begin_at_zero(self.receiver(i).to_out)

    def updated(self, wanted: Collection[int] | None) -> Sequence[int]:
        # each recipient has modules of its own
        return self.recipients if wanted is None else [i for i in self.recipients if i in wanted]

    def unread_modules(self, wanted: Collection[int]) -> list[nn.Module]:
        return [self.receiver(i) for i in self.recipients if i not in wanted]

    def initial_state(self, batch_size: int, like: Tensor) -> MergeState:
        """For each recipient, each level's last keys and values that the recipient's next token may see."""
        held = []
        for i in self.recipients:
            for stride in self.strides:
                count = self.window + int(stride > self.strides[i])
                held.append(like.new_zeros(batch_size, count, 2 * self.receiver(i).inner) if count else None)
        return tuple(held)

    def gather(
        self, tokens: Sequence[Tensor], state: MergeState | None, position: int, updated: Sequence[int]
    ) -> tuple[Any, MergeState | None]:
        before = iter(state or (None,) * len(self.recipients) * len(tokens))
        kept: list[Tensor | None] = []
        gathered = []
        # a state holds keys and values for every recipient
        for i in self.recipients if state is not None else updated:
            to = self.receiver(i)
            first, sources = Grid(self.strides[i]).count(position), []
            for j, (x, norm, stride) in enumerate(zip(tokens, self.norms, self.strides, strict=True)):
                repeats, step = max(stride // self.strides[i], 1), max(self.strides[i] // stride, 1)
                lead, token = Grid(repeats).since(first), first // repeats * step
                last = next(before)
                # the index of the first row
                begin = Grid(stride).count(position)
                if step > 1 and not self.window:
                    # skip tokens that no token of the recipient attends to
                    x, begin, token, step = x[:, token - begin :: step], first, first, 1
                kv = chain(x, norm, to.to_kv[j]) if x.shape[1] or last is None else last
                if last is not None:
                    begin -= last.shape[1]
                    kv = torch.cat((last.to(kv.dtype), kv), dim=1) if x.shape[1] else kv
                    last = keep(last, kv[:, -last.shape[1] :])
                kept.append(last)
                # rows before the first token are masked later
                skipped = token - self.window - begin
                kv = kv[:, skipped:] if skipped >= 0 else F.pad(kv, (0, 0, -skipped, 0))
                sources.append(SourceKeys(kv.unflatten(-1, (2, to.heads, -1)), step, repeats, lead, token))
            if i in updated:
                query = chain(tokens[i], self.norms[i], to.to_q).unflatten(-1, (to.heads, -1))
                gathered.append((to, query, sources))
        return gathered, state and tuple(kept)

    def updates(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        return [self.attend(to, query, sources, ablated)[0] for to, query, sources in gathered]

    def weights(self, gathered: Any, ablated: Collection[int]) -> list[Tensor]:
        members = torch.tensor([j for j in range(len(self.dims)) if j not in ablated], dtype=torch.long)
        found = [self.attend(to, query, sources, ablated)[1] for to, query, sources in gathered]
        wholes = [each.new_zeros(*each.shape[:3], len(self.dims), each.shape[-1]) for each in found]
        return [whole.index_copy(3, members.to(whole.device), each) for whole, each in zip(wholes, found, strict=True)]

    def attend(
        self, to: Receiver, query: Tensor, sources: Sequence[SourceKeys], ablated: Collection[int]
    ) -> tuple[Tensor, Tensor]:
        """The update `(batch, tokens, dim)`, and its weights `(batch, tokens, heads, levels, 1 + window)`.

        query: `(batch, tokens, heads, dim_head)`. The weights have no ablated levels.
        """
        batch, count, heads, _ = query.shape
        members = [j for j in range(len(sources)) if j not in ablated]
        if not members or not count:
            update = to.bias.new_zeros(batch, count, to.dim)
            return update, to.bias.new_zeros(batch, count, heads, len(members), 1 + self.window)
        back = torch.arange(1 + self.window, device=query.device)
        query = query * query.shape[-1] ** -0.5

        scores, values = [], []
        for source in (sources[j] for j in members):
            groups = in_groups(query, source)
            # newest first, each (batch, groups, 1, heads, dim_head)
            end = (groups.shape[1] - 1) * source.step + 1
            rows = [source.kv[:, self.window - b : self.window - b + end : source.step, None] for b in range(len(back))]
            values.append([row[:, :, :, 1] for row in rows])
            score = torch.stack([(groups * row[:, :, :, 0]).sum(dim=-1) for row in rows], dim=-1)
            if self.window:
                token = source.token + source.step * torch.arange(groups.shape[1], device=query.device)
                score = score.masked_fill((token[:, None] < back)[:, None, None], -torch.inf)
            scores.append(score.flatten(1, 2)[:, source.lead : source.lead + count])
        # indexing with a list would copy it to the device, and the host would wait
        bias = torch.stack([to.bias[:, j] for j in members], dim=1) if ablated else to.bias
        weights = torch.stack(scores, dim=-2).to(bias.dtype) + bias
        weights = weights.flatten(-2).softmax(dim=-1).view_as(weights)

        terms = []
        for j, level_weights, rows in zip(members, weights.unbind(dim=-2), values, strict=True):
            shares = in_groups(level_weights.to(query.dtype), sources[j]).unbind(dim=-1)
            products = [share[..., None] * row for share, row in zip(shares, rows, strict=True)]
            pooled = sum(products[1:], products[0])
            terms.append(pooled.flatten(1, 2)[:, sources[j].lead : sources[j].lead + count])
        return chain(sum(terms[1:], terms[0]).flatten(2), to.to_out), weights


def in_groups(x: Tensor, source: SourceKeys) -> Tensor:
    """A recipient's tokens `(batch, tokens, ...)` by group: `(batch, groups, repeats, ...)`. See `SourceKeys`.

    The first and the last group are filled up with zeros.
    """
    if source.repeats == 1:
        return x[:, :, None]
    tail = -(source.lead + x.shape[1]) % source.repeats
    if source.lead or tail:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (source.lead, tail))
    return x.unflatten(1, (-1, source.repeats))
