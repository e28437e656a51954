"""Hyena: gates, and convolutions as long as the sequence, with filters that a small network computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import MOST_IN_TURN, check_int
from ..memory import grow, keep, room_for
from ..ops.fft_conv import causal_conv, check_fft, conv_products
from ..ops.linear import Part, chain, matrix_of
from ..ops.norm import RMSNorm
from ..ops.precision import no_autocast
from ..ops.result_cache import ResultCache
from .base import MixerState
from .short_conv import ShortConv

# number of frequency bands in the positional encoding of a filter's network
BANDS = 8
# initial frequency of the sine activation
FREQUENCY = 10.0
# the decay windows of the fastest and the slowest channel reach the target at these shares of the length
DECAY_TARGET, FASTEST, SLOWEST = 1e-2, 0.3, 1.5


class ImplicitFilters(nn.Module):
    """Filters over `length` positions: a network of the position, times a decaying window.

    Returns `(sets, length, filters)`. The absolute values of each filter sum to 1, so that outputs do not grow with the
    length. Filters are computed in float32 or float64, whatever the dtype of the model and of autocast. Poli et al.
    2023, arXiv 2302.10866, section 3.

    Args:
        sets: number of convolutions.
        filters: number of filters of each.
        length: number of positions.
        hidden: width of the network.
    """

    def __init__(self, sets: int, filters: int, *, length: int, hidden: int) -> None:
        super().__init__()
        self.sets, self.length = sets, length
        self.to_hidden = nn.ModuleList([nn.Linear(2 * BANDS + 1, hidden), nn.Linear(hidden, hidden)])
        self.frequency = nn.Parameter(torch.full((2, hidden), FREQUENCY))
        self.to_filters = nn.Linear(hidden, sets * filters, bias=False)
        self.cache = ResultCache()

    def forward(self) -> Tensor:
        layers: list[nn.Module] = [*self.to_hidden, self.to_filters]
        weights = self.plain_weights(layers)
        if weights is not None:
            # all steps of generation use the same filters
            return self.cache(self.filters_from_weights, weights)

        def called(layer: nn.Module) -> Part:
            return lambda x: layer(x.to(self.frequency.dtype)).to(x.dtype)

        return self.filters_from_maps(self.frequency, [called(layer) for layer in layers])

    def plain_weights(self, layers: Sequence[nn.Module]) -> list[Tensor] | None:
        """The arguments of `filters_from_weights`. None where a layer must be called."""
        weights: list[Tensor] = [self.frequency]
        for layer, has_bias in zip(layers, (True, True, False), strict=True):
            weight, bias = matrix_of(layer) or (None, None)
            if weight is None or (bias is not None) != has_bias:
                return None
            weights += [weight] if bias is None else [weight, bias]
        return weights

    def filters_from_weights(
        self, frequency: Tensor, first: Tensor, a: Tensor, second: Tensor, b: Tensor, last: Tensor
    ) -> Tensor:
        """The filters from `frequency`, the weights and biases of both hidden layers and the weight of the last one."""

        def mapped(weight: Tensor, bias: Tensor | None = None) -> Part:
            return lambda x: F.linear(x, weight.to(x), None if bias is None else bias.to(x))

        filters = self.filters_from_maps(frequency, [mapped(first, a), mapped(second, b), mapped(last)])
        # a step reads all taps of one set: contiguous taps are faster
        return filters if torch.is_grad_enabled() else filters.contiguous()

    def filters_from_maps(self, frequency: Tensor, maps: Sequence[Part]) -> Tensor:
        """The filters from `frequency` and the three linear maps of the network."""
        device, dtype = frequency.device, torch.promote_types(frequency.dtype, torch.float32)
        with no_autocast(device):
            t = torch.linspace(0, 1, self.length, device=device, dtype=dtype)[:, None]
            angles = 2 * math.pi * t * torch.linspace(1e-4, BANDS - 1, BANDS, device=device, dtype=dtype)
            x = torch.cat((t, angles.cos(), angles.sin()), dim=-1)
            *hidden, to_filters = maps
            for scale, to_hidden in zip(frequency.to(dtype), hidden, strict=True):
                x = torch.sin(scale * to_hidden(x))
            filters = to_filters(x)
            shares = torch.linspace(SLOWEST, FASTEST, filters.shape[1], device=device, dtype=dtype)
            filters = filters * torch.exp(-t * (-math.log(DECAY_TARGET) / shares))
            filters = filters / filters.abs().sum(dim=0, keepdim=True).clamp(min=1e-6)
            return filters.unflatten(1, (self.sets, -1)).movedim(1, 0)


class Hyena(nn.Module):
    """The Hyena operator of order N: `(batch, seq, dim)` to `(batch, seq, dim)`.

        v_1 = v,    v_{n+1} = x_n * (h_n conv v_n + D_n v_n),    y = v_{N+1}

    v and x_1 to x_N are projections of the tokens, each followed by a short convolution. The filters h come from
    `ImplicitFilters`. Poli et al. 2023, arXiv 2302.10866, section 3.

    A filter has `length` taps, so a token reaches back `length` tokens, with or without a state. Time is `O(order * seq
    * log(seq) * dim)` for a sequence and `O(order * length * dim)` for a step. The state has the inputs of all
    convolutions, which cannot be summarized in less memory: `(batch, short - 1, (order + 1) * dim)`, and `order`
        tensors
    `(batch, slots, dim)`. These grow with the number of tokens read, up to `length - 1` slots (see `memory.room_for`),
    and are ring buffers then.

    Args:
        dim: width of the tokens.
        length: number of taps of a filter.
        order: N, the number of gates and long convolutions.
        short: number of taps of the short convolution.
        filter_dim: hidden width of the network that makes the filters.
        fft: transform of the convolutions, 'torch' or 'monarch': see `causal_conv`.

    Raises:
        ValueError: a value is not allowed.
    """

    # the inputs of a step depend on its position
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
        """Operations of a pass over `n` tokens, without products with weights: short and long convolutions."""
        long = self.order * conv_products(n, self.skip_bias.shape[1], self.fft)
        return long + 2 * n * self.short_conv.kernel.numel()

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        dim = self.skip_bias.shape[1]
        slots = room_for(0, self.length - 1)
        long = (like.new_zeros(batch, slots, dim) for _ in range(self.order))
        return self.short_conv.initial_state(batch, like), *long

    def with_room(self, state: MixerState, tokens: int) -> MixerState:
        """The state, with slots for `tokens` tokens, at most `length - 1`. Phases may be a first axis."""
        return state[0], *(grow(ring, tokens, self.length - 1) for ring in state[1:])

    def forward(self, x: Tensor, state: MixerState | None = None, start: int = 0) -> tuple[Tensor, MixerState | None]:
        short_state: Tensor | None = None
        rings: list[Tensor | None] = [None] * self.order
        if state is not None:
            short_state, *rings[:] = self.with_room(state, start + x.shape[1])
        projected, short_state = self.short_conv(chain(x, self.norm, self.to_in), short_state)
        v, *gates = projected.chunk(self.order + 1, dim=-1)
        for n, (gate, taps, bias) in enumerate(zip(gates, self.filters().unbind(), self.skip_bias, strict=True)):
            mixed, rings[n] = self.long_conv(v, taps, rings[n], start)
            v = gate * (mixed + bias * v)
        y = chain(v, self.to_out)
        return y, None if state is None else tuple(t for t in (short_state, *rings) if t is not None)

    def long_conv(self, v: Tensor, taps: Tensor, ring: Tensor | None, start: int) -> tuple[Tensor, Tensor | None]:
        """Convolve a chunk with one filter.

        v: `(batch, seq, dim)`, tokens from `start` on; taps: `(length, dim)`; ring: `(batch, slots, dim)`, the inputs
        before, where token `t` has slot `t % slots`. A ring that is not full yet holds all tokens so far. Returns the
        convolution and the ring after the chunk.
        """
        if ring is None:
            return causal_conv(v, taps, self.fft), None
        slots, n = ring.shape[1], v.shape[1]
        if not slots:
            return v * taps[0].to(v.dtype), ring
        oldest = start % slots
        if n == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the oldest input belongs to the last tap
            old_taps, new_taps = taps[1 : slots + 1].flip(0).to(v.dtype).split((slots - oldest, oldest))
            mixed = (ring[:, oldest:] * old_taps).sum(dim=1) + (ring[:, :oldest] * new_taps).sum(dim=1)
            mixed = mixed + v[:, 0] * taps[0].to(v.dtype)
            ring[:, oldest] = v[:, 0]
            return mixed[:, None].to(v.dtype), ring
        inputs = torch.cat((ring.roll(-oldest, dims=1).to(v.dtype), v), dim=1)
        mixed = causal_conv(inputs, taps, self.fft)[:, -n:]
        return mixed, keep(ring, inputs[:, n:].roll((start + n) % slots, dims=1))
