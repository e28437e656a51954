"""The methods of a model that make and check its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .checks import check_int
from .embeddings import with_room
from .levels import Grid, Level
from .memory import BlockState, Memory, PlacedState, State, room_for

if TYPE_CHECKING:
    from .config import Config
    from .model import HierarchicalTransformer


def layout_of(config: Config) -> tuple[Any, ...]:
    """What the shape and the meaning of a state depend on, as far as options say it."""
    return (
        config.arrangement,
        config.autoencoder,
        config.halting is not None,
        config.merge,
        config.merge_window,
        tuple(config.receivers),
        tuple(config.predict_from),
        *config.levels,
    )


class Stateful:
    """State before the first chunk, room for more, and the check of a state that a call is given."""

    def initial_state(self, batch_size: int) -> State:
        """The state of a model that has read nothing, in the dtype and on the device of its weights.

        Attention with a window of w keeps w + 1 tokens in each phase, full attention `ceil(seq_len / c) + 1`. Other
        mixers keep what their docstrings say. `recall` also keeps the last `seq_len` ids, and a number for each context
        that ended there. A cache of more than `memory.ROOM` tokens grows with the text.

        Raises:
            ValueError: `batch_size` is no integer of at least 1.
        """
        model = cast('HierarchicalTransformer', self)
        batch_size = check_int('batch_size', batch_size)
        like = model.token_emb.weight

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        def unread(i: int) -> Tensor | None:
            """The finer tokens before the first, if the compressor reads any."""
            reads: Any = model.compressors[i]
            dim = reads.dim_in
            if model.autoencoder is not None and str(i) in model.autoencoder.encoders:
                reads = model.autoencoder.encoders[str(i)]
            return zeros(batch_size, reads.windows.before, dim) if reads.windows.before else None

        def placed(i: int) -> PlacedState | None:
            key = str(i)
            if key not in model.boundaries:
                return None
            rule: Any = model.boundaries[key]
            compressor: Any = model.compressors[i]
            reach = getattr(rule, 'reach', 1)
            down, up = (
                cast(Any, parts[key]).initial_state(batch_size, like) if key in parts else ()
                for parts in (model.downsamplers, model.upsamplers)
            )
            return PlacedState(
                count=torch.zeros(batch_size, dtype=torch.long, device=like.device),
                cut=torch.zeros(batch_size, dtype=torch.long, device=like.device),
                pending=torch.zeros(batch_size, dtype=torch.bool, device=like.device),
                ids=torch.full((batch_size, reach), -1, device=like.device),
                finer=zeros(batch_size, reach, compressor.dim_in) if getattr(rule, 'reads_tokens', True) else None,
                down=down,
                up=up,
            )

        recall = model.recall_emb
        recalled = 0 if recall is None else room_for(0, recall.reach)
        before = max(model.contexts.padding, recalled)
        predicting = [model.levels[i] for i in model.predict_from]
        return State(
            position=0,
            spec=self.state_spec,
            ids=zeros(batch_size, before).long() if before else None,
            contexts=None if recall is None else zeros(batch_size, recalled, len(recall.contexts)).long(),
            embeds=tuple(unread(i) for i in range(len(model.levels))),
            blocks=tuple(
                tuple(BlockState() if block is None else block.initial_state(batch_size, like) for block in layer)
                for layer in cast(Any, model.layers)
            ),
            merges=(
                *(merge.initial_state(batch_size, like) for merge in cast(Any, model.hierarchical_merges)),
                tuple(zeros(batch_size, 1, level.dim) if level.spacing > 1 else None for level in predicting),
            ),
            placed=tuple(placed(i) for i in range(len(model.levels))),
        )

    @property
    def state_spec(self) -> tuple[Any, ...]:
        """What the shape and the meaning of a state depend on. States of models that differ in it are refused."""
        model = cast('HierarchicalTransformer', self)
        ngrams, recall = model.ngram_emb, model.recall_emb
        return (
            model.seq_len,
            len(model.layers),
            None if ngrams is None else ngrams.contexts,
            None if recall is None else recall.contexts,
            # a user may switch it
            model.reversible,
            model.layout,
        )

    def reserve(self, state: State, n: int) -> State:
        """`state` with room for `n` more ids in all its parts, so that they stay where they are in memory."""
        model = cast('HierarchicalTransformer', self)
        state = with_room(model, state, n)

        def reserved(level: Level, block: Any, held: BlockState) -> BlockState:
            if block is None or level.is_placed:
                return held
            grown: BlockState = block.with_room(held, Grid(level.phases).count(level.length(state.position + n)))
            return grown

        def layer_reserved(layer: Sequence[Any], held: Sequence[BlockState]) -> tuple[BlockState, ...]:
            return tuple(reserved(*each) for each in zip(model.levels, layer, held, strict=True))

        layers = cast(Sequence[Any], model.layers)
        return replace(state, blocks=tuple(map(layer_reserved, layers, state.blocks)))

    def check_state(self, state: State, ids: Tensor) -> None:
        """Raises ValueError where a state is not of this model, or not for these ids `(batch, n)`."""
        if not isinstance(state, State):
            raise ValueError(f'state must be what return_state gave, got {type(state).__name__}')
        if state.spec != self.state_spec:
            raise ValueError(
                'state is of another model: its n-grams, recall, levels, depth, seq_len, arrangement, merges or '
                'predicting levels differ'
            )
        state.check_valid()
        like = cast('HierarchicalTransformer', self).token_emb.weight
        for name, got, expected in (
            ('batch size', state.batch_size, ids.shape[0]),
            ('dtype', state.dtype, like.dtype),
            ('device', state.device, like.device),
        ):
            if got != expected:
                raise ValueError(f'state must have {name} {expected}, got {got}')

    def open_memory(self, ids: Tensor, state: State | None, return_state: bool) -> Memory:
        """The memory of a pass over ids `(batch, n)`. Without gradients, the state is consumed by it.

        Raises ValueError where the state does not fit, or the ids are too many for a pass without a state.
        """
        model = cast('HierarchicalTransformer', self)
        if state is not None:
            self.check_state(state, ids)
            if not return_state:
                raise ValueError('state is consumed: return_state = True hands it back, and was not given')
            return Memory(state.writable())
        if return_state:
            return Memory(self.initial_state(ids.shape[0]))
        if ids.shape[1] > model.seq_len:
            raise ValueError(f'ids must have at most seq_len = {model.seq_len} tokens in a pass, got {ids.shape[1]}')
        return Memory(None)
