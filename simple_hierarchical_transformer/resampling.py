"""How a placed level gets its tokens from finer ones, and how finer tokens get the level's.

Each module here maps `(tokens, pieces, state) -> (result, state)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .levels import Level
from .ops.linear import chain
from .ops.scan import scan
from .pieces import Pieces, take

# offsets in a piece that have a matrix of their own
OFFSETS = 16
# the smallest probability that smoothing works with
EPS = 1e-4

Kept = tuple[Tensor, ...]


class PieceAttention(nn.Module):
    """Adds to the finer token at a boundary what learned queries, one for each head, find in the piece that it ends.

    After the pooling of bytes in Pagnoni et al. 2024, arXiv 2412.09871, section 3.2. Only the product of a learned
    query and the key matrix matters, so the parameter is that product. The state holds the sums of the unfinished
    piece: largest score, weights and weighted values, `(batch, heads)`, `(batch, heads)` and `(batch, heads,
    dim_head)`.

    Args:
        dim: the width of the finer tokens.
        heads: the number of queries.
        dim_head: the width of a value.
    """

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.to_scores = nn.Linear(dim, heads, bias=False)
        self.to_values = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> Kept:
        zeros = like.new_zeros(batch, self.heads)
        return zeros - torch.inf, zeros, like.new_zeros(batch, self.heads, self.dim_head)

    def forward(self, x: Tensor, pieces: Pieces, state: Kept | None) -> tuple[Tensor, Kept | None]:
        """Finer tokens x `(batch, n, dim)` to `(batch, k, dim)`."""
        scores, values = chain(x, self.to_scores), chain(x, self.to_values).unflatten(-1, (self.heads, -1))
        exact = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(exact)
        b, k = pieces.at.shape
        # the piece of each finer token. Piece k is unfinished, and k + 1 takes the padding of finer tokens
        piece = pieces.ended - pieces.boundary.long()
        if pieces.finer.exists is not None:
            piece = torch.where(pieces.finer.exists, piece, k + 1)
        into = piece[..., None].expand(-1, -1, self.heads)
        top = scores.new_full((b, k + 2, self.heads), -torch.inf).scatter_reduce(1, into, scores.detach(), 'amax')
        if state is not None:
            top = torch.cat((torch.maximum(top[:, :1], state[0].to(exact)[:, None]), top[:, 1:]), dim=1)
        # an empty piece has no score
        top = torch.where(top.isinf(), 0.0, top)
        weights = (scores - take(top, piece)).exp()
        sums = scores.new_zeros(b, k + 2, self.heads).scatter_add(1, into, weights)
        weighted = weights[..., None] * values.to(exact)
        totals = weighted.new_zeros(b, k + 2, *weighted.shape[2:]).scatter_add(
            1, into[..., None].expand(-1, -1, -1, self.dim_head), weighted
        )
        if state is not None:
            decay = (state[0].to(exact) - top[:, 0]).exp()
            sums = torch.cat((sums[:, :1] + (decay * state[1].to(exact))[:, None], sums[:, 1:]), dim=1)
            carried = (decay[..., None] * state[2].to(exact))[:, None]
            totals = torch.cat((totals[:, :1] + carried, totals[:, 1:]), dim=1)
        # padding has empty pieces
        pooled = totals[:, :k] / torch.where(sums[:, :k] == 0, 1.0, sums[:, :k])[..., None]
        out = take(x, pieces.at) + chain(pooled.flatten(2).to(x.dtype), self.to_out)
        if state is None:
            return out, None
        # the sums of the piece that the next chunk goes on with
        last = pieces.lengths[:, None]
        after = [take(each, last)[:, 0] for each in (top, sums, totals)]
        after[0] = torch.where(after[1] == 0, -torch.inf, after[0])
        return out, tuple(new.to(old.dtype) for new, old in zip(after, state, strict=True))


class Repeat(nn.Module):
    """The level's latest token at each finer token. The state is the last token, `(batch, 1, dim)`.

    With learned boundaries, it is multiplied by 1, with the gradient of the probability of what the rule decided: the
    straight-through factor of Hwang et al. 2025, arXiv 2507.07955, section 2.2.

    Args:
        dim: the width of the level's tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def initial_state(self, batch: int, like: Tensor) -> Kept:
        return (like.new_zeros(batch, 1, self.dim),)

    def forward(self, x: Tensor, pieces: Pieces, state: Kept | None) -> tuple[Tensor, Kept | None]:
        """The level's tokens x `(batch, k, dim)` to `(batch, n, dim)`, one for each finer token."""
        before = None if state is None else state[0]
        out = straight_through(pieces.spread(x, before), pieces)
        return out, None if before is None else (pieces.last(x, before).to(before.dtype),)


