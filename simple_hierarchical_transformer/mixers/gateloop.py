"""GateLoop: a linear recurrence with gates that depend on the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_int
from ..memory import keep
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.scan import scan
from .base import MixerState

# range of the initial gates: some channels remember a few tokens, others a few hundred
FIRST_GATES = (0.5, 0.995)


def spread_gates(count: int) -> Tensor:
    """Initial logits of gates, one for each channel, in order of increasing memory: `(count,)`."""
    low, high = (torch.logit(torch.tensor(gate)) for gate in FIRST_GATES)
    return low + (high - low) * torch.linspace(0, 1, count)


class GateLoop(nn.Module):
    """A linear recurrence with a complex state. Gates, keys, values and queries are all projections of the token.

        S_n = a_n * S_{n-1} + k_n^T v_n,    y_n = Re(q_n S_n),    a_n = sigmoid(alpha_n) * exp(i * beta_n)

    Each channel of the keys has one gate. The output is normed, and multiplied by `SiLU` of a projection of the token.
    Katsch 2023, arXiv 2311.01927. `(batch, seq, dim)` to `(batch, seq, dim)`.

    Time and memory are `O(seq * dim * dim / state_heads)`. The state is S, the real and imaginary parts `(batch, heads,
    width, width, 2)`. Its size, `2 * dim * dim / state_heads` numbers, does not depend on what was read.

    Args:
        dim: width of the tokens.
        state_heads: number of heads of the state, a divisor of `dim`. By default `dim`, each of width 1, as in the
            experiments of the paper.

    Raises:
        ValueError: `state_heads` does not divide `dim`.
    """

    uses_position = False

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
        """Operations of a pass over `n` tokens, without products with weights: three for each complex gate."""
        return 3 * 8 * n * self.dim * self.dim / self.heads

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        width = self.dim // self.heads
        exact = torch.promote_types(like.dtype, torch.float32)
        return (like.new_zeros(batch, self.heads, width, width, 2, dtype=exact),)

    def forward(self, x: Tensor, state: MixerState | None = None, start: int = 0) -> tuple[Tensor, MixerState | None]:
        normed = self.norm(x)
        # long sums need float32 or float64
        exact = torch.promote_types(x.dtype, torch.float32)
        q, k, v = chain(normed, self.to_qkv).to(exact).unflatten(-1, (3, self.heads, -1)).unbind(2)
        alpha, beta = chain(normed, self.to_gates).to(exact).unflatten(-1, (2, self.heads, -1)).unbind(2)
        gates = torch.polar(alpha.sigmoid(), beta)[..., None]
        kv = (k[..., None] * v[..., None, :]).to(gates.dtype)
        initial = None if state is None else torch.view_as_complex(state[0].to(exact))

        memory = scan(gates, kv, initial)
        y = (q[..., None] * memory.real).sum(dim=-2).flatten(2).to(x.dtype)
        y = self.out_norm(y) * F.silu(chain(normed, self.to_out_gate))
        if state is not None:
            state = (keep(state[0], torch.view_as_real(memory[:, -1])),)
        return chain(y, self.to_out), state
