"""Causal softmax attention over all previous tokens or over a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_int
from ..memory import grow, room_for
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.pattern_attention import MODES, PARTS, PATTERNS, attend_pattern, attended, keys_of_pattern
from ..ops.recompute import recompute
from ..ops.window_attention import BACKENDS as BACKENDS
from ..ops.window_attention import Backend, attend_window
from ..positions import Position
from ..rows import Rows
from .rotary import Rotary

# queries per block, where full attention runs block by block
FAR_BLOCK = 1024
# tokens of a ragged chunk that run at once, at least: smaller pieces would mostly be overhead
MIN_RAGGED = 128
# default summary size of a pattern, at most
MAX_SUMMARY = 8

Cache = tuple[Tensor, Tensor]
# heads of a pattern, and the arguments of `attend_pattern` and `attended` for them
HeadPattern = tuple[slice, dict[str, Any]]


def cache_slot(position: Tensor, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where the token at `position` `(1,)` enters a ring buffer, and an additive mask over the ring.

    Returns the slot `(1,)` and the mask `(1, slots)`: minus infinity for slots never written, otherwise zero.
    """
    empty = torch.arange(slots, device=position.device) > position
    return position % slots, torch.zeros(1, slots, dtype=dtype, device=position.device).masked_fill(empty, -math.inf)


def ragged_mask(position: Tensor, slots: int, filled: int, reach: int) -> Tensor:
    """Which keys the queries of a ragged chunk attend to: those of the first `filled` slots of a ring, then their own.

    position: that of each query, `(batch, seq)`. Returns a mask `(batch, 1, seq, filled + seq)`.
    """
    # the latest token before the chunk in each slot; negative in slots never written
    latest = position[:, :1] - 1
    held = latest - (latest - torch.arange(filled, device=position.device)) % slots
    key = torch.cat((held, position), dim=1)[:, None, None]
    distance = position[:, None, :, None] - key
    return (distance >= 0) & (distance <= reach) & (key >= 0)


