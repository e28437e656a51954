"""Causal softmax attention, over everything before or over a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from local_attention import LocalAttention
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..checks import check_choice, check_int
from ..memory import Position, grow, room_for
from ..ops.export import first_of
from ..ops.linear import chain
from ..ops.norm import RMSNorm, is_traced
from ..ops.recompute import recompute
from .patterns import MODES, PARTS, PATTERNS, attend_pattern, attended, keys_of_pattern
from .rotary import Rotary

# a block of fewer queries than this spends its time on overhead
MIN_BLOCK = 64
# FlexAttention's own
FLEX_BLOCK = 128
# its kernels take seconds to compile, which shorter sequences do not win back
MIN_FLEX = 1024
# queries at a time, where full attention goes by blocks
FAR_BLOCK = 1024
# of a pattern's tokens that are heard far away, where the user names no number
MAX_SUMMARY = 8

Cache = tuple[Tensor, Tensor]
Backend = Literal['auto', 'sdpa', 'flex', 'local-attention']
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int, backend: Backend = 'auto') -> Tensor:
    """Softmax attention of each token to itself and the `window` tokens before it.

    q and the result: `(batch, heads, seq, dim_head)`; k, v: `(batch, heads, past + seq, dim_head)`, where the first
    `past <= window` belong to tokens before the sequence. Time and memory grow as `seq * window`.

    All backends give the same numbers. 'auto' takes 'flex' on CUDA for `seq` of 1,024 and more, else 'sdpa'.

    Raises ValueError where 'flex' would have to train on another device.
    """
    if backend == 'auto':
        # the kernel's products want 16 channels, and no float64
        serves = q.is_cuda and q.shape[-1] >= 16 and q.dtype != torch.float64 and q.shape[-2] >= MIN_FLEX
        backend = 'flex' if serves else 'sdpa'
    if backend == 'flex' and q.is_meta:
        # a plan of memory: a fused kernel keeps no mask
        return F.scaled_dot_product_attention(q, k, v)
    if backend == 'flex':
        return attend_window_flex(q, k, v, window)
    if backend == 'local-attention':
        return attend_window_local(q, k, v, window)
    return attend_window_sdpa(q, k, v, window)


def attend_window_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Queries in blocks no smaller than the window: each finds all its keys in itself and in the block before."""
    b, h, n, d = q.shape
    past = k.shape[-2] - n
    block = max(window, MIN_BLOCK)

    # an exported length is no number yet: blocks serve all
    if not isinstance(n, torch.SymInt) and n <= block:
        if past + n - 1 <= window:
            if past == 0:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if n == 1:
                return F.scaled_dot_product_attention(q, k, v)
        distance = torch.arange(past, past + n, device=q.device)[:, None] - torch.arange(past + n, device=q.device)
        band = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    # batch and heads fold into one axis, blocks take the place of heads: one mask then serves every row
    blocks = -(-n // block)
    if isinstance(n, torch.SymInt):
        # one is a size of its own to an exporter
        blocks += 1
    tail = blocks * block - n
    q = F.pad(q, (0, 0, 0, tail)).reshape(b * h, blocks, block, d)
    k, v = (F.pad(t, (0, 0, block - past, tail)).reshape(b * h, blocks + 1, block, d) for t in (k, v))
    k, v = (torch.cat((t[:, :-1], t[:, 1:]), dim=-2) for t in (k, v))

    i = torch.arange(block, device=q.device)
    j = torch.arange(-block, block, device=q.device)
    distance = i[:, None] - j
    band = ((distance >= 0) & (distance <= window)).expand(blocks, -1, -1)
    before_start = (torch.arange(blocks, device=q.device)[:, None] == 0) & (j < -past)
    mask = band & ~before_start[:, None]

    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    return first_of(out.reshape(b, h, blocks * block, d), n, dim=2)


def attend_window_flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlexAttention: Dong et al. 2024, arXiv 2412.05496."""
    n, past = q.shape[-2], k.shape[-2] - q.shape[-2]
    if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(f"attn_backend = 'flex' trains on CUDA alone, got a model on {q.device.type}")
    if torch.compiler.is_compiling():
        # part of the graph that is being made: an exporter's tensors must not be kept
        return flex_attention(q, k, v, block_mask=window_mask(n, past, window, q.device))
    # what is made under a mode that pretends to compute must not be kept
    make = window_mask if is_traced() else kept_window_mask
    mask = make(n, past, window, q.device)
    if not q.is_cuda:
        return flex_attention(q, k, v, block_mask=mask)
    return compiled_flex(q.dtype, *q.shape[1::2], past > 0, torch.is_grad_enabled())(q, k, v, mask)


def window_mask(n: int, past: int, window: int, device: torch.device, as_tensors: bool = False) -> BlockMask:
    """The band, block by block: never `n` by `n`.

    With `as_tensors` a compiled kernel reads `past` and `window` from memory. It then serves all of them.
    """
    shift, reach = (torch.full((), each, device=device) if as_tensors else each for each in (past, window))

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + shift - j
        return (distance >= 0) & (distance <= reach)

    # one that inference made could not be saved for a backward pass
    with torch.inference_mode(False):
        rows, columns = -(-n // FLEX_BLOCK), -(-(past + n) // FLEX_BLOCK)
        begin = torch.arange(rows, device=device, dtype=torch.int32) * FLEX_BLOCK + past
        first = (begin - window).clamp(min=0) // FLEX_BLOCK
        last = (begin + FLEX_BLOCK - 1).clamp(max=past + n - 1) // FLEX_BLOCK
        # of each row's columns the first `last - first + 1` count
        indices = (first[:, None] + torch.arange(columns, device=device, dtype=torch.int32)) % columns
        return BlockMask.from_kv_blocks(
            (last - first + 1)[None, None], indices[None, None],
            BLOCK_SIZE=FLEX_BLOCK, mask_mod=band, seq_lengths=(n, past + n),
        )  # fmt: skip


@lru_cache(maxsize=64)
def kept_window_mask(n: int, past: int, window: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):
        return window_mask(n, past, window, device, as_tensors=True)


@lru_cache(maxsize=64)
def compiled_flex(dtype: torch.dtype, heads: int, dim_head: int, has_past: bool, train: bool) -> Any:
    """FlexAttention compiled for such tensors, for all lengths and batches.

    A function that is compiled more than 8 times falls back to a kernel that needs `n` by `n` memory. So the lengths
    are dynamic, what would have it compiled anew has a function of its own, and `fullgraph` forbids the fallback.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask)

    # the compiler counts by code object
    name = f'attend_{str(dtype)[6:]}_{heads}x{dim_head}' + '_past' * has_past + '_train' * train
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, dynamic=True, fullgraph=True)


