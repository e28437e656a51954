"""Compressors: from token embeddings to a level's tokens.

A level token depends only on the tokens in its window, which ends at its position. So every kind of compressor is
causal. Its state holds the earlier tokens that later windows contain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_output
from .levels import Grid, Level
from .memory import keep
from .ops.linear import Part, chain, is_plain, matrix_of, register_plain


class Source(NamedTuple):
    """The tokens that a level's compressor reads."""

    dim_in: int
    """Their width."""
    taps: int
    """The number of tokens in a window."""
    stride: int
    """The number of tokens from one window to the next."""
    dilation: int = 1
    """The number of tokens from one tap of a window to the next."""


@register_plain
class Windows(nn.Module):
    """The window of each token whose index is a multiple of `stride`: `taps` tokens, `dilation` apart, that end there.

    x: `(batch, before + seq, dim)`, the `before = (taps - 1) * dilation` tokens before the sequence, and the sequence.
    Token `offset` of the sequence is the first one with a window. Returns `(batch, ceil((seq - offset) / stride), dim *
    taps)`. `unfolded` returns a view, `(batch, ceil((seq - offset) / stride), dim, taps)`.
    """

    def __init__(self, taps: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.taps = taps
        self.stride = stride
        self.dilation = dilation
        self.before = (taps - 1) * dilation

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return self.unfolded(x, offset).flatten(2)

    def unfolded(self, x: Tensor, offset: int = 0) -> Tensor:
        return x[:, offset:].unfold(1, self.before + 1, self.stride)[..., :: self.dilation]

    def indices(self, count: int, offset: int, device: torch.device) -> Tensor:
        """The indices in x of the tokens of the first `count` windows: `(count, taps)`."""
        first = torch.arange(count, device=device) * self.stride + offset
        return first[:, None] + torch.arange(self.taps, device=device) * self.dilation


@register_plain
class WindowConv(nn.Module):
    """A convolution over windows of `kernel` tokens, under the published package's name `conv`."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv1d(dim_in, dim_out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, by_window(self.conv, self.kernel))


def by_window(conv: nn.Module, taps: int) -> Part:
    """A Conv1d as a part of a `chain`: windows `(batch, windows, dim * taps)` to `(batch, windows, dim_out)`.

    A plain Conv1d runs as one matrix product, because the backward pass of a strided conv1d is very slow on a CPU. Any
    other module is called with all windows as a batch, `(batch * windows, dim, taps)`.
    """
    if matrix_of(conv) is not None:
        return conv
    return lambda x: conv(x.flatten(0, 1).unflatten(1, (-1, taps)))[..., 0].unflatten(0, x.shape[:2])


# The kinds of pooling. Each maps (x, offset, absent), with x and offset as for `Windows` and `absent` the number of
# tokens at the beginning of x that stand before the first, to `(batch, ceil((seq - offset) / stride), dim)`.


class ConvPool(nn.Sequential):
    """The published package's compressor: a convolution to four times the width, SiLU, and a projection."""

    def __init__(self, windows: Windows, dim_in: int, dim: int) -> None:
        inner = 4 * dim_in
        super().__init__(windows, WindowConv(dim_in, inner, windows.taps), nn.SiLU(), nn.Conv1d(inner, dim, 1))

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:  # type: ignore[override]
        # a user may have inserted modules after the activation
        windows, to_inner, *between, to_dim = cast(Any, self)
        conv = by_window(to_inner.conv, to_inner.kernel) if is_plain(to_inner) else to_inner
        return chain(x, partial(windows, offset=offset), conv, *between, by_window(to_dim, 1))


class LinearPool(nn.Module):
    """One linear map of the window."""

    def __init__(self, windows: Windows, dim_in: int, dim: int) -> None:
        super().__init__()
        self.windows = windows
        self.proj = nn.Linear(dim_in * windows.taps, dim, bias=False)

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:
        return chain(x, partial(self.windows, offset=offset), self.proj)


class MeanPool(nn.Module):
    """The mean of the window, projected to the level's width if that differs.

    Positions before the first token count as zeros. The norm that follows in the model rescales the result to the mean
    over existing tokens, up to its eps.
    """

    def __init__(self, windows: Windows, dim_in: int, dim: int) -> None:
        super().__init__()
        self.windows = windows
        self.proj: nn.Module = nn.Identity() if dim_in == dim else nn.Linear(dim_in, dim, bias=False)

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:
        return chain(self.windows.unfolded(x, offset).mean(dim=-1), self.proj)


class AttentionPool(nn.Module):
    """Learned queries, one for each head, attend to the tokens of the window, with a learned bias for each tap.

    Only the product of a learned query and the key matrix matters. So the parameter is that product, which gives one
    score for each head and token. A pass computes scores and values once for each token, not once for each window. With
    a state, it recomputes those of the tokens before the chunk. This is Perceiver's cross-attention on a window:
    Jaegle et al. 2021, arXiv 2103.03206.
    """

    def __init__(self, windows: Windows, dim_in: int, dim: int, *, heads: int, dim_head: int) -> None:
        super().__init__()
        self.windows = windows
        self.heads = heads
        inner = heads * dim_head
        self.to_scores = nn.Linear(dim_in, heads, bias=False)
        self.place_bias = nn.Parameter(torch.zeros(heads, windows.taps))
        self.to_values = nn.Linear(dim_in, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        """Scores and values are computed for every finer token."""
        yield from ((part, n * self.windows.stride) for part in (self.to_scores, self.to_values))

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:
        scores = self.windows.unfolded(chain(x, self.to_scores), offset)
        exists = self.windows.indices(scores.shape[1], offset, x.device) >= absent
        scores = (scores + self.place_bias).masked_fill(~exists[:, None], -torch.inf)
        values = self.windows.unfolded(chain(x, self.to_values), offset).unflatten(2, (self.heads, -1))
        weights = scores.softmax(dim=-1).to(values.dtype)
        # tap by tap on views, because a single product would copy every window
        places = zip(values.unbind(dim=-1), weights.unbind(dim=-1), strict=True)
        pooled: Any = sum(value * weight[..., None] for value, weight in places)
        return chain(pooled.flatten(2), self.to_out)


class ModulePool(nn.Module):
    """A user's module: windows `(windows, taps, dim_in)`, oldest token first, to `(windows, dim)`.

    Its rows are all windows of all sequences. It is causal if it treats each row separately.
    """

    def __init__(self, windows: Windows, dim: int, module: nn.Module) -> None:
        super().__init__()
        self.windows = windows
        self.dim = dim
        self.module = module

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:
        windows = self.windows.unfolded(x, offset).transpose(2, 3)
        rows = windows.flatten(0, 1)
        out = check_output('compressor', self.module(rows), (rows.shape[0], self.dim), rows)
        return out.unflatten(0, windows.shape[:2])


def pool(
    fn: nn.Module, windows: Windows, dim: int, x: Tensor, state: Tensor | None, position: int
) -> tuple[Tensor, Tensor | None]:
    """Applies `fn`, one of the kinds above, to tokens x `(batch, seq, dim_in)`, the first of index `position`.

    Returns the pooled tokens whose windows end in the chunk, `(batch, ceil(seq / windows.stride), dim)` at position 0,
    and the next state. The state holds the last `windows.before` tokens. Without a state, zeros precede the sequence
    and nothing is kept.
    """
    padded = F.pad(x, (0, 0, windows.before, 0)) if state is None else torch.cat((state, x), dim=1)
    offset = Grid(windows.stride).offset(position)
    # a short chunk may contain no end of a window
    tokens = (
        fn(padded, offset, max(windows.before - position, 0))
        if offset < x.shape[1]
        else x.new_empty(x.shape[0], 0, dim)
    )
    return tokens, keep(state, padded[:, -windows.before :])


class Compressor(nn.Module):
    """Pools finer tokens into a level's tokens: token `j` depends on the window that ends at index `j * stride`.

    It maps `(batch, seq, dim_in)` to `(batch, ceil(seq / stride), level.dim)` by the kind of pooling that the level
    names. A window of one token is returned unchanged, or projected if the widths differ.

    With `num_tokens`, `to_recon` maps a level token to `compression * num_tokens` logits, one set for each id in its
    window.

    Args:
        level: the level.
        dim_in: the width of the finer tokens.
        taps: the number of finer tokens in a window. Default: the level's compression.
        stride: the number of finer tokens from one level token to the next. Default: the level's stride.
        dilation: the number of finer tokens from one tap to the next.
        module: a user's module that pools, in place of the kind that the level names.
        num_tokens: the size of the vocabulary, if ids are to be reconstructed.
    """

    roles: ClassVar[Mapping[str, str]] = dict(to_recon='head')

    def __init__(
        self,
        level: Level,
        *,
        dim_in: int,
        taps: int | None = None,
        stride: int | None = None,
        dilation: int = 1,
        module: nn.Module | None = None,
        num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        windows = Windows(
            level.compression if taps is None else taps, level.stride if stride is None else stride, dilation
        )
        self.dim_in, self.dim = dim_in, level.dim
        self.windows = windows
        # a window of one token needs no pooling
        self.pools = module is not None or windows.taps > 1
        self.compress_fn: nn.Module

        if module is not None:
            self.compress_fn = ModulePool(windows, level.dim, module)
        elif windows.taps == 1:
            self.compress_fn = nn.Identity() if level.dim == dim_in else nn.Linear(dim_in, level.dim, bias=False)
        elif level.compressor == 'attention':
            self.compress_fn = AttentionPool(windows, dim_in, level.dim, heads=level.heads, dim_head=level.dim_head)
        else:
            pools = {'conv': ConvPool, 'linear': LinearPool, 'mean': MeanPool}
            self.compress_fn = pools[level.compressor](windows, dim_in, level.dim)

        reconstructs = num_tokens is not None and level.compression > 1
        self.to_recon = nn.Linear(level.dim, level.compression * num_tokens, bias=False) if reconstructs else None  # type: ignore[operator]

    def forward(self, x: Tensor, state: Tensor | None = None, position: int = 0) -> tuple[Tensor, Tensor | None]:
        """Finer tokens x `(batch, seq, dim_in)`, the first of index `position`, to level tokens; see `pool`."""
        if not self.pools:
            stride = self.windows.stride
            return chain(x[:, Grid(stride).at(position)], self.compress_fn), None
        return pool(self.compress_fn, self.windows, self.dim, x, state, position)


class Autoencoder(nn.Module):
    """A causal convolutional encoder whose feature maps feed the levels, and a decoder that trains it.

    The feature map of compression `c` is a dilated convolution over the next finer map. The dilation is the receptive
    field of that map, so a token of the new map depends on the embeddings of `c` positions, as in WaveNet (van den Oord
    et al. 2016, arXiv 1609.03499). Maps have the width of the embeddings. Their stride is the smallest that this or a
    coarser level needs.

    The decoder mirrors the encoder: it reconstructs from each `c`-th token of the coarsest map the `c` ids in its
    receptive field.
    """

    roles: ClassVar[Mapping[str, str]] = dict(to_ids='head')

    def __init__(self, levels: Sequence[Level], *, dim: int, num_tokens: int | None) -> None:
        super().__init__()
        self.dim = dim
        self.order = sorted(range(len(levels)), key=lambda i: levels[i].compression)
        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        # the stride of each level's map
        self.grids: dict[int, int] = {}
        self.compressions: dict[int, int] = {}

        finer, grid = 1, 1
        for place, i in enumerate(self.order):
            c = levels[i].compression
            taps, dilation = c // finer, finer // grid
            if taps > 1:
                dense = min(levels[j].stride for j in self.order[place:])
                self.encoders[str(i)] = LinearPool(Windows(taps, dense // grid, dilation), dim, dim)
                if num_tokens is not None:
                    self.decoders[str(i)] = nn.Linear(dim, taps * dim)
                grid = dense
            self.grids[i], finer = grid, c
            self.compressions[i] = c
        self.coarsest = finer
        self.to_ids = None if num_tokens is None else nn.Linear(dim, num_tokens, bias=False)

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        """How many tokens each part processes when the model reads n ids."""
        for i in self.order:
            if str(i) in self.encoders:
                yield self.encoders[str(i)], n / self.grids[i]
            if str(i) in self.decoders:
                # it splits each token of the map of its level
                yield self.decoders[str(i)], n / self.compressions[i]

    def sources(self, levels: Sequence[Level]) -> list[Source]:
        """The source of each level's compressor. A token of a map has the whole window."""
        return [Source(self.dim, 1, level.stride // self.grids[i]) for i, level in enumerate(levels)]

    def forward(
        self, embeds: Tensor, states: Sequence[Tensor | None], position: int
    ) -> tuple[dict[int, Tensor], list[Tensor | None]]:
        """Each level's feature map of embeddings `(batch, n, dim)`, the first at `position`; and the next states.

        A level's state holds the last tokens of the finer map that later windows still contain.
        """
        x, grid, maps, kept = embeds, 1, {}, list(states)
        for i in self.order:
            if str(i) in self.encoders:
                encode: Any = self.encoders[str(i)]
                x, kept[i] = pool(encode, encode.windows, x.shape[-1], x, states[i], Grid(grid).count(position))
                x, grid = F.silu(x), self.grids[i]
            maps[i] = x
        return maps, kept

    def decode(self, x: Tensor, position: int) -> Tensor:
        """Decodes the coarsest map x of a chunk at `position` to vectors of ids, `(batch, ids, dim)`, for `to_ids`."""
        grid = self.grids[self.order[-1]]
        step = self.coarsest // grid
        x = x[:, Grid(step).at(Grid(grid).count(position))]
        for i in reversed(self.order):
            if str(i) in self.decoders:
                x = F.silu(chain(x, self.decoders[str(i)])).unflatten(-1, (-1, x.shape[-1])).flatten(1, 2)
        return x
