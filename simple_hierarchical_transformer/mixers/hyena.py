"""Hyena: gates, and convolutions as long as the sequence whose filters a small network makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import MOST_IN_TURN, check_int
from ..memory import grow, keep, room_for
from ..ops.fft_conv import causal_conv, check_fft, conv_products
from ..ops.last_result import LastResult
from ..ops.linear import Part, autocast_dtype, chain, matrix_of
from ..ops.norm import RMSNorm
from .ssm import ShortConv

# how many bands of frequencies a filter's network is told its position by
BANDS = 8
# of the sine that it is activated by, at the beginning
FREQUENCY = 10.0
# the share of the length at which the window of the fastest and of the slowest channel has fallen to the target
DECAY_TARGET, FASTEST, SLOWEST = 1e-2, 0.3, 1.5


class ImplicitFilters(nn.Module):
    """Filters over `length` positions, from a network of the position, under a window that decays.

    `sets` of `filters` each: `(sets, length, filters)`.

    Poli et al. 2023, arXiv 2302.10866, section 3. Each filter's absolute values sum to 1, so that what comes out does
    not grow with the length. They are made in float32 at least, whatever the model and autocast are in.
    """

    def __init__(self, sets: int, filters: int, *, length: int, hidden: int) -> None:
        super().__init__()
        self.sets, self.length = sets, length
        self.to_hidden = nn.ModuleList([nn.Linear(2 * BANDS + 1, hidden), nn.Linear(hidden, hidden)])
        self.frequency = nn.Parameter(torch.full((2, hidden), FREQUENCY))
        self.to_filters = nn.Linear(hidden, sets * filters, bias=False)
        self.kept = LastResult()

    def forward(self) -> Tensor:
        layers: Any = [*self.to_hidden, self.to_filters]
        matrices = [matrix_of(layer) for layer in layers]
        if all(matrix is not None and (matrix[1] is None) == (i == 2) for i, matrix in enumerate(matrices)):
            tensors: Any = [self.frequency, *(t for weight, bias in matrices for t in (weight, bias) if t is not None)]  # type: ignore[misc]
            # steps of generation ask for the same filters again and again
            return self.kept(self.make, tensors)

        def called(layer: nn.Module) -> Part:
            return lambda x: layer(x.to(self.frequency.dtype)).to(x.dtype)

        return self.filters_of(self.frequency, [called(layer) for layer in layers])

    def make(self, frequency: Tensor, first: Tensor, a: Tensor, second: Tensor, b: Tensor, last: Tensor) -> Tensor:
        """The filters of `frequency`, both hidden layers' weights and biases, and the last layer's weight."""

        def mapped(weight: Tensor, bias: Tensor | None = None) -> Part:
            return lambda x: F.linear(x, weight.to(x), None if bias is None else bias.to(x))

        filters = self.filters_of(frequency, [mapped(first, a), mapped(second, b), mapped(last)])
        # a step reads all taps of a set, faster where they lie together
        return filters if torch.is_grad_enabled() else filters.contiguous()

    def filters_of(self, frequency: Tensor, maps: Sequence[Part]) -> Tensor:
        """The filters of `frequency` and the three linear maps of the network."""
        exact: dict[str, Any] = dict(device=frequency.device, dtype=torch.promote_types(frequency.dtype, torch.float32))
        with (
            nullcontext()
            if autocast_dtype(frequency.device) is None
            else torch.autocast(frequency.device.type, enabled=False)
        ):
            t = torch.linspace(0, 1, self.length, **exact)[:, None]
            angles = 2 * math.pi * t * torch.linspace(1e-4, BANDS - 1, BANDS, **exact)
            x = torch.cat((t, angles.cos(), angles.sin()), dim=-1)
            *hidden, to_filters = maps
            for scale, to_hidden in zip(frequency.to(**exact), hidden, strict=True):
                x = torch.sin(scale * to_hidden(x))
            filters = to_filters(x)
            rates = -math.log(DECAY_TARGET) / torch.linspace(SLOWEST, FASTEST, filters.shape[1], **exact)
            filters = filters * torch.exp(-t * rates)
            filters = filters / filters.abs().sum(dim=0, keepdim=True).clamp(min=1e-6)
            return filters.unflatten(1, (self.sets, -1)).movedim(1, 0)


class Hyena(nn.Module):
    """The Hyena operator of order N: `(batch, seq, dim)` to `(batch, seq, dim)`.

        v_1 = v,    v_{n+1} = x_n * (h_n conv v_n + D_n v_n),    y = v_{N+1}

    where v and x_1 to x_N are projections of the tokens, each through a short convolution, and the filters h come from
    `ImplicitFilters`. Poli et al. 2023, arXiv 2302.10866, section 3.

    A filter has `length` taps, so that is how far back a token is heard, with a state too. Time `O(order * seq *
    log(seq) * dim)`, of a step `O(order * length * dim)`. Its state are the inputs of all convolutions, which have no
    shorter summary: `(batch, short - 1, (order + 1) * dim)`, and `order` times `(batch, slots, dim)`. These grow with
    what was read, up to `length - 1` slots (see `state.room_for`), and are rings then.

    Args:
        dim: width of the tokens.
        length: taps of a filter.
        order: N, how many gates and long convolutions follow each other.
        short: taps of the short convolution.
        filter_dim: hidden width of the network that makes the filters.
        fft: what convolutions run on, 'torch' or 'monarch': see `causal_conv`.
    """

    # what a step reads depends on its position
    static_step = False
    roles: ClassVar[Mapping[str, str]] = dict(short_conv='kernel', filters='kernel')

    def __init__(
        self,
        *,
        dim: int,
        length: int = 2048,
        order: int = 2,
        short: int = 3,
        filter_dim: int = 64,
        fft: Literal['torch', 'monarch'] = 'torch',
    ) -> None:
        super().__init__()
        self.order, self.length = check_int('order', order, maximum=MOST_IN_TURN), length
        self.fft = check_fft(fft)
        self.norm = RMSNorm(dim)
        self.to_in = nn.Linear(dim, (order + 1) * dim, bias=False)
        self.short_conv = ShortConv((order + 1) * dim, check_int('short', short))
        self.filters = ImplicitFilters(order, dim, length=length, hidden=check_int('filter_dim', filter_dim))
        self.skip_bias = nn.Parameter(torch.randn(order, dim))
        self.to_out = nn.Linear(dim, dim, bias=False)

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside: convolutions, short and long."""
        long = self.order * conv_products(n, self.skip_bias.shape[1], self.fft)
        return long + 2 * n * self.short_conv.kernel.numel()

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        dim = self.skip_bias.shape[1]
        slots = room_for(0, self.length - 1)
        long = (like.new_zeros(batch, slots, dim) for _ in range(self.order))
        return self.short_conv.initial_state(batch, like), *long

    def with_room(self, state: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
        """`state` with room for that many tokens or the last of them; phases may lead its tensors."""
        return state[0], *(grow(ring, tokens, self.length - 1) for ring in state[1:])

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        held: list[Tensor | None] = [None] * (1 + self.order)
        if state is not None:
            held = list(self.with_room(state, start + x.shape[1]))
        joined, held[0] = self.short_conv(chain(x, self.norm, self.to_in), held[0])
        v, *gates = joined.chunk(self.order + 1, dim=-1)
        filters = self.filters().unbind()
        for n, (gate, taps, bias) in enumerate(zip(gates, filters, self.skip_bias, strict=True), 1):
            mixed, held[n] = self.long_conv(v, taps, held[n], start)
            v = gate * (mixed + bias * v)
        return chain(v, self.to_out), None if state is None else tuple(held)  # type: ignore[arg-type]

    def long_conv(self, v: Tensor, taps: Tensor, ring: Tensor | None, start: int) -> tuple[Tensor, Tensor | None]:
        """The convolution of a chunk, and the last inputs that the chunks to come still hear of, the oldest to be
        overwritten next: token `t` in slot `t % slots`. A ring that has yet to grow holds all tokens so far.
        """
        if ring is None:
            return causal_conv(v, taps, self.fft), None
        slots, n = ring.shape[1], v.shape[1]
        if not slots:
            return v * taps[0].to(v.dtype), ring
        oldest = start % slots
        if n == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the oldest comes first, and meets the last tap
            of_old, of_new = taps[1 : slots + 1].flip(0).to(v.dtype).split((slots - oldest, oldest))
            mixed = (ring[:, oldest:] * of_old).sum(dim=1) + (ring[:, :oldest] * of_new).sum(dim=1)
            mixed = mixed + v[:, 0] * taps[0].to(v.dtype)
            ring[:, oldest] = v[:, 0]
            return mixed[:, None].to(v.dtype), ring
        heard = torch.cat((ring.roll(-oldest, dims=1).to(v.dtype), v), dim=1)
        mixed = causal_conv(heard, taps, self.fft)[:, -n:]
        return mixed, keep(ring, heard[:, n:].roll((start + n) % slots, dims=1))
