"""Rotary position embeddings, with and without the xPos decay."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..memory import Position
from ..ops.export import is_exporting
from ..ops.last_result import LastResult
from ..ops.precision import KeepsExact, exact_dtype

THETA = 10_000.0
XPOS_SCALE_BASE = 512.0
# positions after which what is cached of xPos moves on to a new origin, so that its factors never leave float32
BLOCK = 2048
# positions that a step's factors are formed for at a time; divides the block
TABLE = 256


def frequencies(dim: int, device: str | None = None) -> Tensor:
    """By how many radians each pair of channels turns from a position to the next, `(dim / 2,)`."""
    return THETA ** -(torch.arange(0, dim, 2, dtype=exact_dtype(), device=device) / dim)


def decay(dim: int, distance: Tensor) -> Tensor:
    """xPos' factor of each pair of channels at each distance: `(n,)` to `(n, dim / 2)`."""
    channel = torch.arange(0, dim, 2, device=distance.device, dtype=distance.dtype)
    base = (channel + 0.4 * dim) / (1.4 * dim)
    return base ** (distance / XPOS_SCALE_BASE)[:, None]


def factors_at(
    freqs: Tensor, dtype: torch.dtype, position: Tensor, distance: Tensor, xpos: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine at integer positions `(n,)`, as `Rotary.factors` has them.

    With `xpos` times the decay at these distances `(n,)` from the origin.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exact = torch.float32 if freqs.device.type == 'mps' else torch.float64
    angles = torch.outer(position.to(exact), freqs.to(exact))
    cos, sin = angles.cos(), angles.sin()
    if xpos:
        factor = decay(2 * len(freqs), distance.to(exact))
        factor = torch.stack((factor, 1 / factor))[:, None, None]
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


factors_once = torch.library.custom_op(
    'simple_hierarchical_transformer::rotary_factors',
    factors_at,
    mutates_args=(),
    schema='(Tensor freqs, ScalarType dtype, Tensor position, Tensor distance, bool xpos) -> (Tensor, Tensor)',
)
"""`factors_at` as one operation to a compiler, which it computes once."""


@factors_once.register_fake
def _(freqs: Tensor, dtype: torch.dtype, position: Tensor, distance: Tensor, xpos: bool) -> tuple[Tensor, Tensor]:
    lead = (2, 1, 1) if xpos else ()
    made = freqs.new_empty(*lead, *position.shape, *freqs.shape, dtype=torch.promote_types(dtype, torch.float32))
    return made, torch.empty_like(made)


class Rotary(KeepsExact):
    """Turns each pair of channels by an angle that grows with position, so that scores see distances alone.

    `pairs` says which channels form a pair: neighbours (2i, 2i + 1), or the two halves (i, i + dim / 2). With
    `xpos`, scores also decay with distance. Products are formed in float32 (float64 for float64 input); angles in
    float64, which stays exact at any position.

    RoPE: Su et al. 2021, arXiv 2104.09864, eq. 34. xPos: Sun et al. 2022, arXiv 2212.10554, eq. 12.
    """

    freqs: Tensor
    exact = ('freqs',)

    def __init__(self, dim: int, *, pairs: Literal['interleaved', 'halves'], xpos: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.pairs = pairs
        self.xpos = xpos
        # saved with the weights, as in the published package
        self.register_buffer('freqs', frequencies(dim))
        self.table = LastResult()

    def exact_value(self, name: str) -> Tensor:
        # a model that was built without memory has none yet
        return frequencies(self.dim, device='cpu') if self.freqs.is_meta else super().exact_value(name)

    def forward(self, qk: Tensor, start: int = 0) -> Tensor:
        """Queries and keys `(groups + 1, batch, heads, seq, dim)`, keys last, at positions `start` and on.

        Shape and dtype are kept.
        """
        n = qk.shape[-2]
        # the middle as the origin of xPos keeps its two factors small
        return self.turn(qk, *self.factors(qk, start, n, origin=start + n // 2))

    def reach(self, dtype: torch.dtype) -> float:
        """How many positions one origin serves: xPos' factors and their inverses then stay within e^5 or e^40."""
        if not self.xpos:
            return math.inf
        return XPOS_SCALE_BASE * (8 if dtype == torch.float16 else 64)

    def agrees(self, other: Rotary) -> bool:
        """Whether both turn alike. On a GPU the host waits for the answer."""
        own, theirs = (self.pairs, self.xpos, self.freqs.shape), (other.pairs, other.xpos, other.freqs.shape)
        return own == theirs and self.freqs.device == other.freqs.device and torch.equal(self.freqs, other.freqs)

    def relative_to_block(self, qk: Tensor, start: int) -> Tensor:
        """Like `forward`, with the beginning of their block as the origin, for a cache to rely on.

        With xPos, they are of one block: see `pieces`.
        """
        n = qk.shape[-2]
        if isinstance(start, Position):
            place, kind = start.tensor, ('factors', qk.dtype)
            made = start.once(kind, lambda: factors_at(self.freqs, qk.dtype, place, place % BLOCK, self.xpos), self)
            return self.turn(qk, *made)
        origin = start // BLOCK * BLOCK
        # on other devices nothing is kept, and a table would be made for each step
        if n > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling() or qk.device.type != 'cpu':
            return self.turn(qk, *self.factors(qk, start, n, origin))

        # steps take their factors from a table of the positions around
        first = start // TABLE * TABLE
        cos, sin = self.table(self.factors_of, (self.freqs,), qk.dtype, first, TABLE, origin)
        row = start - first
        return self.turn(qk, cos[..., row : row + 1, :], sin[..., row : row + 1, :])

    def factors(self, like: Tensor, start: int, n: int, origin: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for each position and pair, `(n, dim / 2)`; with xPos `(2, 1, 1, n, dim / 2)`, keys' last.

        Queries and keys can meet where the factors of xPos count from the same `origin`.
        """
        return self.factors_of(self.freqs, like.dtype, start, n, origin)

    def factors_of(self, freqs: Tensor, dtype: torch.dtype, start: int, n: int, origin: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(start, start + n, device=freqs.device)
        # a compiler would form sines in float64 again for each head and row
        opaque = torch.compiler.is_compiling() and not is_exporting() and not freqs.requires_grad
        return (factors_once if opaque else factors_at)(freqs, dtype, position, position - origin, self.xpos)

    def pieces(self, start: int, n: int) -> list[int]:
        """Lengths into which a chunk falls, so that each piece has one origin from which its factors are small."""
        if not self.xpos or n == 1:
            return [n]
        ends = [*range(start - start % BLOCK + BLOCK, start + n, BLOCK), start + n]
        return [end - begin for begin, end in pairwise([start, *ends])]

    def next_block(self, keys: Tensor, start: int) -> Tensor:
        """Cached keys `(batch, heads, slots, dim)` of tokens before `start`, for queries from `start` on to meet."""
        # steps that are captured leave out where a block begins
        if not self.xpos or isinstance(start, Position) or start % BLOCK or not start:
            return keys
        distance = torch.full((1,), BLOCK, device=keys.device, dtype=torch.promote_types(keys.dtype, torch.float32))
        factor = decay(self.dim, distance)[0].repeat_interleave(2)
        return keys * factor.to(keys.dtype) if torch.is_grad_enabled() else keys.mul_(factor)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Channels come out as neighbouring pairs, whichever they were: scores are the same in any common order."""
        dtype, x = x.dtype, x.to(cos.dtype)
        if cos.ndim == x.ndim and len(cos) < len(x):
            # several groups of queries turn alike
            cos, sin = (torch.cat((t[:1].expand(len(x) - 1, *t.shape[1:]), t[1:])) for t in (cos, sin))
        if torch.compiler.is_compiling():
            # real products are what a compiler can fuse
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if self.pairs == 'interleaved' else x.chunk(2, dim=-1)
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        else:
            neighbours = self.pairs == 'interleaved'
            numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2))) if neighbours else torch.complex(*x.chunk(2, -1))
            turned = torch.view_as_real(numbers * torch.complex(cos, sin))
        return turned.flatten(-2).to(dtype)
