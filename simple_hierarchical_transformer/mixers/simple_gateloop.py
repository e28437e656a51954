"""SimpleGateLoop: an elementwise linear recurrence with gates that depend on the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..memory import keep
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.scan import scan
from .base import MixerState
from .gateloop import spread_gates


class SimpleGateLoop(nn.Module):
    """A `GateLoop` with real gates, one state value for each channel, and one projection for keys times values.

        h_n = sigmoid(alpha_n) * h_{n-1} + kv_n,    y_n = q_n * h_n

    This is the max-headed GateLoop (Katsch 2023, arXiv 2311.01927) without its phase, output gate and output
    projection. Heinsen 2023, arXiv 2311.06281, computes it by cumulative sums of logarithms. A scan by blocks needs no
    logarithms, and takes inputs of either sign. `(batch, seq, dim)` to `(batch, seq, dim)`.

    Time and memory are `O(seq * dim)`. The state is h, `(batch, dim)`.

    Args:
        dim: width of the tokens.
    """

    uses_position = False

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_gates = nn.Linear(dim, dim)
        with torch.no_grad():
            self.to_gates.bias.copy_(spread_gates(dim))

    def products(self, n: float) -> float:
        """Operations of a pass over `n` tokens, without products with weights: three for each gate."""
        return 3 * 2 * n * self.dim

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        exact = torch.promote_types(like.dtype, torch.float32)
        return (like.new_zeros(batch, self.dim, dtype=exact),)

    def forward(self, x: Tensor, state: MixerState | None = None, start: int = 0) -> tuple[Tensor, MixerState | None]:
        exact = torch.promote_types(x.dtype, torch.float32)
        normed = self.norm(x)
        q, kv = chain(normed, self.to_qkv).chunk(2, dim=-1)
        gates = chain(normed, self.to_gates).to(exact).sigmoid()
        h = scan(gates, kv.to(exact), None if state is None else state[0].to(exact))
        if state is not None:
            state = (keep(state[0], h[:, -1]),)
        return q * h.to(q.dtype), state
