"""Steps of generation as CUDA graphs.

A step launches hundreds of small kernels. A CUDA graph launches all of them at once.

A captured graph repeats its kernels with the arguments of the capture. A step depends on its position in two ways.
First, the position modulo the compressions decides which levels have a new token. Each residue therefore has its own
graph. Second, the position decides where keys are written and by which angle they are rotated. It is therefore a tensor
that a replay reads (`Position`).
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..memory import ROOM, State
from ..mixers.rotary import BLOCK, Rotary
from ..ops.linear import is_dense, is_untouched
from ..ops.precision import autocast_dtype
from ..ops.tracing import is_traced
from ..positions import Clock, Position
from .protocol import StatefulModel

if TYPE_CHECKING:
    from ..block import HierarchicalBlock
    from ..levels import Level

# with more residues, capturing would take longer than generating most texts
MOST_RESIDUES = 64
# capturing saves time from this many steps per residue on
MIN_ROUNDS = 3
CAPTURING = threading.Lock()
PACKAGE = __name__.partition('.')[0]


class CapturableModel(StatefulModel, Protocol):
    """The parts of this package's model that captured steps depend on."""

    levels: Sequence[Level]
    layers: Sequence[Sequence[HierarchicalBlock | None]]
    hierarchical_merges: nn.ModuleList

    @property
    def silent(self) -> frozenset[int]:
        """The compressions of the ablated levels."""

    def reserve(self, state: State, n: int) -> State:
        """`state` with room for `n` more ids, so that its tensors stay at the same address."""

    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[Tensor]: ...


def is_capturable(model: StatefulModel) -> TypeGuard[CapturableModel]:
    """Whether every step of the model is the same sequence of kernels and nothing else.

    False if a module belongs to neither this package nor torch.nn, has hooks, or is patched or compiled: a replay would
    skip its Python code. False for mixers whose work depends on the position, and for placed levels, which have a new
    token wherever the text has a boundary.
    """
    levels = getattr(model, 'levels', None)
    if not isinstance(model, nn.Module) or not isinstance(levels, (list, tuple)):
        return False
    if any(getattr(level, 'is_placed', False) for level in levels):
        return False
    if _has_any_global_hook() or is_traced():
        return False
    for module in model.modules():
        known = type(module).__module__.startswith((f'{PACKAGE}.', 'torch.nn.modules'))
        if not known or not is_untouched(module) or not getattr(module, 'static_step', True):
            return False
    return is_dense(*model.parameters()) and cycle_of(levels) <= MOST_RESIDUES


def cycle_of(levels: Sequence[Level]) -> int:
    """The number of residues: after this many ids, the same levels get a new token again."""
    return math.lcm(*(level.compression for level in levels))


def pays_to_capture(model: StatefulModel, steps: int) -> TypeGuard[CapturableModel]:
    """Whether capturing `steps` steps of the model saves time. False on devices without CUDA graphs."""
    embedding = getattr(model, 'token_emb', None)
    if embedding is None or embedding.weight.device.type != 'cuda' or not is_capturable(model):
        return False
    return steps >= MIN_ROUNDS * cycle_of(model.levels)


def fingerprint(model: CapturableModel) -> list[object]:
    """All that replays depend on: modules, their modes and settings, addresses of weights, ablations and autocast."""
    tensors = chain(model.parameters(), model.buffers())
    modules = [(module, module.training, module.extra_repr()) for module in model.modules()]
    return [model.silent, autocast_dtype(next(model.parameters()).device), *modules, *(t.data_ptr() for t in tensors)]


def share_angles(model: CapturableModel) -> dict[Rotary, Rotary]:
    """Maps each rotary embedding to the first one that rotates by the same angles.

    All layers of a level do, unless a user changed one. Each comparison synchronizes with the device.
    """
    rotaries = [module for module in model.modules() if isinstance(module, Rotary)]
    return {module: next((other for other in rotaries if other.agrees(module)), module) for module in rotaries}


