"""One layer of one hierarchy level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .levels import Grid, Level
from .memory import BlockState, keep
from .mixers import build_mixer, mix_rows
from .ops.linear import Chain, begin_at_zero, chain, register_plain
from .ops.norm import RMSNorm
from .ops.recompute import recompute
from .ops.tracing import first_of
from .ops.window_attention import Backend
from .rows import Rows


def shift_tokens(x: Tensor, before: Tensor | None = None, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """Token shift: delays the second half of the channels of x `(batch, seq, dim)` by one token.

    `before`, `(batch, 1, dim // 2)`, are these channels of the token before the first one. Default: zeros. Returns the
    shifted tokens, and the channels of the last token for the next chunk. `rows` are those of a ragged chunk, which
    needs `before`. Peng et al. 2023, arXiv 2305.13048.
    """
    kept, delayed = x.chunk(2, dim=-1)
    last = delayed[:, -1:] if rows is None or before is None else rows.last(delayed, before)
    if before is None:
        delayed = F.pad(delayed, (0, 0, 1, -1))
    elif x.shape[1] == 1:
        delayed = before
    else:
        delayed = torch.cat((before, delayed[:, :-1]), dim=1)
    return torch.cat((kept, delayed), dim=-1), last


class GRUGate(nn.Module):
    """A residual connection that is a gated recurrent unit. It starts close to the identity.

        r = sigmoid(W_r y + U_r x),    z = sigmoid(W_z y + U_z x - b),    h = tanh(W_h y + U_h (r * x))
        x := (1 - z) * x + z * h

    x is the residual stream, y the output of a mixer or feed-forward after a ReLU; both are `(batch, seq, dim)`. b
    starts at 2. Mixers and feed-forwards norm their input, the "reordered" norm of Parisotto et al. 2019, arXiv
    1910.06764, section 3.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_part = nn.Linear(dim, 3 * dim, bias=False)
        self.of_stream = nn.Linear(dim, 2 * dim, bias=False)
        self.of_reset = nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.full((dim,), 2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        r_part, z_part, h_part = chain(y, F.relu, self.of_part).chunk(3, dim=-1)
        r, z = chain(x, self.of_stream).chunk(2, dim=-1)
        r, z = (r + r_part).sigmoid(), (z + z_part - self.bias).sigmoid()
        h = (h_part + chain(r * x, self.of_reset)).tanh()
        return torch.lerp(x, h.to(x.dtype), z.to(x.dtype))


@register_plain
class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # not a power: autocast on CUDA computes powers in float32, and their gradient is slow on a CPU
        positive = F.relu(x)
        return positive * positive


@register_plain
class SwiGLU(nn.Module):
    """The first half of the channels, gated by the second half through SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


ACTIVATIONS: dict[str, type[nn.Module]] = dict(gelu=nn.GELU, relu2=SquaredReLU, swiglu=SwiGLU)


class FeedForward(nn.Module):
    """Pre-norm feed-forward without biases, `(batch, seq, dim)` to the same shape.

    With `chunks` above 1, it processes that many pieces of the sequence one after the other, and recomputes each in the
    backward pass. Only the hidden layer of one piece is in memory at a time.
    """

    def __init__(self, dim: int, mult: float, chunks: int = 1, activation: str = 'gelu') -> None:
        super().__init__()
        self.dim = dim
        self.chunks = chunks
        inner = int(dim * mult)
        self.net = Chain(
            RMSNorm(dim),
            nn.Linear(dim, 2 * inner if activation == 'swiglu' else inner, bias=False),
            ACTIVATIONS[activation](),
            nn.Linear(inner, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.chunks == 1:
            return self.net(x)
        return torch.cat([recompute(self.net, [self.net], piece) for piece in x.chunk(self.chunks, dim=1)], dim=1)


class Group(NamedTuple):
    """Neighboring phases that have the same number of tokens in a chunk."""

    phase: int
    """The first phase."""
    width: int
    """The number of phases."""
    token: int
    """The index in the chunk of the first token of the first phase."""
    rounds: int
    """The number of tokens of each phase in the chunk."""
    start: int
    """The number of tokens of each phase before the chunk."""


def phase_groups(start: int, length: int, phases: int) -> Iterator[Group]:
    """The groups of phases of a chunk of `length` level tokens, the first of index `start`.

    From the next phase on, a chunk has whole rounds over all phases, then one more token of the first few phases. So
    there are at most three groups. There is one group if the chunk is one token, or if it starts at phase 0 and all
    rounds are whole.
    """
    offset, whole, more = start % phases, length // phases, length % phases
    for first, end in pairwise(sorted({0, more, phases - offset, phases})):
        if rounds := whole + (first < more):
            yield Group((offset + first) % phases, end - first, first, rounds, (start + first) // phases)


class HierarchicalBlock(nn.Module):
    """A token mixer, then a feed-forward. Both read shifted tokens and add to the residual stream, `(batch, seq, dim)`.

    Both work within phases: level tokens whose indices agree modulo `level.phases` form one sequence. A level of
    attention with a window of 0 has no mixer. Its tokens exchange information through the token shift only.

    Args:
        level: the level of the block.
        length: the largest number of tokens of a phase in a pass without a state.
        layer: the number of the block in its level, from 0.
        attn_backend: the kernels of windowed attention.
        residual: how mixer and feed-forward add to the residual stream: 'add', or 'gru' through a `GRUGate`.
        ff_activation: the activation of the feed-forward.
        ff_chunks: the number of pieces of the sequence that the feed-forward processes one after the other.
    """

    def __init__(
        self,
        level: Level,
        *,
        length: int = 2048,
        layer: int = 0,
        attn_backend: Backend = 'auto',
        residual: str = 'add',
        ff_activation: str = 'gelu',
        ff_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.phases = level.phases
        # the token mixer of any kind, under the published package's name
        self.attn = build_mixer(level, length=length, layer=layer, backend=attn_backend)
        self.ff = FeedForward(level.dim, level.ff_mult, ff_chunks, ff_activation)
        gated = residual == 'gru'
        self.attn_gate = GRUGate(level.dim) if gated and self.attn is not None else None
        self.ff_gate = GRUGate(level.dim) if gated else None

    def share_attention(self, other: HierarchicalBlock) -> None:
        """Uses the weights of another level's attention, with this level's window."""
        for name in ('norm', 'qk_norm', 'to_qkv', 'to_out'):
            setattr(self.attn, name, getattr(other.attn, name))

    def zero_init(self) -> None:
        """Initializes the outputs with zeros, so that mixer and feed-forward add nothing at first."""
        for out in (self.ff.net[-1], getattr(self.attn, 'to_out', None)):
            begin_at_zero(out)

    def initial_state(self, batch_size: int, like: Tensor) -> BlockState:
        """The state of a block that has read nothing, in the dtype and on the device of `like`."""
        rows, half = (self.phases, batch_size), self.ff.dim // 2
        shift = like.new_zeros(*rows, 1, half)
        if self.attn is None:
            return BlockState(None, shift)
        held = self.attn.initial_state(self.phases * batch_size, like)
        return BlockState(torch.zeros_like(shift), shift, tuple(tensor.unflatten(0, rows) for tensor in held))

    def forward(
        self, x: Tensor, state: BlockState | None = None, start: int | Rows = 0
    ) -> tuple[Tensor, BlockState | None]:
        """Level tokens x `(batch, seq, dim)`, the first of index `start`, to the same shape; and the next state.

        With a state and one phase, `start` may be the `Rows` of a ragged chunk. Each row then gives what it gives
        alone. Outputs of its padding are finite and mean nothing.
        """
        if not x.shape[1] and not torch.is_grad_enabled():
            # a step of generation without a boundary. The block is still called: FSDP gathers weights in its hooks, on
            # all processes together
            return x, state
        return self.within_phases(self.mix, x, state, start)

    def operations(self, n: float) -> float:
        """Operations of reading n level tokens, besides the products with weights."""
        return self.phases * getattr(self.attn, 'products', lambda _: 0.0)(n / self.phases)

    def within_phases(
        self,
        part: Callable[..., tuple[Tensor, BlockState | None]],
        x: Tensor,
        state: BlockState | None = None,
        start: int | Rows = 0,
    ) -> tuple[Tensor, BlockState | None]:
        """`part(x, state, start)` within phases: `part` gets level tokens with one phase of one sequence in each row.

        x: level tokens `(batch, seq, dim)`. Returns the result in the same shape, and the next state.
        """
        b, n, d = x.shape
        p = self.phases
        if isinstance(start, Rows):
            common = start.common_start(n)
            if common is None:
                return self.within_rows(part, x, state, start)
            start = common
        if state is None and p == 1:
            return part(x, None, start)
        if state is None and torch.compiler.is_compiling():
            # one graph for all lengths: fill up the last round, which no earlier token depends on
            filled = F.pad(x, (0, 0, 0, Grid(p).offset(n))).unflatten(1, (-1, p)).permute(2, 0, 1, 3)
            out, _ = part(filled.flatten(0, 1), None, start // p)
            return first_of(out.unflatten(0, (p, b)).permute(1, 2, 0, 3).flatten(1, 2), n), None
        outs: list[Tensor] = []
        parts: list[tuple[int, BlockState]] = []
        if state is not None:
            # for all phases at once, before views of some are taken
            state = self.with_room(state, Grid(p).count(start + n))

        for group in phase_groups(start, n, p):
            # phases lead, as in the state; (batch, rounds, dim, phases) is a view
            end = group.token + (group.rounds - 1) * p + group.width
            tokens = x[:, group.token : end].unfold(1, group.width, p).permute(3, 0, 1, 2) if p > 1 else x[None]
            own = None if state is None else state.phases(group.phase, group.width)

            out, own = part(tokens.flatten(0, 1), own, group.start)
            outs.append(out.unflatten(0, (-1, b)))
            if own is not None and torch.is_grad_enabled():
                parts.append((group.phase, own.map(lambda tensor: tensor.unflatten(0, (-1, b)))))

        # without gradients the parts were views, written in place
        if state is not None and parts:
            state = state.joined(sorted(parts, key=lambda each: each[0]))
        if not outs or p == 1:
            return (outs[0][0] if outs else x), state

        # whole rounds over all phases, then the phases with one more token
        whole, more = divmod(n, p)
        rounds = torch.cat([out[:, :, :whole] for out in outs]) if whole else x.new_empty(0, b, 0, d)
        merged = rounds.permute(1, 2, 0, 3).reshape(b, whole * p, d)
        if more:
            last = torch.cat([out[:, :, whole] for out in outs if out.shape[2] > whole])
            merged = torch.cat((merged, last.transpose(0, 1)), dim=1)
        return merged, state

    def within_rows(
        self, part: Callable[..., tuple[Tensor, BlockState | None]], x: Tensor, state: BlockState | None, rows: Rows
    ) -> tuple[Tensor, BlockState | None]:
        """`within_phases` for a ragged chunk."""
        if state is None or self.phases > 1:
            raise ValueError(
                f'start must be an int without a state or with phases, got rows for {self.phases} phases'
                f'{" without a state" if state is None else ""}'
            )
        if not any(rows.lengths):
            # with gradients, padding keeps the weights in the graph: DDP and FSDP wait for their gradients
            return part(x, None, 0)[0] if x.shape[1] and torch.is_grad_enabled() else x, state
        state = self.with_room(state, rows.end)
        out, own = part(x, state.phases(0, 1), rows)
        # without gradients the views were written in place
        return out, own.map(lambda tensor: tensor[None]) if own is not None and torch.is_grad_enabled() else state

    def with_room(self, state: BlockState, tokens: int) -> BlockState:
        """The state, whose mixer has room for this many tokens of each phase."""
        grows = getattr(self.attn, 'with_room', None)
        if grows is None:
            return state
        mixer = grows(state.mixer, tokens)
        # the compiler cannot trace the question
        return replace(state, mixer=mixer) if torch.compiler.is_compiling() or mixer is not state.mixer else state

    def mix(self, x: Tensor, state: BlockState | None, start: int | Rows) -> tuple[Tensor, BlockState | None]:
        """The block on rows that are sequences of their own."""
        if self.attn is not None:
            update, state = self.mixed(x, state, start)
            x = x + update if self.attn_gate is None else self.attn_gate(x, update)
        update, state = self.fed(x, state, start)
        return (x + update if self.ff_gate is None else self.ff_gate(x, update)), state

    def mixed(self, x: Tensor, state: BlockState | None, start: int | Rows) -> tuple[Tensor, BlockState | None]:
        """What the mixer adds to the residual stream, and the next state."""
        mixer: Any = self.attn
        rows = start if isinstance(start, Rows) else None
        shifted, last = shift_tokens(x, None if state is None else state.mixer_shift, rows)
        if rows is None or state is None:
            update, after = mixer(shifted, None if state is None else state.mixer, start)
        else:
            update, after = mix_rows(mixer, shifted, state.mixer, rows)
        return update, state and state.after(mixer_shift=keep(state.mixer_shift, last), mixer=after)

    def fed(self, x: Tensor, state: BlockState | None, start: int | Rows) -> tuple[Tensor, BlockState | None]:
        """What the feed-forward adds to the residual stream, and the next state."""
        rows = start if isinstance(start, Rows) else None
        shifted, last = shift_tokens(x, None if state is None else state.ff_shift, rows)
        return self.ff(shifted), state and state.after(ff_shift=keep(state.ff_shift, last))
