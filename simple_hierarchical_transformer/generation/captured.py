"""A step of generation as CUDA graphs: launched once, where a step by itself launches hundreds of small kernels.

A captured graph repeats its kernels with the numbers that they were launched with. What a step does depends on its
position in two ways. Which levels have a new token depends on the position modulo the compressions: so there is a graph
for each residue. Where keys are written and by which angle they are turned depends on the position itself: so the
position is a tensor there, which a replay reads (`Position`).
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..memory import ROOM, Clock, Position, State
from ..mixers.rotary import BLOCK, Rotary
from ..ops.linear import is_dense, is_untouched
from ..ops.precision import autocast_dtype
from ..ops.tracing import is_traced

# more residues would take longer to capture than most texts take to write
MOST_RESIDUES = 64
# from how many steps for each residue on capturing pays
PAYS = 3
CAPTURING = threading.Lock()
PACKAGE = __name__.partition('.')[0]


def is_capturable(model: Any) -> bool:
    """Whether a step of the model is always the same sequence of kernels, and nothing else.

    False where a module is neither of this package nor of torch.nn, has hooks, or is patched or compiled: what it does
    in Python would not happen in a replay. False for mixers whose work depends on the position.
    """
    if not isinstance(getattr(model, 'levels', None), (list, tuple)) or _has_any_global_hook() or is_traced():
        return False
    for module in model.modules():
        known = type(module).__module__.startswith((f'{PACKAGE}.', 'torch.nn.modules'))
        if not known or not is_untouched(module) or not getattr(module, 'static_step', True):
            return False
    return is_dense(*model.parameters()) and math.lcm(*compressions(model)) <= MOST_RESIDUES


def compressions(model: Any) -> list[int]:
    return [level.compression for level in model.levels]


def pays_to_capture(model: Any, steps: int) -> bool:
    """Whether `steps` steps of the model are worth capturing, on a device that has graphs."""
    embedding = getattr(model, 'token_emb', None)
    if embedding is None or embedding.weight.device.type != 'cuda' or not is_capturable(model):
        return False
    return steps >= PAYS * math.lcm(*compressions(model))


def fingerprint(model: nn.Module) -> list[Any]:
    """What replays rely on: modules, their modes and settings, the memory of weights, what is ablated, autocast."""
    tensors = chain(model.parameters(), model.buffers())
    modules = [(module, module.training, module.extra_repr()) for module in model.modules()]
    return [model.silent, autocast_dtype(next(model.parameters()).device), *modules, *(t.data_ptr() for t in tensors)]


class CapturedSteps:
    """`logits, state = steps(ids, state)` for ids `(batch, 1)`: what the model gives, by replays where it can be.

    The first step of each residue runs as it is, the second is captured. A replay writes the state in place, as a step
    does. The logits `(batch, 1, num_tokens)` are overwritten by the next step.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        device = model.token_emb.weight.device
        self.cycle = math.lcm(*compressions(model))
        # before this, windows still reach back to before the first token
        windows = [getattr(merge, 'window', 0) for merge in model.hierarchical_merges]
        self.settled = 2 * self.cycle * (1 + max(windows, default=0))
        # where full attention moves the origin of its decay, a step does more than others
        self.blocks = {
            BLOCK * level.compression
            for layer in model.layers
            for level, block in zip(model.levels, layer, strict=True)
            if block is not None and getattr(getattr(block.attn, 'rotary_emb', None), 'xpos', False)
        }
        self.rounds = torch.zeros((), dtype=torch.long, device=device)
        # layers of a level turn by the same angles, unless somebody changed one
        self.alike: dict[Any, Any] = {}
        rotaries = [module for module in model.modules() if isinstance(module, Rotary)]
        for module in rotaries:
            self.alike[module] = next((other for other in rotaries if other.agrees(module)), module)
        self.stream: Any = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.reserved = 0
        self.fingerprint = fingerprint(model)
        self.forget()

    def is_unchanged(self) -> bool:
        """Whether steps may be captured still. Forgets those that were, where the model is another now."""
        if not is_capturable(self.model):
            return False
        if (now := fingerprint(self.model)) != self.fingerprint:
            self.forget()
            self.fingerprint = now
        return True

    def forget(self) -> None:
        # memory that no graph uses any more is given back, and its pool is gone
        self.pool: Any = torch.cuda.graph_pool_handle() if self.stream is not None else None
        self.warm: set[int] = set()
        self.graphs: dict[int, Any] = {}
        self.held: list[int] = []
        self.ids: Tensor | None = None
        self.logits: Tensor | None = None

    def __call__(self, ids: Tensor, state: State, steps: int = 0, watched: bool = False) -> tuple[Tensor, State]:
        """`steps` is how many are to come at most. With `watched` the model may have changed since the last step."""
        if watched:
            # whoever changes values may change those of one layer
            self.alike = {}
            if not self.is_unchanged():
                return self.model(ids, state=state, return_state=True)
        position, residue = state.position, state.position % self.cycle
        if position < self.settled or any(position % block < block // BLOCK for block in self.blocks):
            return self.model(ids, state=state, return_state=True)
        state.check_valid()
        state = state.writable()
        if not position < self.reserved:
            # not for all steps, of which few may come
            more = max(min(steps, ROOM), 1)
            state, self.reserved = self.model.reserve(state, more), position + more
        held = [tensor.data_ptr() for tensor in state.tensors()]
        if held != self.held:
            self.forget()
            self.held, self.ids = held, torch.empty_like(ids)
        assert self.ids is not None
        self.ids.copy_(ids)
        self.rounds.fill_(position // self.cycle)
        state.consume()
        before = replace(state, overwritten=[False])

        if residue not in self.warm:
            self.warm.add(residue)
            with self.beside():
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
        """The logits of a step from the tensors that replays read."""
        residue = state.position % self.cycle
        position = Position(state.position, Clock(self.rounds, self.alike), self.cycle, residue)
        # autocast would keep copies of weights that are made in a graph for what comes after
        dtype = autocast_dtype(self.rounds.device)
        kind = self.rounds.device.type
        uncached = nullcontext() if dtype is None else torch.autocast(kind, dtype=dtype, cache_enabled=False)
        with uncached:
            logits, after = self.model(self.ids, state=replace(state, position=position), return_state=True)
        if [tensor.data_ptr() for tensor in after.tensors()] != self.held:
            raise RuntimeError('a step of generation did not write the state in place')
        return logits

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream that graphs are captured on, after what was asked for before and before what comes."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, state: State) -> Any:
        """A graph of a step, which is not run yet."""
        graph = torch.cuda.CUDAGraph()
        # one thread at a time: garbage collection is switched off for all of them
        with CAPTURING:
            collects = gc.isenabled()
            # what a collection frees must not become part of a graph
            gc.disable()
            try:
                with self.beside():
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