class AtBoundary(nn.Module):
    """The level's tokens at the boundaries, and zeros elsewhere: the finer layers spread them. No state.

    Slagle 2024, arXiv 2404.14408.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()

    def initial_state(self, batch: int, like: Tensor) -> Kept:
        return ()

    def forward(self, x: Tensor, pieces: Pieces, state: Kept | None) -> tuple[Tensor, Kept | None]:
        if not x.shape[1]:
            return x.new_zeros(*pieces.boundary.shape, x.shape[-1]), state
        # before the first boundary of a chunk the index is -1
        out = pieces.spread(x, None, pieces.ended.clamp(min=1))
        return straight_through(out * pieces.boundary[..., None].to(x.dtype), pieces), state


class ByOffset(nn.Module):
    """Adds to the level's latest token a linear map that depends on the number of finer tokens since its boundary.

    There are `OFFSETS` maps, and offsets repeat after that. Videau et al. 2025, arXiv 2506.14761. The state holds the
    results of all maps of the last token, `(batch, 1, OFFSETS * dim)`, and the offset of the next finer token, `(batch,
    1)`.

    Args:
        dim: the width of the level's tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.to_offsets = nn.Linear(dim, OFFSETS * dim, bias=False)

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        yield self.to_offsets, n

    def initial_state(self, batch: int, like: Tensor) -> Kept:
        return like.new_zeros(batch, 1, OFFSETS * self.dim), like.new_zeros(batch, 1, dtype=torch.long)

    def forward(self, x: Tensor, pieces: Pieces, state: Kept | None) -> tuple[Tensor, Kept | None]:
        mapped = chain(x, self.to_offsets) + x.repeat(1, 1, OFFSETS)
        index, ended = pieces.finer.places, pieces.ended
        # where the piece of each finer token began: at a boundary of the chunk, or before it
        began = pieces.at if state is None else torch.cat((-state[1], pieces.at), dim=1)
        offset = index - began.gather(1, ended - int(state is None))
        parts = mapped.unflatten(-1, (OFFSETS, -1))
        if state is not None:
            parts = torch.cat((state[0].to(mapped.dtype).unflatten(-1, (OFFSETS, -1)), parts), dim=1)
        row = (ended - int(state is None)) * OFFSETS + offset % OFFSETS
        out = straight_through(take(parts.flatten(1, 2), row), pieces)
        if state is None:
            return out, None
        n = pieces.boundary.shape[1]
        end = pieces.finer.lengths[:, None] if pieces.finer.lengths is not None else n
        since = end - began.gather(1, pieces.lengths[:, None])
        return out, (pieces.last(mapped, state[0]).to(state[0].dtype), since)


class Smooth(Repeat):
    """`Repeat` after an exponential moving average whose rate is the probability of a boundary.

        z_k = P_k x_k + (1 - P_k) z_(k-1)

    x_k is the level's k-th token, P_k the probability of its boundary, at least `EPS` from 0 and 1. The state is the
    last z, `(batch, 1, dim)`. Hwang et al. 2025, arXiv 2507.07955, equation 5.
    """

    def forward(self, x: Tensor, pieces: Pieces, state: Kept | None) -> tuple[Tensor, Kept | None]:
        if not x.shape[1]:
            return super().forward(x, pieces, state)
        if pieces.probability is None:
            raise ValueError("upsample = 'smooth' needs boundaries that return a probability")
        exact = torch.promote_types(x.dtype, torch.float32)
        p = take(pieces.probability.to(exact), pieces.at).clamp(EPS, 1 - EPS)[..., None]
        smoothed = scan(1 - p, p * x.to(exact), None if state is None else state[0][:, 0].to(exact))
        return super().forward(smoothed.to(x.dtype), pieces, state)


def straight_through(out: Tensor, pieces: Pieces) -> Tensor:
    """`out` `(batch, n, dim)` times 1, with the gradient of the probability of what the rule decided."""
    p = pieces.probability
    if p is None or not torch.is_grad_enabled():
        return out
    decided = torch.where(pieces.boundary, p, 1 - p)
    return out * (decided + (1 - decided).detach())[..., None].to(out.dtype)


UPSAMPLERS: dict[str, type[nn.Module]] = {
    'repeat': Repeat,
    'boundary': AtBoundary,
    'offset': ByOffset,
    'smooth': Smooth,
}
DOWNSAMPLERS = ('token', 'attention')


def build_downsampler(level: Level, dim: int) -> nn.Module | None:
    """What pools pieces of finer tokens of width `dim`. None where the level takes the tokens at boundaries alone."""
    return PieceAttention(dim, level.heads, level.dim_head) if level.downsample == 'attention' else None
