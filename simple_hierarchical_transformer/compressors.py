"""From token embeddings to a level's tokens.

Whatever the kind, a level token is a function of the few tokens that it sums up: its window, of which it is the last.
So each is causal, and its state is the tokens that the windows to come still reach back to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_output
from .levels import Level
from .memory import keep
from .ops.linear import Part, chain, is_plain, matrix_of, register_plain


class Source(NamedTuple):
    """The tokens that a level's compressor reads."""

    dim_in: int
    """Their width."""
    taps: int
    """The number of them in a window."""
    stride: int
    """The number of them from one window to the next."""
    dilation: int = 1
    """The number of them from one tap of a window to the next."""


@register_plain
class Windows(nn.Module):
    """The `taps` tokens, `dilation` apart, that end at each token whose index is a multiple of `stride`.

    x: `(batch, before + seq, dim)`, the `before = (taps - 1) * dilation` tokens before the sequence and the sequence,
    of which token `offset` is the first with a window. Returns `(batch, ceil((seq - offset) / stride), dim * taps)`;
    `unfolded` is a view, `(batch, ceil((seq - offset) / stride), dim, taps)`.
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
        """Where in x the tokens of the first `count` windows stand: `(count, taps)`."""
        first = torch.arange(count, device=device) * self.stride + offset
        return first[:, None] + torch.arange(self.taps, device=device) * self.dilation


@register_plain
class WindowConv(nn.Module):
    """Holds the convolution `conv` over windows of `kernel` tokens, under the published package's name."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv1d(dim_in, dim_out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, by_window(self.conv, self.kernel))


def by_window(conv: nn.Module, taps: int) -> Part:
    """A Conv1d as a part of a `chain`: windows `(batch, windows, dim * taps)` to `(batch, windows, dim_out)`.

    A plain one runs as one matmul, because the backward of a strided conv1d is very slow on a CPU. Any other is called
    with all windows as a batch, `(batch * windows, dim, taps)`.
    """
    if matrix_of(conv) is not None:
        return conv
    return lambda x: conv(x.flatten(0, 1).unflatten(1, (-1, taps)))[..., 0].unflatten(0, x.shape[:2])


# The kinds of compressing. Each maps (x, offset, absent), x and offset as for `Windows` and `absent` the number of
# tokens at the beginning of x that stand before the first, to `(batch, ceil((seq - offset) / stride), dim)`.


class ConvPool(nn.Sequential):
    """A convolution to four times the width, SiLU, and a projection: the published package's compressor."""

    def __init__(self, windows: Windows, dim_in: int, dim: int) -> None:
        inner = 4 * dim_in
        super().__init__(windows, WindowConv(dim_in, inner, windows.taps), nn.SiLU(), nn.Conv1d(inner, dim, 1))

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:  # type: ignore[override]
        # anything may have been inserted after the activation
        windows, to_inner, *between, to_dim = cast(Any, self)
        conv = by_window(to_inner.conv, to_inner.kernel) if is_plain(to_inner) else to_inner
        return chain(x, partial(windows, offset=offset), conv, *between, by_window(to_dim, 1))


class LinearPool(nn.Module):
    """One linear map of the window: a convolution and no more."""

    def __init__(self, windows: Windows, dim_in: int, dim: int) -> None:
        super().__init__()
        self.windows = windows
        self.proj = nn.Linear(dim_in * windows.taps, dim, bias=False)

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:
        return chain(x, partial(self.windows, offset=offset), self.proj)


class MeanPool(nn.Module):
    """The mean of the window, brought to the level's width.

    What stands before the first token counts as zeros. The norm that follows in the model makes a mean over those
    that exist of it, up to its eps.
    """

    def __init__(self, windows: Windows, dim_in: int, dim: int) -> None:
        super().__init__()
        self.windows = windows
        self.proj: nn.Module = nn.Identity() if dim_in == dim else nn.Linear(dim_in, dim, bias=False)

    def forward(self, x: Tensor, offset: int, absent: int) -> Tensor:
        return chain(self.windows.unfolded(x, offset).mean(dim=-1), self.proj)


