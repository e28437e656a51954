"""State: what a model keeps of a sequence between chunks.

Every stateful part maps `(chunk, state) -> (output, state)`, and chunks of any lengths give the result of one pass. The
classes here hold tensors and a position, nothing else. All rows of a batch are at the same position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import is_int, plain

# the initial size of a cache in tokens: small enough to cost little, and large enough for many models
ROOM = 1024


def room_for(tokens: int, limit: int) -> int:
    """The size of a cache that holds `tokens` tokens now, and at most `limit` later.

    It is `limit`, halved as long as the half has room for `tokens` and `ROOM`. So caches grow geometrically and are at
    most twice as large as needed. Their size depends only on the position.
    """
    room = limit
    while room > (half := -(-room // 2)) >= ROOM and half >= tokens:
        room = half
    return room


def grow(cache: Tensor, tokens: int, limit: int) -> Tensor:
    """A cache `(..., slots, dim)` with room for `tokens`, up to `limit`. New slots hold zeros."""
    slots = cache.shape[-2]
    if slots == limit or tokens <= slots:
        return cache
    more = cache.new_zeros(*cache.shape[:-2], room_for(tokens, limit) - slots, cache.shape[-1])
    return torch.cat((cache, more), dim=-2)


@overload
def keep(old: None, new: Tensor) -> None: ...


@overload
def keep(old: Tensor, new: Tensor) -> Tensor: ...


def keep(old: Tensor | None, new: Tensor) -> Tensor | None:
    """Returns `new` as the next state. Without gradients, it is written into `old`.

    If `old` is None, there is no state, and the result is None.
    """
    if old is None:
        return None
    if not torch.is_grad_enabled():
        return old.copy_(new)
    # a copy in the dtype of the state, even under autocast
    return new.to(old.dtype, copy=True)


@dataclass(frozen=True)
class BlockState:
    """The state of a block for all its phases.

    The phase is the first dimension, so the phases of a chunk are a slice: a view, not a copy.
    """

    mixer_shift: Tensor | None = None
    """`(phases, batch, 1, dim // 2)`: the delayed channels of the last token before the mixer, if there is one."""
    ff_shift: Tensor | None = None
    """`(phases, batch, 1, dim // 2)`: the same before the feed-forward."""
    mixer: tuple[Tensor, ...] = ()
    """The state of the mixer, tensors `(phases, batch, ...)`: keys and values for attention."""

    @classmethod
    def of(cls, held: Sequence[Tensor | None]) -> BlockState:
        """A state from tensors in the order of `held`."""
        return cls(held[0], held[1], tuple(held[2:]))  # type: ignore[arg-type]

    @property
    def held(self) -> list[Tensor | None]:
        return [self.mixer_shift, self.ff_shift, *self.mixer]

    def after(self, **kept: Any) -> BlockState:
        """The state after a chunk, from its new fields. Without gradients, they have already been written in place."""
        return replace(self, **kept) if torch.is_grad_enabled() else self

    def map(self, fn: Callable[[Tensor], Tensor]) -> BlockState:
        return BlockState.of([None if tensor is None else fn(tensor) for tensor in self.held])

    def phases(self, first: int, count: int) -> BlockState:
        """Views of `count` phases from `first` on, with phases and batch in one dimension: `(count * batch, ...)`."""
        if count == 1:
            return self.map(lambda tensor: tensor[first])
        return self.map(lambda tensor: tensor[first : first + count].flatten(0, 1))

    def joined(self, parts: Sequence[tuple[int, BlockState]]) -> BlockState:
        """This state with some phases replaced by `parts`, pairs of the first phase and the new state, in order."""

        def join(whole: Tensor | None, pieces: Sequence[Tensor | None]) -> Tensor | None:
            if whole is None:
                return None
            joined, done = [], 0
            for (first, _), piece in zip(parts, pieces, strict=True):
                assert piece is not None
                joined += [whole[done:first], piece]
                done = first + len(piece)
            return torch.cat([*joined, whole[done:]])

        pieces = zip(*(part.held for _, part in parts), strict=True)
        return BlockState.of([join(whole, of) for whole, of in zip(self.held, pieces, strict=True)])


@dataclass(frozen=True)
class PlacedState:
    """What a placed level keeps besides the states of its blocks. The batch is the first dimension.

    Rows meet boundaries at different positions, so each has a number of tokens of its own.
    """

    count: Tensor
    """The number of the level's tokens of each row, int64 `(batch,)`."""
    cut: Tensor
    """The index in its row of the finer token at which the rule last found a boundary, int64 `(batch,)`."""
    pending: Tensor
    """Whether the rule marked an id since the last finer token, bool `(batch,)`."""
    ids: Tensor
    """The ids of the last finer tokens, which the rule reads, int64 `(batch, reach)`. -1 before the sequence."""
    finer: Tensor | None = None
    """The last finer tokens, `(batch, reach, dim)`, if the rule reads them."""
    down: tuple[Tensor, ...] = ()
    """The state of the downsampler."""
    up: tuple[Tensor, ...] = ()
    """The state of the upsampler."""

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.count, self.cut, self.pending, self.ids)
        if self.finer is not None:
            yield self.finer
        yield from (*self.down, *self.up)

    def map(self, fn: Callable[[Tensor], Tensor]) -> PlacedState:
        return PlacedState(
            count=fn(self.count),
            cut=fn(self.cut),
            pending=fn(self.pending),
            ids=fn(self.ids),
            finer=None if self.finer is None else fn(self.finer),
            down=tuple(map(fn, self.down)),
            up=tuple(map(fn, self.up)),
        )