class CapturedSteps:
    """Runs steps of a model by replaying CUDA graphs.

    `logits, state = steps(ids, state)` returns what `model(ids, state=state, return_state=True)` returns for ids
    `(batch, 1)`. The first step of each residue runs eagerly, and the second one is captured. A replay writes the state
    in place, as an eager step does. The next step overwrites the logits `(batch, 1, num_tokens)`.

    Args:
        model: the model to run.
        watched: whether the model may change between two steps. Each step then checks for changes.
    """

    def __init__(self, model: CapturableModel, *, watched: bool = False) -> None:
        self.model = model
        self.watched = watched
        device = model.token_emb.weight.device
        self.cycle = cycle_of(model.levels)
        # before this position, windows still reach beyond the first token
        windows = [getattr(merge, 'window', 0) for merge in model.hierarchical_merges]
        self.settled = 2 * self.cycle * (1 + max(windows, default=0))
        # a step does extra work at positions where full attention moves the origin of its decay
        self.blocks = {
            BLOCK * level.compression
            for layer in model.layers
            for level, block in zip(model.levels, layer, strict=True)
            if block is not None and getattr(getattr(block.attn, 'rotary_emb', None), 'xpos', False)
        }
        self.rounds = torch.zeros((), dtype=torch.long, device=device)
        # computed by the first step that needs it. A watched model may change the angles of a layer at any time
        self.shared_angles: dict[Rotary, Rotary] | None = {} if watched else None
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.reserved = 0
        self.fingerprint = fingerprint(model)
        self.forget()

    def is_unchanged(self) -> bool:
        """Whether steps can still be captured. Discards the graphs if the model has changed."""
        if not is_capturable(self.model):
            return False
        if (found := fingerprint(self.model)) != self.fingerprint:
            self.forget()
            self.fingerprint = found
        return True

    def forget(self) -> None:
        """Discards all graphs."""
        # memory is freed with its pool, once no graph uses it
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None
        self.warm: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.addresses: list[int] = []
        self.ids: Tensor | None = None
        self.logits: Tensor | None = None

    def __call__(self, ids: Tensor, state: State, steps: int = 0) -> tuple[Tensor, State]:
        """Reads ids `(batch, 1)` after `state`. `steps` is an upper bound on how many steps will follow."""
        if self.watched and not self.is_unchanged():
            return self.model(ids, state=state, return_state=True)
        position, residue = state.position, state.position % self.cycle
        if position < self.settled or any(position % block < block // BLOCK for block in self.blocks):
            return self.model(ids, state=state, return_state=True)
        state.check_valid()
        state = state.writable()
        if not position < self.reserved:
            # not for all steps, because only a few of them may be taken
            more = max(min(steps, ROOM), 1)
            state, self.reserved = self.model.reserve(state, more), position + more
        addresses = [tensor.data_ptr() for tensor in state.tensors()]
        if addresses != self.addresses:
            self.forget()
            self.addresses, self.ids = addresses, torch.empty_like(ids)
        assert self.ids is not None
        self.ids.copy_(ids)
        self.rounds.fill_(position // self.cycle)
        if self.shared_angles is None:
            self.shared_angles = share_angles(self.model)
        state.consume()
        before = replace(state, overwritten=[False])

        if residue not in self.warm:
            self.warm.add(residue)
            with self.side_stream():
                logits = self.step(before)
            self.logits = torch.empty_like(logits) if self.logits is None else self.logits
            self.logits.copy_(logits)
        else:
            if residue not in self.graphs:
                self.graphs[residue] = self.capture(before)
            self.graphs[residue].replay()
        assert self.logits is not None
        return self.logits, replace(state, position=position + 1, overwritten=[False])

    def step(self, state: State) -> Tensor:
        """The logits of a step, computed from the tensors that replays read."""
        assert self.ids is not None
        clock = Clock(self.rounds, self.shared_angles)
        position = Position(state.position, clock, self.cycle, state.position % self.cycle)
        # the cache of autocast would keep copies of weights from inside the graph and use them in later operations
        dtype = autocast_dtype(self.rounds.device)
        kind = self.rounds.device.type
        uncached = nullcontext() if dtype is None else torch.autocast(kind, dtype=dtype, cache_enabled=False)
        with uncached:
            logits, after = self.model(self.ids, state=replace(state, position=position), return_state=True)
        if [tensor.data_ptr() for tensor in after.tensors()] != self.addresses:
            raise RuntimeError('a step of generation did not write the state in place')
        return logits

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Runs on the stream that graphs are captured on, in order with the current stream."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, state: State) -> torch.cuda.CUDAGraph:
        """Captures a step without running it."""
        graph = torch.cuda.CUDAGraph()
        # one thread at a time, because garbage collection is disabled for the whole process
        with CAPTURING:
            collects = gc.isenabled()
            # a graph must not contain the frees of a garbage collection
            gc.disable()
            try:
                with self.side_stream():
                    graph.capture_begin(pool=self.pool, capture_error_mode='thread_local')
                    try:
                        assert self.logits is not None
                        self.logits.copy_(self.step(state))
                    finally:
                        graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        return graph