class AttentionPool(nn.Module):
    """Learned queries, one a head, attend over the tokens of the window, with a learned bias for each place in it.

    Of a learned query and the matrix of the keys only the product matters, so that is what is learnt: a score for
    each head and token. In a pass scores and values are formed once a token and not once a window; with a state, the
    tokens before the chunk have theirs formed again. Perceiver's cross-attention, with a window for its input: Jaegle
    et al. 2021, arXiv 2103.03206.
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
        # place by place from views, where a product would copy every window
        places = zip(values.unbind(dim=-1), weights.unbind(dim=-1), strict=True)
        pooled: Any = sum(value * weight[..., None] for value, weight in places)
        return chain(pooled.flatten(2), self.to_out)


class ModulePool(nn.Module):
    """A module from outside: windows `(windows, taps, dim_in)`, oldest token first, to `(windows, dim)`.

    It is given all windows of all sequences in a row, and has no way of telling which of them belong together: as long
    as it treats each row by itself, it is causal.
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
    """What `fn`, one of the kinds above, makes of tokens `(batch, seq, dim_in)`, the first of index `position`.

    That is `(batch, ceil(seq / windows.stride), dim)`, or as many as end in the chunk.

    The state is the `windows.before` tokens that came before, and comes back as those that do for what follows; where
    there is none, zeros stand before the sequence and nothing is kept.
    """
    padded = F.pad(x, (0, 0, windows.before, 0)) if state is None else torch.cat((state, x), dim=1)
    offset = -position % windows.stride
    # where no window ends, there is nothing to do
    tokens = (
        fn(padded, offset, max(windows.before - position, 0))
        if offset < x.shape[1]
        else x.new_empty(x.shape[0], 0, dim)
    )
    return tokens, keep(state, padded[:, -windows.before :])


class Compressor(nn.Module):
    """Makes a level's tokens of finer ones: token `j` sees those of index `j * stride` and before, in its window.

    `(batch, seq, dim_in)` to `(batch, ceil(seq / stride), level.dim)`, by the kind of pooling that the level names. A
    window of one token is kept, or projected where the widths differ.

    With `num_tokens`, `to_recon` maps a level token to `compression * num_tokens` logits, one set for each id that it
    sums up.

    Args:
        level: whose tokens.
        dim_in: width of the finer tokens.
        taps: how many of them a window has; the level's compression by default, where they are embeddings.
        stride: how many of them level tokens stand apart; the level's stride by default.
        dilation: how many of them a window's tokens stand apart.
        module: what pools, where the level names none.
        num_tokens: size of the vocabulary, where ids are to be reconstructed.
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
        # a window of one token is mapped by itself
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
        """Tokens `(batch, seq, dim_in)`, the first of index `position`; the state is those before, as for `pool`."""
        if not self.pools:
            stride = self.windows.stride
            return chain(x[:, -position % stride :: stride], self.compress_fn), None
        return pool(self.compress_fn, self.windows, self.dim, x, state, position)


class Autoencoder(nn.Module):
    """A causal convolutional encoder whose feature maps feed the levels, finer to coarser, and a decoder to train it.

    The map of compression `c` is a convolution over the map of the level before, whose taps are as far apart as that
    one's tokens reach back: so a token of it sees the embeddings of `c` positions, as in WaveNet (van den Oord et al.
    2016, arXiv 1609.03499). Maps have the embeddings' width, and are computed no denser than a level to come asks for.

    The decoder mirrors it: of each `c`-th token of the coarsest map it makes the `c` ids that this one has seen.
    """

    roles: ClassVar[Mapping[str, str]] = dict(to_ids='head')

    def __init__(self, levels: Sequence[Level], *, dim: int, num_tokens: int | None) -> None:
        super().__init__()
        self.dim = dim
        self.order = sorted(range(len(levels)), key=lambda i: levels[i].compression)
        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        # how far apart the tokens of each level's map stand
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
                # it splits each token of its level's map
                yield self.decoders[str(i)], n / self.compressions[i]

    def sources(self, levels: Sequence[Level]) -> list[Source]:
        """The source of each level's compressor. A token of a map has the whole window."""
        return [Source(self.dim, 1, level.stride // self.grids[i]) for i, level in enumerate(levels)]

    def forward(
        self, embeds: Tensor, states: Sequence[Tensor | None], position: int
    ) -> tuple[dict[int, Tensor], list[Tensor | None]]:
        """Embeddings `(batch, n, dim)` that begin at `position` to each level's map, and the states after them.

        A level's state are the tokens of the finer map that its windows still reach back to.
        """
        x, grid, maps, kept = embeds, 1, {}, list(states)
        for i in self.order:
            if str(i) in self.encoders:
                encode: Any = self.encoders[str(i)]
                x, kept[i] = pool(encode, encode.windows, x.shape[-1], x, states[i], -(-position // grid))
                x, grid = F.silu(x), self.grids[i]
            maps[i] = x
        return maps, kept

    def decode(self, x: Tensor, position: int) -> Tensor:
        """The coarsest map, of a chunk that begins at `position`, to what ids are read off: `(batch, ids, dim)`."""
        grid = self.grids[self.order[-1]]
        apart = self.coarsest // grid
        x = x[:, (-position // grid) % apart :: apart]
        for i in reversed(self.order):
            if str(i) in self.decoders:
                x = F.silu(chain(x, self.decoders[str(i)])).unflatten(-1, (-1, x.shape[-1])).flatten(1, 2)
        return x