@dataclass(frozen=True)
class State:
    """The state of a model after the ids that it has read, in bounded memory. Pass it with the next chunk.

    With gradients enabled, a state never changes, and gradients flow through it. Without gradients, a call consumes the
    state that it gets: it writes the tensors in place and returns them. `clone` keeps a copy. The model, `clone`,
    `select`, `to` and `detach` refuse a consumed state. A state whose chunk failed halfway counts as consumed.
    """

    position: int
    """The number of ids that each row has read."""
    spec: tuple[Any, ...]
    """The layout of the model that made it. A model with another layout refuses it."""
    ids: Tensor | None
    """The last ids plus 1, 0 before the first id, for n-grams and recall: `(batch, before)`."""
    contexts: Tensor | None
    """The hashes of the contexts that ended at the last ids, for recall: `(batch, seq_len, contexts)`."""
    embeds: tuple[Tensor | None, ...]
    """For each level the last tokens that its compressor still reads. From embeddings, these are the last c - 1,
    `(batch, c - 1, dim_embed)`. None for a window of one token."""
    blocks: tuple[tuple[BlockState, ...], ...]
    """By layer and level."""
    merges: tuple[tuple[Tensor | None, ...], ...]
    """For each merge and for the logits, what represents the positions up to each level's next token: the last token of
    a strided level, `(batch, 1, dim)`. A merge by attention keeps for each recipient and level the last keys and
    values, `(batch, kept, 2 * heads * dim_head)`."""
    placed: tuple[PlacedState | None, ...] = ()
    """For each level, what it keeps if it is placed by boundaries."""
    overwritten: list[bool] = field(default_factory=lambda: [False], compare=False, repr=False)
    """A flag that all states with these tensors share. See `consumed`."""

    @property
    def consumed(self) -> bool:
        """Whether a later chunk has written into its tensors, or has started to."""
        return self.overwritten[0]

    def consume(self) -> None:
        """Marks it as consumed. Call this before the first write: a failed chunk leaves tensors partly written."""
        self.overwritten[0] = True

    def check_valid(self) -> None:
        """Raises ValueError if the state is consumed."""
        if self.consumed:
            raise ValueError(
                f'state at position {self.position} was consumed by a chunk that came after it, or that failed '
                'halfway: state.clone() keeps a copy'
            )

    def writable(self) -> State:
        """This state, or a copy if its tensors cannot be used in place.

        Without gradients, tensors of a graph must not be overwritten. Outside of inference mode, tensors created in it
        can neither be overwritten nor saved for a gradient.
        """
        # torch.compile cannot trace queries of inference mode
        asks = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
        writes = not torch.is_grad_enabled()
        for tensor in self.tensors():
            if (asks and tensor.is_inference()) or (writes and tensor.requires_grad):
                copy = self.clone()
                return copy.detach() if writes else copy
        return self

    @property
    def _any(self) -> Tensor:
        """A tensor that every state has."""
        tensor = self.blocks[0][0].ff_shift
        if tensor is None:
            raise ValueError('state holds no tensors')
        return tensor

    @property
    def batch_size(self) -> int:
        return self._any.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def requires_grad(self) -> bool:
        """Whether its tensors are part of an autograd graph."""
        return any(tensor.requires_grad for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def nbytes(self) -> int:
        """The size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors in it."""
        held = (block.held for layer in self.blocks for block in layer)
        for tensor in chain((self.ids, self.contexts), self.embeds, *held, *self.merges):
            if tensor is not None:
                yield tensor
        for level in self.placed:
            if level is not None:
                yield from level.tensors()

    def map(self, fn: Callable[[Tensor], Tensor], by_phase: Callable[[Tensor], Tensor]) -> State:
        """Applies `fn` to tensors whose first dimension is the batch, `by_phase` to those whose first is the phase.

        Raises ValueError if the state is consumed.
        """
        self.check_valid()

        def of(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            return tuple(None if tensor is None else fn(tensor) for tensor in tensors)

        ids, contexts = of((self.ids, self.contexts))
        return replace(
            self,
            overwritten=[False],
            ids=ids,
            contexts=contexts,
            embeds=of(self.embeds),
            blocks=tuple(tuple(block.map(by_phase) for block in layer) for layer in self.blocks),
            merges=tuple(map(of, self.merges)),
            placed=tuple(None if level is None else level.map(fn) for level in self.placed),
        )

    def to(self, *args: Any, **kwargs: Any) -> State:
        """The state on another device or in another dtype, with the arguments of `Module.to`. Integers stay integers.

        Returns this state if nothing changes, else one that shares no memory with it.

        Raises ValueError if the state is consumed.
        """
        device, dtype, blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(tensor: Tensor, copy: bool = True) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, blocking, copy=copy)

        self.check_valid()
        return self if move(self._any, copy=False) is self._any else self.map(move, move)

    def detach(self) -> State:
        """The state without its graph: gradients stop here, the context stays. It shares its memory with this one.

        Raises ValueError if the state is consumed.
        """
        return replace(self.map(Tensor.detach, Tensor.detach), overwritten=self.overwritten)

    def clone(self) -> State:
        """A copy that shares no memory with this state.

        Raises ValueError if the state is consumed.
        """
        return self.map(Tensor.clone, Tensor.clone)

    def select(self, rows: int | Sequence[int] | Tensor) -> State:
        """A copy with these rows of the batch, in this order. Rows may repeat, as in a beam search.

        `rows` is an int, a list of ints, an array or a tensor.

        Raises ValueError if a row is not in the batch, or the state is consumed.
        """
        chosen = plain(rows)
        chosen = [chosen] if is_int(chosen) else chosen
        if not isinstance(chosen, (list, tuple)) or not chosen or not all(map(is_int, chosen)):
            raise ValueError(f'rows must be a list of at least one row number, got {rows!r}')
        if min(chosen) < 0 or max(chosen) >= self.batch_size:
            raise ValueError(f'rows must be in [0, {self.batch_size}), got {list(chosen)}')
        index = torch.tensor(chosen, device=self.device)
        return self.map(lambda tensor: tensor.index_select(0, index), lambda tensor: tensor.index_select(1, index))


class Memory:
    """Reads the state before a chunk and collects the state after it, during one pass.

    Without a state, every part is None, and nothing is collected. Parts that are not put stay unchanged.
    """

    def __init__(self, state: State | None) -> None:
        self.state = state
        self.position = 0 if state is None else state.position
        if state is not None:
            self.next_ids, self.next_contexts = state.ids, state.contexts
            self.next_embeds, self.next_merges = list(state.embeds), list(state.merges)
            self.next_placed = list(state.placed)
            self.next_blocks = [list(layer) for layer in state.blocks]

    def embeds(self, i: int) -> Tensor | None:
        """The finer tokens that the compressor of level i still reads."""
        return None if self.state is None else self.state.embeds[i]

    def put_embeds(self, i: int, value: Tensor | None) -> None:
        if self.state is not None:
            self.next_embeds[i] = value

    def placed(self, i: int) -> PlacedState | None:
        """The state of level i before the chunk, if it is placed by boundaries."""
        return None if self.state is None else self.state.placed[i]

    def put_placed(self, i: int, value: PlacedState | None) -> None:
        if self.state is not None:
            self.next_placed[i] = value

    def block(self, layer: int, i: int) -> BlockState | None:
        """The state of the block of a layer and level i before the chunk."""
        return None if self.state is None else self.state.blocks[layer][i]

    def latest_block(self, layer: int, i: int) -> BlockState | None:
        """Like `block`, but with the states that were put since."""
        return None if self.state is None else self.next_blocks[layer][i]

    def put_block(self, layer: int, i: int, value: BlockState | None) -> None:
        if value is not None and self.state is not None:
            self.next_blocks[layer][i] = value

    def put_blocks(self, layer: int, values: Sequence[BlockState | None]) -> None:
        """Puts the blocks of all levels of a layer."""
        if self.state is not None:
            for i, value in enumerate(values):
                self.put_block(layer, i, value)

    def merge(self, k: int) -> tuple[Tensor | None, ...] | None:
        """The state of the k-th merge."""
        return None if self.state is None else self.state.merges[k]

    def features(self) -> tuple[Tensor | None, ...] | None:
        """The last token of each strided level that predicts, which the logits of the next positions read."""
        return None if self.state is None else self.state.merges[-1]

    def put_features(self, value: tuple[Tensor | None, ...] | None) -> None:
        self.put_merge(-1, value)

    def put_merge(self, k: int, value: tuple[Tensor | None, ...] | None) -> None:
        if value is not None and self.state is not None:
            self.next_merges[k] = value

    def put_ids(self, ids: Tensor | None, contexts: Tensor | None) -> None:
        """Puts the last ids, and the numbers of the contexts that end at them."""
        if self.state is not None:
            self.next_ids, self.next_contexts = ids, contexts

    def next_state(self, n: int) -> State | None:
        """The state after a chunk of n ids."""
        if self.state is None:
            return None
        return replace(
            self.state,
            position=self.position + n,
            ids=self.next_ids,
            contexts=self.next_contexts,
            overwritten=[False],
            embeds=tuple(self.next_embeds),
            blocks=tuple(map(tuple, self.next_blocks)),
            merges=tuple(self.next_merges),
            placed=tuple(self.next_placed),
        )


class MemoryOfRows(Memory):
    """The blocks' memory of some rows of a batch, while the other rows have no tokens. Without gradients.

    Blocks get copies of the states of these rows, and what they return is written into the states of all rows.

    Args:
        memory: the memory of all rows.
        rows: int64 `(rows,)`.
    """

    def __init__(self, memory: Memory, rows: Tensor) -> None:
        self.memory, self.rows = memory, rows
        self.state, self.position = memory.state, memory.position

    def block(self, layer: int, i: int) -> BlockState | None:
        before = self.memory.latest_block(layer, i)
        return before and before.map(lambda tensor: tensor.index_select(1, self.rows))

    def put_block(self, layer: int, i: int, value: BlockState | None) -> None:
        before = self.memory.latest_block(layer, i)
        if before is None or value is None:
            return
        held: list[Tensor | None] = []
        for whole, part in zip(before.held, value.held, strict=True):
            if whole is not None and part is not None:
                # a cache of these rows may have grown
                more = [size - old for size, old in zip(part.shape[2:], whole.shape[2:], strict=True)]
                if any(more):
                    whole = F.pad(whole, [size for each in reversed(more) for size in (0, each)])
                whole.index_copy_(1, self.rows, part)
            held.append(whole)
        self.memory.put_block(layer, i, BlockState.of(held))
