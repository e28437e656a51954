"""Causal softmax attention, over everything before or over a window."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from local_attention import LocalAttention
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from ..linear import Linear
from ..norm import RMSNorm
from .rotary import Rotary

# a block of fewer queries than this spends its time on overhead
MIN_BLOCK = 64
# FlexAttention's own
FLEX_BLOCK = 128
# queries at a time, where full attention goes by blocks
FAR_BLOCK = 1024

Cache = tuple[Tensor, Tensor]
Backend = Literal['auto', 'sdpa', 'flex', 'local-attention']
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int, backend: Backend = 'auto') -> Tensor:
    """Softmax attention of each token to itself and the `window` tokens before it.

    q and the result: `(batch, heads, seq, dim_head)`; k, v: `(batch, heads, past + seq, dim_head)`, where the first
    `past <= window` belong to tokens before the sequence. Time and memory grow as `seq * window`.

    All backends give the same numbers. 'auto' takes 'flex' for what it serves on CUDA, else 'sdpa'.

    Raises ValueError where 'flex' would have to train on another device.
    """
    if backend == 'auto':
        # the kernel's products want 16 channels, and no float64
        serves = q.is_cuda and q.shape[-1] >= 16 and q.dtype != torch.float64
        backend = 'flex' if serves else 'sdpa'
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

    if n <= block:
        if past + n - 1 <= window and (past == 0 or n == 1):
            return F.scaled_dot_product_attention(q, k, v, is_causal=n > 1)
        distance = torch.arange(past, past + n, device=q.device)[:, None] - torch.arange(past + n, device=q.device)
        band = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    # batch and heads fold into one axis, blocks take the place of heads: one mask then serves every row
    blocks = -(-n // block)
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
    return out.reshape(b, h, blocks * block, d)[:, :, :n]


def attend_window_flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlexAttention: Dong et al. 2024, arXiv 2412.05496."""
    n, past = q.shape[-2], k.shape[-2] - q.shape[-2]
    if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(f"attn_backend = 'flex' trains on CUDA alone, got a model on {q.device.type}")
    mask = window_mask(n, past, window, q.device)
    # a compiled model has it compiled along
    attend = compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return attend(q, k, v, block_mask=mask)


@lru_cache(maxsize=64)
def window_mask(n: int, past: int, window: int, device: torch.device) -> BlockMask:
    """The band, block by block: never `n` by `n`."""

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + past - j
        return (distance >= 0) & (distance <= window)

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


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    return torch.compile(flex_attention)


