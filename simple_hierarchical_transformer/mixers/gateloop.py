"""Linear recurrences whose gates hang on the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_int
from ..memory import keep
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.scan import scan

# gates begin between these, so that channels remember over a few tokens, and over some hundred
FIRST_GATES = (0.5, 0.995)


def spread_gates(count: int) -> Tensor:
    """Logits of gates that remember for ever longer, one for each channel."""
    low, high = (torch.logit(torch.tensor(gate)) for gate in FIRST_GATES)
    return low + (high - low) * torch.linspace(0, 1, count)


class GateLoop(nn.Module):
    """A linear recurrence with a complex state, whose gates, keys, values and queries are all made of the token.

        S_n = a_n * S_{n-1} + k_n^T v_n,    y_n = Re(q_n S_n),    a_n = sigmoid(alpha_n) * exp(i * beta_n)

    with one gate for each channel of the keys, and what comes out normed, times `SiLU` of a projection of the token.
    Katsch 2023, arXiv 2311.01927. `(batch, seq, dim)` to `(batch, seq, dim)`.

    Time and memory `O(seq * dim * dim / state_heads)`. Its state is S, `(batch, heads, width, width, 2)` of real and
    imaginary parts, whatever was read: `2 * dim * dim / state_heads` numbers.

    Args:
        dim: width of the tokens.
        state_heads: heads that the state has, a divisor of `dim`; by default `dim`, each of width 1, as in the paper's
            experiments.
    """

    def __init__(self, *, dim: int, state_heads: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.heads = dim if state_heads is None else check_int('state_heads', state_heads)
        if dim % self.heads:
            raise ValueError(f'state_heads must divide dim {dim}, got {state_heads}')
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_gates = nn.Linear(dim, 2 * dim)
        self.to_out_gate = nn.Linear(dim, dim, bias=False)
        self.out_norm = RMSNorm(dim)
        self.to_out = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            self.to_gates.bias.copy_(torch.cat((spread_gates(dim), torch.zeros(dim))))

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside: three of a complex recurrence."""
        return 3 * 8 * n * self.dim * self.dim / self.heads

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        width = self.dim // self.heads
        exact = torch.promote_types(like.dtype, torch.float32)
        return (like.new_zeros(batch, self.heads, width, width, 2, dtype=exact),)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        normed = self.norm(x)
        # sums over long stretches are formed in float32 at least
        exact = torch.promote_types(x.dtype, torch.float32)
        q, k, v = chain(normed, self.to_qkv).to(exact).unflatten(-1, (3, self.heads, -1)).unbind(2)
        alpha, beta = chain(normed, self.to_gates).to(exact).unflatten(-1, (2, self.heads, -1)).unbind(2)
        gates = torch.polar(alpha.sigmoid(), beta)[..., None]
        kv = (k[..., None] * v[..., None, :]).to(gates.dtype)
        held = None if state is None else torch.view_as_complex(state[0].to(exact))

        memory = scan(gates, kv, held)
        y = (q[..., None] * memory.real).sum(dim=-2).flatten(2).to(x.dtype)
        y = self.out_norm(y) * F.silu(chain(normed, self.to_out_gate))
        if state is not None:
            state = (keep(state[0], torch.view_as_real(memory[:, -1])),)  # type: ignore[assignment]
        return chain(y, self.to_out), state


class SimpleGateLoop(nn.Module):
    """The same with real gates, a state of one number a channel, and keys and values formed as one.

        h_n = sigmoid(alpha_n) * h_{n-1} + kv_n,    y_n = q_n * h_n

    The max-headed GateLoop (Katsch 2023, arXiv 2311.01927) without its phase, output gate and output projection.
    Heinsen 2023, arXiv 2311.06281, forms it by cumulative sums of logarithms; a scan by blocks needs none of them, and
    takes inputs of either sign. `(batch, seq, dim)` to `(batch, seq, dim)`.

    Time and memory `O(seq * dim)`. Its state is h, `(batch, dim)`.

    Args:
        dim: width of the tokens.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_gates = nn.Linear(dim, dim)
        with torch.no_grad():
            self.to_gates.bias.copy_(spread_gates(dim))

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside: three of a recurrence."""
        return 3 * 2 * n * self.dim

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        exact = torch.promote_types(like.dtype, torch.float32)
        return (like.new_zeros(batch, self.dim, dtype=exact),)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        exact = torch.promote_types(x.dtype, torch.float32)
        normed = self.norm(x)
        q, kv = chain(normed, self.to_qkv).chunk(2, dim=-1)
        gates = chain(normed, self.to_gates).to(exact).sigmoid()
        h = scan(gates, kv.to(exact), None if state is None else state[0].to(exact))
        if state is not None:
            state = (keep(state[0], h[:, -1]),)  # type: ignore[assignment]
        return q * h.to(q.dtype), state
