"""Hyena: gates, and convolutions as long as the sequence whose filters a small network makes."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..levels import check_int
from ..linear import Linear
from ..norm import RMSNorm
from ..state import keep
from .convolution import causal_conv, check_fft, conv_products
from .ssm import ShortConv

# how many bands of frequencies a filter's network is told its position by
BANDS = 8
# of the sine that it is activated by, at the beginning
FREQUENCY = 10.0
# the share of the length at which the window of the fastest and of the slowest channel has fallen to the target
DECAY_TARGET, FASTEST, SLOWEST = 1e-2, 0.3, 1.5


class ImplicitFilters(nn.Module):
    """Filters over `length` positions, from a network of the position, under a window that decays: `(length, filters)`.

    Each filter's absolute values sum to 1, so that what comes out does not grow with the length. Poli et al. 2023,
    arXiv 2302.10866, section 3.3.
    """

    features: Tensor

    def __init__(self, filters: int, *, length: int, hidden: int) -> None:
        super().__init__()
        t = torch.linspace(0, 1, length)[:, None]
        angles = 2 * math.pi * t * torch.linspace(1e-4, BANDS - 1, BANDS)
        self.register_buffer('features', torch.cat((t, angles.cos(), angles.sin()), dim=-1), persistent=False)
        self.to_hidden = nn.ModuleList([nn.Linear(2 * BANDS + 1, hidden), nn.Linear(hidden, hidden)])
        self.frequency = nn.Parameter(torch.full((2, hidden), FREQUENCY))
        self.to_filters = nn.Linear(hidden, filters, bias=False)
        rates = -math.log(DECAY_TARGET) / torch.linspace(SLOWEST, FASTEST, filters)
        self.register_buffer('window', torch.exp(-t * rates), persistent=False)
        self._made: tuple[Any, Tensor] | None = None

    def forward(self) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.make()
        # steps of generation ask for the same again and again
        key = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in self.parameters())
        if self._made is None or self._made[0] != key:
            self._made = (key, self.make())
        return self._made[1]

    def make(self) -> Tensor:
        x = self.features
        for to_hidden, frequency in zip(self.to_hidden, self.frequency, strict=True):
            x = torch.sin(frequency * to_hidden(x))
        filters = self.to_filters(x) * self.window
        return filters / filters.abs().sum(dim=0, keepdim=True).clamp(min=1e-6)


class Hyena(nn.Module):
    """The Hyena operator of order N: `(batch, seq, dim)` to `(batch, seq, dim)`.

        v_1 = v,    v_{n+1} = x_n * (h_n conv v_n + D_n v_n),    y = v_{N+1}

    where v and x_1 to x_N are projections of the tokens, each through a short convolution, and the filters h come from
    `ImplicitFilters`. Poli et al. 2023, arXiv 2302.10866, definition 3.1 and algorithm 3.

    A filter has `length` taps, so that is how far back a token is heard, with a state too. Time `O(order * seq *
    log(seq) * dim)`, of a step `O(order * length * dim)`. Its state are the inputs of all convolutions, which have no
    shorter summary: `(batch, short - 1, (order + 1) * dim)`, and `order` times `(batch, length - 1, dim)`.

    Args:
        dim: width of the tokens.
        length: taps of a filter.
        order: N, how many gates and long convolutions follow each other.
        short: taps of the short convolution.
        filter_dim: hidden width of the network that makes the filters.
        fft: what convolutions run on, 'torch' or 'monarch': see `causal_conv`.
    """

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
        self.order, self.length = check_int('order', order), length
        self.fft = check_fft(fft)
        self.norm = RMSNorm(dim)
        self.to_in = Linear(dim, (order + 1) * dim, bias=False)
        self.short_conv = ShortConv((order + 1) * dim, check_int('short', short))
        self.filters = ImplicitFilters(order * dim, length=length, hidden=check_int('filter_dim', filter_dim))
        self.skip_bias = nn.Parameter(torch.randn(order, dim))
        self.to_out = Linear(dim, dim, bias=False)

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside: convolutions, short and long."""
        long = self.order * conv_products(n, self.skip_bias.shape[1], self.fft)
        return long + 2 * n * self.short_conv.kernel.numel()

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        dim = self.skip_bias.shape[1]
        long = (like.new_zeros(batch, self.length - 1, dim) for _ in range(self.order))
        return self.short_conv.initial_state(batch, like), *long

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        held: list[Tensor | None] = [None] * (1 + self.order) if state is None else list(state)
        joined, held[0] = self.short_conv(self.to_in(x, after=self.norm), held[0])
        v, *gates = joined.chunk(self.order + 1, dim=-1)
        filters = self.filters().chunk(self.order, dim=-1)
        for n, (gate, taps, bias) in enumerate(zip(gates, filters, self.skip_bias, strict=True), 1):
            mixed, held[n] = self.long_conv(v, taps, held[n])
            v = gate * (mixed + bias * v)
        return self.to_out(v), None if state is None else tuple(held)  # type: ignore[arg-type]

    def long_conv(self, v: Tensor, taps: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The convolution of a chunk, and the last inputs that the chunks to come still hear of."""
        if before is None:
            return causal_conv(v, taps, self.fft), None
        n, heard = v.shape[1], torch.cat((before.to(v.dtype), v), dim=1)
        if n == 1:
            mixed = torch.einsum('btd,td->bd', heard, taps.flip(0).to(v.dtype))[:, None]
        else:
            mixed = causal_conv(heard, taps, self.fft)[:, -n:]
        return mixed, keep(before, heard[:, n:])