def attend_window_local(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The local-attention library, which knows no past: queries are made up for it, and left out after."""
    past = k.shape[-2] - q.shape[-2]
    attend = LocalAttention(window_size=window, causal=True, exact_windowsize=True, autopad=True)
    return attend(F.pad(q, (0, 0, past, 0)), k, v)[:, :, past:]


class Attention(nn.Module):
    """Multi-head causal attention with its pre-norm. `(batch, seq, dim)` to `(batch, seq, dim)`.

    `window = None` attends to everything before: RMSNorm, rotary embeddings with xPos over interleaved pairs.
    `window = w` attends to the token and the `w` before it: LayerNorm, rotary embeddings over halves, the
    conventions of local-attention's `LocalMHA`. Vaswani et al. 2017, arXiv 1706.03762.

    Time `O(seq * min(seq, window))`, memory `O(seq)` or `O(seq * window)`.

    Its state are the keys and values of the last tokens, each `(batch, heads, reach + 1, dim_head)`, a ring in which
    token `r` stands in slot `r % (reach + 1)`. With a state, full attention too reaches back `reach` tokens.
    """

    def __init__(
        self, *, dim: int, dim_head: int = 64, heads: int = 8, window: int | None = None, backend: Backend = 'auto'
    ) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.window = window

        inner = dim_head * heads
        full = window is None
        self.norm = RMSNorm(dim) if full else nn.LayerNorm(dim)
        self.rotary_emb = Rotary(dim_head, pairs='interleaved' if full else 'halves', xpos=full)
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None, start: int = 0) -> tuple[Tensor, Cache | None]:
        """x: `(batch, seq, dim)`, tokens `start` to `start + seq` of the sequence."""
        # (2, batch, heads, seq, dim_head) and one of it; split has a gradient of one copy, where slices have one each
        qkv = self.to_qkv(x, after=self.norm).unflatten(-1, (3, self.heads, -1))
        qk, v = (part.permute(2, 0, 3, 1, 4) for part in qkv.split((2, 1), dim=-3))
        v = v[0]

        if cache is not None:
            out, cache = self.attend_with_cache(qk, v, cache, start)
        elif self.window is None and x.shape[1] > self.rotary_emb.reach(v.dtype):
            out = self.attend_far(qk[0], qk[1], v)
        else:
            q, k = self.rotary_emb(qk)
            if self.window is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = attend_window(q, k, v, self.window, self.backend)

        return self.to_out(out.transpose(1, 2).flatten(2)), cache

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
            seen = torch.arange(end, device=k.device) <= torch.arange(first, end, device=k.device)[:, None]
            return F.scaled_dot_product_attention(q, k, values, attn_mask=seen)

        outs = []
        for first in range(0, q.shape[-2], FAR_BLOCK):
            end = min(first + FAR_BLOCK, q.shape[-2])
            parts = q[:, :, first:end], k[:, :, :end], v[:, :, :end]
            outs.append(checkpoint(block, *parts, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(outs, dim=2)

    def attend_with_cache(self, qk: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        outs = []
        lengths = self.rotary_emb.pieces(start, v.shape[-2])
        for piece, values in zip(qk.split(lengths, dim=-2), v.split(lengths, dim=-2), strict=True):
            q, k = self.rotary_emb.relative_to_block(piece, start)
            out, cache = self.attend_piece(q, k, values, cache, start)
            outs.append(out)
            start += values.shape[-2]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-2)), cache

    def attend_piece(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: int) -> tuple[Tensor, Cache]:
        n, slots = k.shape[-2], cache[0].shape[-2]
        keys, values = self.rotary_emb.next_block(cache[0], start), cache[1]
        in_place = not torch.is_grad_enabled()
        # under autocast a state stays in the dtype of the weights, and what is computed does not
        held = keys.dtype

        if n == 1 and in_place and torch.compiler.is_compiling():
            # one graph for every position: nothing but the contents of tensors hangs on `start`
            slot = torch.full((1,), start % slots, device=k.device)
            keys, values = keys.index_copy_(2, slot, k.to(held)), values.index_copy_(2, slot, v.to(held))
            filled = torch.arange(slots, device=k.device) <= start
            out = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=filled[None])
            return out, (keys, values)

        if n == 1 and in_place:
            keys[:, :, start % slots], values[:, :, start % slots] = k[:, :, 0], v[:, :, 0]
            seen = min(start + 1, slots)
            out = F.scaled_dot_product_attention(q, keys[:, :, :seen].to(q.dtype), values[:, :, :seen].to(q.dtype))
            return out, (keys, values)

        old = torch.arange(max(0, start - slots + 1), start, device=k.device) % slots
        all_keys, all_values = (
            torch.cat((kept.index_select(2, old).to(q.dtype), fresh), dim=2) for kept, fresh in ((keys, k), (values, v))
        )
        out = attend_window(q, all_keys, all_values, slots - 1, self.backend)

        # only the newest can still be reached by what comes
        new = torch.arange(max(start, start + n - slots), start + n, device=k.device) % slots
        put = Tensor.index_copy_ if in_place else Tensor.index_copy
        k, v = (t[:, :, -len(new) :].to(held) for t in (k, v))
        return out, (put(keys, 2, new, k), put(values, 2, new, v))
