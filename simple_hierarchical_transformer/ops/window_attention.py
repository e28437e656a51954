"""Windowed softmax attention with several backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from local_attention import LocalAttention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .tracing import first_of, is_traced

# smaller blocks of queries would mostly be overhead
MIN_BLOCK = 64
# block size of FlexAttention's kernels
FLEX_BLOCK = 128
# for shorter sequences, FlexAttention's kernels do not save the seconds that they take to compile
MIN_FLEX = 1024
# an einops pattern: batch and heads share an axis, and the sequence is cut into blocks
BLOCKS = 'b h (blocks n) d -> (b h) blocks n d'

Backend = Literal['auto', 'sdpa', 'flex', 'local-attention']
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FlexKernel = Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int, backend: Backend = 'auto') -> Tensor:
    """Softmax attention of each token to itself and the `window` tokens before it.

    Time and memory grow as `seq * window`. All backends give the same numbers.

    Args:
        q: `(batch, heads, seq, dim_head)`.
        k: `(batch, heads, past + seq, dim_head)`, where the first `past <= window` tokens precede the sequence.
        v: like `k`.
        window: number of previous tokens.
        backend: 'sdpa' is PyTorch's scaled dot product attention over blocks, 'flex' is FlexAttention,
            'local-attention' is the library of that name. 'auto' selects 'flex' on CUDA for `seq` of at least 1,024,
            otherwise 'sdpa'.

    Returns:
        `(batch, heads, seq, dim_head)`.

    Raises:
        ValueError: 'flex' is used for training on a device other than CUDA.
    """
    if backend == 'auto':
        # the kernel needs at least 16 channels, and has no float64
        is_served = q.is_cuda and q.shape[-1] >= 16 and q.dtype != torch.float64 and q.shape[-2] >= MIN_FLEX
        backend = 'flex' if is_served else 'sdpa'
    if backend == 'flex' and q.is_meta:
        # 'meta' is used to estimate memory, and a fused kernel stores no mask
        return F.scaled_dot_product_attention(q, k, v)
    if backend == 'flex':
        return attend_window_flex(q, k, v, window)
    if backend == 'local-attention':
        return attend_window_local(q, k, v, window)
    return attend_window_sdpa(q, k, v, window)


def attend_window_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`attend_window` over blocks no smaller than the window: keys of a query lie in its block and the previous one."""
    b, _, n, _ = q.shape
    past = k.shape[-2] - n
    block = max(window, MIN_BLOCK)

    # an exported length has no value yet, so blocks must serve every length
    if not isinstance(n, torch.SymInt) and n <= block:
        if past + n - 1 <= window:
            if past == 0:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if n == 1:
                return F.scaled_dot_product_attention(q, k, v)
        distance = torch.arange(past, past + n, device=q.device)[:, None] - torch.arange(past + n, device=q.device)
        band = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    # batch and heads share an axis, and blocks become heads: one mask then serves every row
    blocks = -(-n // block)
    if isinstance(n, torch.SymInt):
        # an exporter would specialize the graph to a single block
        blocks += 1
    tail = blocks * block - n
    q = rearrange(F.pad(q, (0, 0, 0, tail)), BLOCKS, n=block)
    k, v = (with_previous(rearrange(F.pad(t, (0, 0, block - past, tail)), BLOCKS, n=block)) for t in (k, v))

    distance = block_distances(block, q.device)
    band = ((distance >= 0) & (distance <= window)).expand(blocks, -1, -1)
    before_start = (torch.arange(blocks, device=q.device)[:, None] == 0) & (
        torch.arange(-block, block, device=q.device) < -past
    )
    mask = band & ~before_start[:, None]

    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    return first_of(rearrange(out, '(b h) blocks n d -> b h (blocks n) d', b=b), n, dim=2)


def with_previous(blocks: Tensor) -> Tensor:
    """Concatenate each block with the block before it.

    blocks: `(rows, blocks + 1, block, ...)`. The first block only serves as a previous one. Returns
    `(rows, blocks, 2 * block, ...)`.
    """
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2)


def block_distances(block: int, device: torch.device) -> Tensor:
    """The distance of each key of `with_previous` before each query of the block: `(block, 2 * block)`."""
    return torch.arange(block, device=device)[:, None] - torch.arange(-block, block, device=device)


def attend_window_flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`attend_window` by FlexAttention. Dong et al. 2024, arXiv 2412.05496."""
    n, past = q.shape[-2], k.shape[-2] - q.shape[-2]
    if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(f"attn_backend = 'flex' trains only on CUDA, got a model on {q.device.type}")
    if torch.compiler.is_compiling():
        # the mask becomes part of the graph: an exporter's tensors must not enter the cache
        return flex_attention(q, k, v, block_mask=window_mask(n, past, window, q.device))
    # fake tensors must not enter the cache
    make = window_mask if is_traced() else cached_window_mask
    mask = make(n, past, window, q.device)
    if not q.is_cuda:
        return flex_attention(q, k, v, block_mask=mask)
    return compiled_flex(q.dtype, *q.shape[1::2], past > 0, torch.is_grad_enabled())(q, k, v, mask)


def window_mask(n: int, past: int, window: int, device: torch.device, as_tensors: bool = False) -> BlockMask:
    """The band of keys that queries attend to, as a list of blocks. It never holds `n` by `n` values.

    With `as_tensors`, a compiled kernel reads `past` and `window` from memory, and serves all values of both.
    """
    shift, reach = (torch.full((), each, device=device) if as_tensors else each for each in (past, window))

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + shift - j
        return (distance >= 0) & (distance <= reach)

    # a tensor made in inference mode could not be saved for a backward pass
    with torch.inference_mode(False):
        rows, columns = -(-n // FLEX_BLOCK), -(-(past + n) // FLEX_BLOCK)
        begin = torch.arange(rows, device=device, dtype=torch.int32) * FLEX_BLOCK + past
        first = (begin - window).clamp(min=0) // FLEX_BLOCK
        last = (begin + FLEX_BLOCK - 1).clamp(max=past + n - 1) // FLEX_BLOCK
        # the first `last - first + 1` columns of each row count
        indices = (first[:, None] + torch.arange(columns, device=device, dtype=torch.int32)) % columns
        return BlockMask.from_kv_blocks(
            (last - first + 1)[None, None], indices[None, None],
            BLOCK_SIZE=FLEX_BLOCK, mask_mod=band, seq_lengths=(n, past + n),
        )  # fmt: skip


@lru_cache(maxsize=64)
def cached_window_mask(n: int, past: int, window: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):
        return window_mask(n, past, window, device, as_tensors=True)


@lru_cache(maxsize=64)
def compiled_flex(dtype: torch.dtype, heads: int, dim_head: int, has_past: bool, train: bool) -> FlexKernel:
    """FlexAttention, compiled for tensors of this kind, of any length and batch size.

    The compiler falls back to a kernel with `n` by `n` memory for functions that it compiles more than 8 times.
    Therefore lengths are dynamic, each kind of tensors has a separate function, and `fullgraph` forbids the fallback.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask)

    # the compiler counts compilations by code object
    name = f'attend_{str(dtype)[6:]}_{heads}x{dim_head}' + '_past' * has_past + '_train' * train
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, dynamic=True, fullgraph=True)


def attend_window_local(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`attend_window` by the local-attention library. It needs as many queries as keys: zeros stand in for the past."""
    past = k.shape[-2] - q.shape[-2]
    attend = LocalAttention(window_size=window, causal=True, exact_windowsize=True, autopad=True)
    return attend(F.pad(q, (0, 0, past, 0)), k, v)[:, :, past:]
