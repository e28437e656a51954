"""Rotary position embeddings, with and without the xPos decay."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange, repeat
from rotary_embedding_torch.rotary_embedding_torch import rotate_half
from torch import Tensor

from ..ops.precision import KeepsExact, exact_dtype
from ..ops.result_cache import ResultCache
from ..ops.tracing import is_exporting
from ..positions import Position

THETA = 10_000.0
XPOS_SCALE_BASE = 512.0
# the origin of xPos in a cache moves by this many positions, so that its factors stay in the range of float32
BLOCK = 2048
# number of positions in a table of factors for single steps; divides the block
TABLE = 256


def frequencies(dim: int, device: str | None = None) -> Tensor:
    """The angle between neighbouring positions, in radians, for each pair of channels: `(dim / 2,)`.

    `RotaryEmbedding(dim).freqs` of rotary-embedding-torch is the same in float32, up to rounding. It has no float64.
    """
    return THETA ** -(torch.arange(0, dim, 2, dtype=exact_dtype(), device=device) / dim)


def decay(dim: int, distance: Tensor) -> Tensor:
    """The factor of xPos for each distance and pair of channels: `(n,)` to `(n, dim / 2)`.

    `RotaryEmbedding.get_scale` of rotary-embedding-torch has a base in float32 and a fixed origin. Caches need float64
    and another origin.
    """
    channel = torch.arange(0, dim, 2, device=distance.device, dtype=distance.dtype)
    base = (channel + 0.4 * dim) / (1.4 * dim)
    return base ** (distance / XPOS_SCALE_BASE)[:, None]


def factors_at(
    freqs: Tensor, dtype: torch.dtype, position: Tensor, distance: Tensor, xpos: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine at integer positions `(n,)`, in the shape that `Rotary.factors` returns.

    With `xpos`, both are multiplied by the decay at `distance` `(n,)` from the origin.
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
"""`factors_at` as a single operation, which a compiler computes once."""


@factors_once.register_fake
def _(freqs: Tensor, dtype: torch.dtype, position: Tensor, distance: Tensor, xpos: bool) -> tuple[Tensor, Tensor]:
    lead = (2, 1, 1) if xpos else ()
    cos = freqs.new_empty(*lead, *position.shape, *freqs.shape, dtype=torch.promote_types(dtype, torch.float32))
    return cos, torch.empty_like(cos)


class Rotary(KeepsExact):
    """Rotates each pair of channels by an angle proportional to the position. Scores then depend on distances only.

    Products are computed in float32, or in float64 for float64 inputs. Angles are computed in float64, which stays
    exact at any position.

    RoPE: Su et al. 2021, arXiv 2104.09864, eq. 34. xPos: Sun et al. 2022, arXiv 2212.10554, eq. 12.

    Args:
        dim: width of a head, even.
        pairs: which channels form a pair: 'interleaved' neighbours (2i, 2i + 1), or 'halves' (i, i + dim / 2).
        xpos: whether scores also decay with distance.
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
        self.table = ResultCache()

    def exact_value(self, name: str) -> Tensor:
        # a model built on the device 'meta' has no values yet
        return frequencies(self.dim, device='cpu') if self.freqs.is_meta else super().exact_value(name)

    def forward(self, qk: Tensor, start: int = 0) -> Tensor:
        """Rotate queries and keys `(groups + 1, batch, heads, seq, dim)`, keys last, at positions from `start` on.

        The result has the same shape and dtype.
        """
        n = qk.shape[-2]
        # an origin in the middle keeps the factors of xPos and their inverses small
        return self.rotate(qk, *self.factors(qk, start, n, origin=start + n // 2))

    def reach(self, dtype: torch.dtype) -> float:
        """The number of positions with one origin: factors of xPos and their inverses stay within e^5 or e^40."""
        if not self.xpos:
            return math.inf
        return XPOS_SCALE_BASE * (8 if dtype == torch.float16 else 64)

    def agrees(self, other: Rotary) -> bool:
        """Whether both rotate in the same way. On a GPU this waits for the device."""
        ours, theirs = (self.pairs, self.xpos, self.freqs.shape), (other.pairs, other.xpos, other.freqs.shape)
        return ours == theirs and self.freqs.device == other.freqs.device and torch.equal(self.freqs, other.freqs)

    def relative_to_block(self, qk: Tensor, start: int) -> Tensor:
        """Like `forward`, with the start of their block as the origin. A cache can rely on this origin.

        With xPos, all tokens must be of one block: see `pieces`.
        """
        n = qk.shape[-2]
        if isinstance(start, Position):
            position, kind = start.tensor, ('factors', qk.dtype)
            factors = start.once(
                kind, lambda: factors_at(self.freqs, qk.dtype, position, position % BLOCK, self.xpos), self
            )
            return self.rotate(qk, *factors)
        origin = start // BLOCK * BLOCK
        # on other devices nothing is cached, and each step would compute a whole table
        if n > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling() or qk.device.type != 'cpu':
            return self.rotate(qk, *self.factors(qk, start, n, origin))

        # single steps read their factors from a table of nearby positions
        first = start // TABLE * TABLE
        cos, sin = self.table(self.factors_of, (self.freqs,), qk.dtype, first, TABLE, origin)
        row = start - first
        return self.rotate(qk, cos[..., row : row + 1, :], sin[..., row : row + 1, :])

    def at(self, qk: Tensor, position: Tensor) -> Tensor:
        """Like `forward`, at a position for each token, int64 `(batch, seq)`. Not for xPos."""
        flat = position.flatten()
        cos, sin = factors_at(self.freqs, qk.dtype, flat, flat, xpos=False)
        return self.rotate(qk, *(t.view(len(position), 1, -1, t.shape[-1]) for t in (cos, sin)))

    def factors(self, like: Tensor, start: int, n: int, origin: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for each position and pair: `(n, dim / 2)`, or with xPos `(2, 1, 1, n, dim / 2)`.

        The first axis of xPos has the factors of queries, then those of keys. Scores are valid where queries and keys
        have the same `origin`.
        """
        return self.factors_of(self.freqs, like.dtype, start, n, origin)

    def factors_of(self, freqs: Tensor, dtype: torch.dtype, start: int, n: int, origin: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(start, start + n, device=freqs.device)
        # a compiler would compute sines in float64 again for each head and row
        opaque = torch.compiler.is_compiling() and not is_exporting() and not freqs.requires_grad
        return (factors_once if opaque else factors_at)(freqs, dtype, position, position - origin, self.xpos)

    def pieces(self, start: int, n: int) -> list[int]:
        """Lengths of the pieces of a chunk that lie in one block each, and so have one origin for xPos."""
        if not self.xpos or n == 1:
            return [n]
        ends = [*range(start - start % BLOCK + BLOCK, start + n, BLOCK), start + n]
        return [end - begin for begin, end in pairwise([start, *ends])]

    def next_block(self, keys: Tensor, start: int) -> Tensor:
        """Move the origin of cached keys `(batch, heads, slots, dim)` where a new block begins at `start`."""
        # captured steps never begin a block
        if not self.xpos or isinstance(start, Position) or start % BLOCK or not start:
            return keys
        distance = torch.full((1,), BLOCK, device=keys.device, dtype=torch.promote_types(keys.dtype, torch.float32))
        factor = decay(self.dim, distance)[0].repeat_interleave(2)
        return keys * factor.to(keys.dtype) if torch.is_grad_enabled() else keys.mul_(factor)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `x` by `factors`. Pairs always come out interleaved: scores do not depend on the order of channels."""
        dtype, x = x.dtype, x.to(cos.dtype)
        if cos.ndim == x.ndim and len(cos) < len(x):
            # all groups of queries have the same factors
            cos, sin = (torch.cat((t[:1].expand(len(x) - 1, *t.shape[1:]), t[1:])) for t in (cos, sin))
        if is_exporting():
            # the form of rotary-embedding-torch, in real products: ONNX has no complex numbers. Compiled, it is slower
            # than the form below, and slower in eager mode than one complex product.
            x = x if self.pairs == 'interleaved' else rearrange(x, '... (half d) -> ... (d half)', half=2)
            cos, sin = (repeat(t, '... d -> ... (d pair)', pair=2) for t in (cos, sin))
            return (x * cos + rotate_half(x) * sin).to(dtype)
        if torch.compiler.is_compiling():
            # a compiler can fuse real products, not complex ones
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if self.pairs == 'interleaved' else x.chunk(2, dim=-1)
            rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
            return rotated.flatten(-2).to(dtype)
        is_interleaved = self.pairs == 'interleaved'
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) if is_interleaved else torch.complex(*x.chunk(2, -1))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(dtype)