class Attention(nn.Module):
    """Multi-head causal attention with its pre-norm. `(batch, seq, dim)` to `(batch, seq, dim)`.

    With `window = None`, a token attends to all previous tokens. The norm is an RMSNorm, and rotary embeddings with
    xPos rotate interleaved pairs of channels. With `window = w`, a token attends to itself and to the `w` tokens before
    it. The norm is a LayerNorm, and rotary embeddings rotate pairs of halves, as in local-attention's `LocalMHA`.
    Vaswani et al. 2017, arXiv 1706.03762.

    Time is `O(seq * min(seq, window))`, memory `O(seq)` or `O(seq * window)`.

    The state holds the keys and values of the last tokens, each `(batch, kv_heads, slots, dim_head)`. It grows with the
    number of tokens read, up to `reach + 1` slots (see `memory.room_for`). Then it is a ring buffer: token `r` has slot
    `r % (reach + 1)`. With a state, full attention also reaches back `reach` tokens.

    Args:
        dim: width of the tokens.
        dim_head: width of a head, even.
        heads: number of query heads.
        window: number of previous tokens that a token attends to. None for all.
        length: how many tokens full attention reaches back with a state.
        layer: number of the block. It decides which part of a pattern this block has in mode 'interleave'.
        backend: backend of windowed attention, see `attend_window`.
        placed: whether rows of a batch can be at different positions. Rotary embeddings then have no xPos, because its
            origin would differ between rows.
        kv_heads: number of key and value heads, a divisor of `heads`, which is the default. Each serves
            `heads / kv_heads` query heads: grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245; 1 is
            multi-query attention. Query head `i` uses key head `i % kv_heads`.
        qk_norm: normalise queries and keys by their root mean square, with one learned gain for each channel (Henry et
            al. 2020, arXiv 2010.04245; with a gain as in Dehghani et al. 2023, arXiv 2302.05442).
        pattern: 'strided' or 'fixed' makes full attention sparse, in time `O(seq * sqrt(seq))` (Child et al. 2019,
            arXiv 1904.10509). Rotary embeddings then have no xPos, because its decay would remove distant tokens.
        pattern_mode: which parts of a pattern a head has. 'interleave': near tokens in even layers, far tokens in odd
            layers. 'union': both. 'heads': near tokens in the first half of the heads, far tokens in the second half.
        stride: l of the pattern. By default the power of two nearest to `sqrt(length)`.
        summary: c of the pattern 'fixed': the far part has the last c of every l tokens. By default `l / 8`, but at
            most 8.

    Raises:
        ValueError: a value is not allowed, or two values contradict each other.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        window: int | None = None,
        length: int = 2048,
        layer: int = 0,
        backend: Backend = 'auto',
        placed: bool = False,
        kv_heads: int | None = None,
        qk_norm: bool = False,
        pattern: Literal['strided', 'fixed'] | None = None,
        pattern_mode: Literal['interleave', 'union', 'heads'] = 'interleave',
        stride: int | None = None,
        summary: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else check_int('kv_heads', kv_heads)
        if heads % kv_heads:
            raise ValueError(f'kv_heads must divide the {heads} heads, got {kv_heads}')
        if not isinstance(qk_norm, bool):
            raise ValueError(f'qk_norm must be True or False, got {qk_norm!r}')
        self.kv_heads, self.groups = kv_heads, heads // kv_heads
        self.dim_head = dim_head
        self.backend = backend
        self.window = window
        self.reach = length if window is None else window
        self.patterns = (
            None
            if pattern is None
            else self.find_patterns(pattern, pattern_mode, stride, summary, layer=layer, length=length)
        )
        if pattern is None and (pattern_mode, stride, summary) != ('interleave', None, None):
            raise ValueError('pattern_mode, stride and summary are for a pattern, and pattern is None')

        full = window is None
        self.norm = RMSNorm(dim) if full else nn.LayerNorm(dim)
        self.qk_norm = RMSNorm(dim_head) if qk_norm else None
        xpos = full and pattern is None and not placed
        self.rotary_emb = Rotary(dim_head, pairs='interleaved' if full else 'halves', xpos=xpos)
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    @property
    def static_step(self) -> bool:
        """Whether a step runs the same operations at every position."""
        return self.patterns is None

    @property
    def takes_rows(self) -> bool:
        """Whether `start` may be the `Rows` of a ragged chunk."""
        return self.patterns is None and not self.rotary_emb.xpos

    def find_patterns(
        self, pattern: str, mode: str, stride: int | None, summary: int | None, *, layer: int, length: int
    ) -> list[HeadPattern]:
        """The checked patterns of this block, each with its heads."""
        check_choice('pattern', pattern, PATTERNS)
        check_choice('pattern_mode', mode, MODES)
        if self.window is not None:
            raise ValueError(f'pattern is for full attention, and window_sizes is {self.window}')
        stride = 2 ** round(math.log2(length) / 2) if stride is None else check_int('stride', stride)
        if summary is not None and pattern != 'fixed':
            raise ValueError(f"summary is for pattern = 'fixed', got {summary} for {pattern!r}")
        # bounded, because with a fixed share of the stride the cost would be quadratic in the length
        summary = max(min(stride // 8, MAX_SUMMARY), 1) if summary is None else check_int('summary', summary)
        if summary > stride:
            raise ValueError(f'summary must be at most the stride of {stride}, got {summary}')
        if mode == 'heads' and self.kv_heads < 2:
            raise ValueError(f"pattern_mode = 'heads' needs two heads or more (kv_heads), got {self.kv_heads}")
        settings = dict(pattern=pattern, stride=stride, summary=summary)
        half = self.kv_heads // 2
        heads: dict[str, list[tuple[slice, Sequence[str]]]] = {
            'interleave': [(slice(None), PARTS[layer % 2 :][:1])],
            'union': [(slice(None), PARTS)],
            'heads': [(slice(half), PARTS[:1]), (slice(half, None), PARTS[1:])],
        }
        return [(part, dict(settings, parts=parts)) for part, parts in heads[mode]]

    def products(self, n: float) -> float:
        """Operations of a pass over `n` tokens for scores and weighted sums. Products with weights are not counted."""
        keys = n / 2 if self.window is None else min(self.window + 1, n / 2)
        if self.patterns is not None:
            # two patterns share the heads equally
            counts = (keys_of_pattern(n, **settings) for _, settings in self.patterns)
            keys = sum(min(count, n / 2) for count in counts) / len(self.patterns)
        return 4 * n * keys * self.groups * self.kv_heads * self.dim_head

    def initial_state(self, batch: int, like: Tensor) -> Cache:
        shape = (batch, self.kv_heads, room_for(0, self.reach + 1), self.dim_head)
        return like.new_zeros(shape), like.new_zeros(shape)

    def with_room(self, cache: Cache, tokens: int) -> Cache:
        """The cache, with slots for `tokens` tokens or for the last `reach + 1` of them.

        Keys and values are `(..., kv_heads, slots, dim_head)`.
        """
        keys, values = cache
        slots, limit = keys.shape[-2], self.reach + 1
        if slots == limit or tokens <= slots:
            return cache
        return grow(keys, tokens, limit), grow(values, tokens, limit)

    def forward(self, x: Tensor, cache: Cache | None = None, start: int | Rows = 0) -> tuple[Tensor, Cache | None]:
        """x: `(batch, seq, dim)`, tokens `start` to `start + seq` of the sequence, or a ragged chunk with a cache."""
        # Query heads form groups, and each group uses all key heads. qk: (groups + 1, batch, kv_heads, seq, dim_head),
        # keys last. The gradient of `split` is one copy, those of slices one each. einops would cost microseconds here,
        # which would slow down steps of generation.
        qkv = chain(x, self.norm, self.to_qkv).unflatten(-1, (self.groups + 2, self.kv_heads, -1))
        qk, v = (part.permute(2, 0, 3, 1, 4) for part in qkv.split((self.groups + 1, 1), dim=-3))
        v = v[0]
        if self.qk_norm is not None:
            # under autocast, this has the dtype of the norm's weight until it is rotated
            qk = self.qk_norm(qk)

        if isinstance(start, Rows):
            assert cache is not None
            out, cache = self.attend_rows(qk, v, self.with_room(cache, start.end), start)
        elif cache is not None:
            out, cache = self.attend_with_cache(qk, v, self.with_room(cache, start + x.shape[1]), start)
        elif self.window is None and x.shape[1] > self.rotary_emb.reach(v.dtype):
            out = self.attend_far(self.as_rows(qk[:-1]), self.repeat_groups(qk[-1]), self.repeat_groups(v))
        else:
            qk = self.rotary_emb(qk).to(v.dtype)
            q, k, v = self.as_rows(qk[:-1]), self.repeat_groups(qk[-1]), self.repeat_groups(v)
            if self.window is None and self.patterns is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = self.attend(q, k, v)

        out = out.unflatten(0, (self.groups, -1)).permute(1, 3, 0, 2, 4).flatten(2)
        return chain(out, self.to_out), cache

    def as_rows(self, q: Tensor) -> Tensor:
        """Queries with groups as rows: `(groups, batch, kv_heads, seq, dim_head)` to `(groups * batch, ...)`."""
        return q.flatten(0, 1)

    def repeat_groups(self, t: Tensor) -> Tensor:
        """Keys or values `(batch, kv_heads, seq, dim_head)`, repeated for each group: `(groups * batch, ...)`."""
        return t if self.groups == 1 else t.expand(self.groups, -1, -1, -1, -1).flatten(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        """Attention of each query to itself and the `reach` tokens before it.

        q: `(rows, kv_heads, seq, dim_head)`, of tokens from `start` on; k, v: `(rows, kv_heads, past + seq, dim_head)`.
        """
        if self.patterns is not None:
            outs = [
                attend_pattern(q[:, part], k[:, part], v[:, part], start, **settings, reach=self.reach)
                for part, settings in self.patterns
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return attend_window(q, k, v, self.reach, self.backend)

    def attend_far(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention over more tokens than the factors of xPos can span at once.

        Each block of queries uses its first token as the origin, and keys are rotated again for it. The decay of keys
        too far away underflows to zero, as it should. The backward pass computes blocks again, so that memory is that
        of one block.

        q, k, v: `(rows, kv_heads, seq, dim_head)`; q and k are not rotated yet.
        """

        def block(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            first, end = keys.shape[-2] - queries.shape[-2], keys.shape[-2]
            rotary = self.rotary_emb
            q = rotary.rotate(queries, *(part[0] for part in rotary.factors(queries, first, end - first, origin=first)))
            k = rotary.rotate(keys, *(part[1] for part in rotary.factors(keys, 0, end, origin=first)))
            q, k = q.to(values.dtype), k.to(values.dtype)
            mask = torch.arange(end, device=k.device) <= torch.arange(first, end, device=k.device)[:, None]
            return F.scaled_dot_product_attention(q, k, values, attn_mask=mask)

        outs = []
        for first in range(0, q.shape[-2], FAR_BLOCK):
            end = min(first + FAR_BLOCK, q.shape[-2])
            parts = q[:, :, first:end], k[:, :, :end], v[:, :, :end]
            outs.append(recompute(block, [self.rotary_emb], *parts, preserve_rng_state=False))
        return torch.cat(outs, dim=2)

    def attend_with_cache(self, qk: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        """Attention of a chunk from `start` on. Returns the output and the cache after the chunk.

        qk: `(groups + 1, batch, kv_heads, seq, dim_head)`, keys last, not rotated yet; v: `(batch, kv_heads, seq,
        dim_head)`; the output: `(groups * batch, kv_heads, seq, dim_head)`.
        """
        outs = []
        lengths = self.rotary_emb.pieces(start, v.shape[-2])
        for piece, values in zip(qk.split(lengths, dim=-2), v.split(lengths, dim=-2), strict=True):
            piece = self.rotary_emb.relative_to_block(piece, start).to(values.dtype)
            out, cache = self.attend_piece(self.as_rows(piece[:-1]), piece[-1], values, cache, start)
            outs.append(out)
            start += values.shape[-2]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-2)), cache

    def attend_piece(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        """`attend_with_cache` for tokens whose rotations have one origin."""
        n, slots = k.shape[-2], cache[0].shape[-2]
        keys, values = self.rotary_emb.next_block(cache[0], start), cache[1]
        in_place = not torch.is_grad_enabled()
        # under autocast the cache stays in the dtype of the weights, and results do not
        cache_dtype = keys.dtype

        is_recorded = torch.compiler.is_compiling() or isinstance(start, Position)
        if n == 1 and in_place and is_recorded and self.patterns is None:
            # one graph is valid for every position: only the contents of tensors depend on `start`
            if isinstance(start, Position):
                slot, mask = start.once(('slots', slots, q.dtype), lambda: cache_slot(start.tensor, slots, q.dtype))
            else:
                slot = torch.full((1,), start % slots, device=k.device)
                mask = (torch.arange(slots, device=k.device) <= start)[None]
            keys, values = keys.index_copy_(2, slot, k.to(cache_dtype)), values.index_copy_(2, slot, v.to(cache_dtype))
            return self.step(q, keys, values, mask=mask), (keys, values)

        if n == 1 and in_place and not is_recorded:
            keys[:, :, start % slots], values[:, :, start % slots] = k[:, :, 0], v[:, :, 0]
            if self.patterns is None:
                filled = min(start + 1, slots)
                return self.step(q, keys[:, :, :filled], values[:, :, :filled]), (keys, values)
            outs = []
            for part, settings in self.patterns:
                positions = attended(start, **settings, first=max(0, start - self.reach))
                index = torch.tensor(positions, device=k.device) % slots
                outs.append(self.step(q[:, part], *(t[:, part].index_select(2, index) for t in (keys, values))))
            return torch.cat(outs, dim=1), (keys, values)

        old = torch.arange(max(0, start - slots + 1), start, device=k.device) % slots
        all_keys, all_values = (
            torch.cat((cached.index_select(2, old).to(q.dtype), new), dim=2) for cached, new in ((keys, k), (values, v))
        )
        out = self.attend(q, self.repeat_groups(all_keys), self.repeat_groups(all_values), start)

        # later tokens can only reach the newest keys
        new = torch.arange(max(start, start + n - slots), start + n, device=k.device) % slots
        write = Tensor.index_copy_ if in_place else Tensor.index_copy
        k, v = (t[:, :, -len(new) :].to(cache_dtype) for t in (k, v))
        return out, (write(keys, 2, new, k), write(values, 2, new, v))

    def attend_rows(self, qk: Tensor, v: Tensor, cache: Cache, rows: Rows) -> tuple[Tensor, Cache]:
        """`attend_with_cache` for a ragged chunk."""
        outs = []
        # a mask has a value for each query and key of a row, so pieces bound the memory
        size = min(max(cache[0].shape[-2], MIN_RAGGED), FAR_BLOCK)
        pieces = rows.pieces(v.shape[-2], size)
        for piece, queries, values in zip(pieces, qk.split(size, dim=-2), v.split(size, dim=-2), strict=True):
            out, cache = self.attend_ragged_piece(queries, values, cache, piece)
            outs.append(out)
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-2)), cache

    def attend_ragged_piece(self, qk: Tensor, v: Tensor, cache: Cache, rows: Rows) -> tuple[Tensor, Cache]:
        """`attend_rows` for tokens whose mask fits in memory."""
        n, slots = v.shape[-2], cache[0].shape[-2]
        position = rows.positions(n)
        qk = self.rotary_emb.at(qk, position).to(v.dtype)
        q, k = self.as_rows(qk[:-1]), qk[-1]
        is_step = n == 1 and not torch.is_grad_enabled()
        if not is_step:
            filled = min(max(rows.starts), slots)
            keys, values = (
                torch.cat((old[:, :, :filled].to(q.dtype), new), dim=2) for old, new in zip(cache, (k, v), strict=True)
            )
            mask = rows.once(('mask', n, slots, self.reach), lambda: ragged_mask(position, slots, filled, self.reach))
            keys, values, mask = map(self.repeat_groups, (keys, values, mask))
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        row, token = rows.newest(slots)
        slot = rows.once(('slot', slots), lambda: position[row, token] % slots)
        write = Tensor.index_put if torch.is_grad_enabled() else Tensor.index_put_
        keys, values = (
            write(old.transpose(1, 2), (row, slot), new.transpose(1, 2)[row, token].to(old.dtype)).transpose(1, 2)
            for old, new in zip(cache, (k, v), strict=True)
        )
        if is_step:
            # no copy of the cache: the token is already in it
            filled = min(rows.end, slots)
            mask = rows.once(('filled', filled), lambda: torch.arange(filled, device=k.device) <= position[..., None])
            out = self.step(q, keys[:, :, :filled], values[:, :, :filled], mask=mask[:, None])
        return out, (keys, values)

    def step(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of one token to all of these keys. Groups act as several queries, so that no key is repeated.

        q: `(groups * batch, kv_heads, 1, dim_head)`; keys, values: `(batch, kv_heads, slots, dim_head)`; mask:
        `(1, slots)` or `(batch, 1, 1, slots)`.
        """
        q = q.unflatten(0, (self.groups, -1))[..., 0, :].permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask)
        return out.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]