def attend_window_local(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The local-attention library, which knows no past: queries are made up for it, and left out after."""
    past = k.shape[-2] - q.shape[-2]
    attend = LocalAttention(window_size=window, causal=True, exact_windowsize=True, autopad=True)
    return attend(F.pad(q, (0, 0, past, 0)), k, v)[:, :, past:]


def places(position: Tensor, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The slot `(1,)` of a ring where the token at `position` `(1,)` is written, and what is added to its scores.

    That is `(1, slots)`: zero, and minus infinity for slots that were never written.
    """
    empty = torch.arange(slots, device=position.device) > position
    return position % slots, torch.zeros(1, slots, dtype=dtype, device=position.device).masked_fill(empty, -math.inf)


class Attention(nn.Module):
    """Multi-head causal attention with its pre-norm. `(batch, seq, dim)` to `(batch, seq, dim)`.

    `window = None` attends to everything before: RMSNorm, rotary embeddings with xPos over interleaved pairs.
    `window = w` attends to the token and the `w` before it: LayerNorm, rotary embeddings over halves, the
    conventions of local-attention's `LocalMHA`. Vaswani et al. 2017, arXiv 1706.03762.

    Time `O(seq * min(seq, window))`, memory `O(seq)` or `O(seq * window)`.

    Its state is the keys and values of the last tokens, each `(batch, kv_heads, slots, dim_head)`. It grows with what
    was read, up to `reach + 1` slots (see `state.room_for`), and is a ring then: token `r` stands in slot `r % (reach +
    1)`. With a state, full attention too reaches back `reach` tokens.

    Args:
        dim: width of the tokens.
        dim_head: width of a head, even.
        heads: of queries.
        window: how many tokens before it a token attends to; None for all.
        length: how many tokens full attention reaches back with a state.
        layer: number of the block, which decides the part of a pattern that it has by 'interleave'.
        backend: what windowed attention runs on.
        kv_heads: heads of keys and values, a divisor of `heads`, each of which serves `heads / kv_heads` of queries:
            grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245; 1 is multi-query attention. Query head `i`
            meets head `i % kv_heads`. By default as many as of queries.
        qk_norm: queries and keys have their root mean square brought to one learned gain for each channel (Henry et al.
            2020, arXiv 2010.04245; with a gain as in Dehghani et al. 2023, arXiv 2302.05442).
        pattern: 'strided' or 'fixed': full attention made sparse, near by and far away (Child et al. 2019, arXiv
            1904.10509), in time `O(seq * sqrt(seq))`. Its rotary embeddings are without xPos, so that far
            tokens are heard.
        pattern_mode: what a head has of a pattern: 'interleave', near by in even layers and far away in odd ones;
            'union', both; 'heads', near by in the first half of the heads and far away in the others.
        stride: l of the pattern, the power of two nearest to `sqrt(length)` by default.
        summary: c of the pattern 'fixed', how many tokens at the end of each l are heard far away; by default `l / 8`,
            and no more than 8.

    Raises:
        ValueError: a value is not allowed, or two contradict each other.
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
        self.rotary_emb = Rotary(dim_head, pairs='interleaved' if full else 'halves', xpos=full and pattern is None)
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    @property
    def static_step(self) -> bool:
        """Whether a step's operations are the same at each position."""
        return self.patterns is None

    def find_patterns(
        self, pattern: str, mode: str, stride: int | None, summary: int | None, *, layer: int, length: int
    ) -> list[tuple[slice, dict[str, Any]]]:
        """Which heads attend by what: arguments of `attend_pattern` and `attended`."""
        check_choice('pattern', pattern, PATTERNS)
        check_choice('pattern_mode', mode, MODES)
        if self.window is not None:
            raise ValueError(f'pattern is for full attention, and window_sizes is {self.window}')
        stride = 2 ** round(math.log2(length) / 2) if stride is None else check_int('stride', stride)
        if summary is not None and pattern != 'fixed':
            raise ValueError(f"summary is for pattern = 'fixed', got {summary} for {pattern!r}")
        # a share of the stride would be a share of the sequence: n^2
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
        """Operations of a pass over n tokens, products with weights aside: scores, and sums of values."""
        keys = n / 2 if self.window is None else min(self.window + 1, n / 2)
        if self.patterns is not None:
            # where there are two parts of heads, each has half of them
            found = (keys_of_pattern(n, **settings) for _, settings in self.patterns)
            keys = sum(min(each, n / 2) for each in found) / len(self.patterns)
        return 4 * n * keys * self.groups * self.kv_heads * self.dim_head

    def initial_state(self, batch: int, like: Tensor) -> Cache:
        shape = (batch, self.kv_heads, room_for(0, self.reach + 1), self.dim_head)
        return like.new_zeros(shape), like.new_zeros(shape)

    def with_room(self, cache: Cache, tokens: int) -> Cache:
        """`cache`, `(..., kv_heads, slots, dim_head)` each, with room for that many tokens or the last of them."""
        keys, values = cache
        slots, limit = keys.shape[-2], self.reach + 1
        if slots == limit or tokens <= slots:
            return cache
        return grow(keys, tokens, limit), grow(values, tokens, limit)

    def forward(self, x: Tensor, cache: Cache | None = None, start: int = 0) -> tuple[Tensor, Cache | None]:
        """x: `(batch, seq, dim)`, tokens `start` to `start + seq` of the sequence."""
        # heads of queries fall into groups, each of which meets all heads of keys: (groups + 1, batch, kv_heads, seq,
        # dim_head), keys last, and one of it; split has a gradient of one copy, where slices have one each
        qkv = chain(x, self.norm, self.to_qkv).unflatten(-1, (self.groups + 2, self.kv_heads, -1))
        qk, v = (part.permute(2, 0, 3, 1, 4) for part in qkv.split((self.groups + 1, 1), dim=-3))
        v = v[0]
        if self.qk_norm is not None:
            # under autocast in the dtype of the norm's weight, until it is turned
            qk = self.qk_norm(qk)

        if cache is not None:
            out, cache = self.attend_with_cache(qk, v, self.with_room(cache, start + x.shape[1]), start)
        elif self.window is None and x.shape[1] > self.rotary_emb.reach(v.dtype):
            out = self.attend_far(self.as_rows(qk[:-1]), self.widened(qk[-1]), self.widened(v))
        else:
            qk = self.rotary_emb(qk).to(v.dtype)
            q, k, v = self.as_rows(qk[:-1]), self.widened(qk[-1]), self.widened(v)
            if self.window is None and self.patterns is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = self.attend(q, k, v)

        out = out.unflatten(0, (self.groups, -1)).permute(1, 3, 0, 2, 4).flatten(2)
        return chain(out, self.to_out), cache

    def as_rows(self, q: Tensor) -> Tensor:
        """Each group of queries a row of its own: `(groups * batch, kv_heads, seq, dim_head)`."""
        return q.flatten(0, 1)

    def widened(self, t: Tensor) -> Tensor:
        """Keys or values `(batch, kv_heads, seq, dim_head)`, for each group of queries."""
        return t if self.groups == 1 else t.expand(self.groups, -1, -1, -1, -1).flatten(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
        """Tokens `start` and on, whose keys and values come last among those at hand, to the `reach` before each."""
        if self.patterns is not None:
            outs = [
                attend_pattern(q[:, part], k[:, part], v[:, part], start, **settings, reach=self.reach)
                for part, settings in self.patterns
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return attend_window(q, k, v, self.reach, self.backend)

    def attend_far(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention over more tokens than xPos' factors reach at once.

        q, k: `(batch, heads, seq, dim_head)`, not yet turned; v likewise.

        Each block of queries is an origin of its own, and meets keys as they are seen from there: the decay of those
        too far away comes out as zero, as it should. Blocks are computed again in the backward pass, so that memory
        is a block's.
        """

        def block(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            first, end = keys.shape[-2] - queries.shape[-2], keys.shape[-2]
            rotary = self.rotary_emb
            q = rotary.turn(queries, *(part[0] for part in rotary.factors(queries, first, end - first, origin=first)))
            k = rotary.turn(keys, *(part[1] for part in rotary.factors(keys, 0, end, origin=first)))
            q, k = q.to(values.dtype), k.to(values.dtype)
            seen = torch.arange(end, device=k.device) <= torch.arange(first, end, device=k.device)[:, None]
            return F.scaled_dot_product_attention(q, k, values, attn_mask=seen)

        outs = []
        for first in range(0, q.shape[-2], FAR_BLOCK):
            end = min(first + FAR_BLOCK, q.shape[-2])
            parts = q[:, :, first:end], k[:, :, :end], v[:, :, :end]
            outs.append(recompute(block, [self.rotary_emb], *parts, preserve_rng_state=False))
        return torch.cat(outs, dim=2)

    def attend_with_cache(self, qk: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        outs = []
        lengths = self.rotary_emb.pieces(start, v.shape[-2])
        for piece, values in zip(qk.split(lengths, dim=-2), v.split(lengths, dim=-2), strict=True):
            piece = self.rotary_emb.relative_to_block(piece, start).to(values.dtype)
            out, cache = self.attend_piece(self.as_rows(piece[:-1]), piece[-1], values, cache, start)
            outs.append(out)
            start += values.shape[-2]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-2)), cache

    def attend_piece(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        n, slots = k.shape[-2], cache[0].shape[-2]
        keys, values = self.rotary_emb.next_block(cache[0], start), cache[1]
        in_place = not torch.is_grad_enabled()
        # under autocast a state stays in the dtype of the weights, and what is computed does not
        held = keys.dtype

        recorded = torch.compiler.is_compiling() or isinstance(start, Position)
        if n == 1 and in_place and recorded and self.patterns is None:
            # one graph for every position: nothing but the contents of tensors depends on `start`
            if isinstance(start, Position):
                slot, filled = start.once(('slots', slots, q.dtype), lambda: places(start.tensor, slots, q.dtype))
            else:
                slot = torch.full((1,), start % slots, device=k.device)
                filled = (torch.arange(slots, device=k.device) <= start)[None]
            keys, values = keys.index_copy_(2, slot, k.to(held)), values.index_copy_(2, slot, v.to(held))
            return self.step(q, keys, values, mask=filled), (keys, values)

        if n == 1 and in_place and not recorded:
            keys[:, :, start % slots], values[:, :, start % slots] = k[:, :, 0], v[:, :, 0]
            if self.patterns is None:
                seen = min(start + 1, slots)
                return self.step(q, keys[:, :, :seen], values[:, :, :seen]), (keys, values)
            outs = []
            for part, settings in self.patterns:
                at = torch.tensor(attended(start, **settings, first=max(0, start - self.reach)), device=k.device)
                found = (t[:, part].index_select(2, at % slots) for t in (keys, values))
                outs.append(self.step(q[:, part], *found))
            return torch.cat(outs, dim=1), (keys, values)

        old = torch.arange(max(0, start - slots + 1), start, device=k.device) % slots
        all_keys, all_values = (
            torch.cat((kept.index_select(2, old).to(q.dtype), fresh), dim=2) for kept, fresh in ((keys, k), (values, v))
        )
        out = self.attend(q, self.widened(all_keys), self.widened(all_values), start)

        # only the newest can still be reached by what comes
        new = torch.arange(max(start, start + n - slots), start + n, device=k.device) % slots
        put = Tensor.index_copy_ if in_place else Tensor.index_copy
        k, v = (t[:, :, -len(new) :].to(held) for t in (k, v))
        return out, (put(keys, 2, new, k), put(values, 2, new, v))

    def step(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """One token's queries, to all of these keys: the groups are queries side by side, and no key is repeated."""
        q = q.unflatten(0, (self.groups, -1))[..., 0, :].permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask)
        return out.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]
