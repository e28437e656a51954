"""Recomputation in the backward pass, with the contents that modules had in the forward pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear import has_hooks
from .rng import get_rng_states, replay_rng
from .tracing import is_transformed

# names of the tables that hold the hooks of a module's forward and backward pass
HOOKS = [name for name, table in vars(nn.Module()).items() if 'ward' in name and isinstance(table, dict)]

PACKAGE = __name__.partition('.')[0]

Result = TypeVar('Result')
Hooks = dict[str, dict[int, Callable[..., Any]]]
ModuleState = tuple[
    nn.Module, bool, dict[str, nn.Parameter | None], dict[str, Tensor | None], dict[str, nn.Module | None], Hooks | None
]


class Snapshot:
    """The contents of modules and their submodules: tensors, submodules, hooks, training modes and generators.

    Tensors are not copied. Each layer takes a snapshot in each training step, so it must be fast.

    Args:
        roots: modules; None is skipped.
    """

    def __init__(self, roots: Iterable[nn.Module | None]) -> None:
        # each module with its mode, parameters, buffers, submodules, and copies of its tables of hooks if it has any
        self.modules: list[ModuleState] = []
        self.generators: list[torch.Generator] = []
        # buffers that a forward pass may write, with copies of their values; modules of this package have none
        self.written: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self.has_hooks = False
        modules, seen = [*roots], set()
        parameters_found: list[Tensor | None] = []
        for module in modules:
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            parameters, buffers, children = module._parameters, module._buffers, module._modules
            hooks = None
            if has_hooks(module):
                hooks, self.has_hooks = {name: table.copy() for name, table in hook_tables(module)}, True
            self.modules.append((module, module.training, {**parameters}, {**buffers}, {**children}, hooks))
            parameters_found += parameters.values()
            modules += children.values()
            kind: type = type(module)
            if buffers and not kind.__module__.startswith(f'{PACKAGE}.'):
                self.written += [
                    (buffers, name, each.detach().clone()) for name, each in buffers.items() if each is not None
                ]
            if not is_known(kind):
                self.generators += [value for value in vars(module).values() if isinstance(value, torch.Generator)]
        self.parameters: list[Tensor] = list({id(p): p for p in parameters_found if p is not None}.values())

    def is_current(self) -> bool:
        """Whether the modules still have these contents, apart from generators."""
        for module, training, parameters, buffers, children, hooks in self.modules:
            if (
                module.training is not training
                or hooks is not None
                or has_hooks(module)
                or not same(module._parameters, parameters)
                or (buffers and not same(module._buffers, buffers))
                or (children and not same(module._modules, children))
            ):
                return False
        return True

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the modules have these contents again.

        This covers weights that `functional_call` swapped in for a call, modes (`train()`, `eval()`), and submodules,
        hooks and buffers that were replaced, added or removed.
        """
        if self.is_current() and not self.written:
            yield
            return
        undo: list[tuple[dict[str, Any], str, Any]] = []
        modes = [(module, module.training) for module, mode, *_ in self.modules if module.training is not mode]

        def replace(table: dict[str, Any], name: str, value: Any) -> None:
            undo.append((table, name, table[name]))
            table[name] = value

        try:
            for module, training in modes:
                module.training = not training
            for module, _, parameters, buffers, children, hooks in self.modules:
                tables: tuple[tuple[dict[str, Any], Mapping[str, Any]], ...] = (
                    (module._parameters, parameters),
                    (module._buffers, buffers),
                    (module._modules, children),
                )
                for table, old in tables:
                    for name, value in old.items():
                        # FSDP swaps in full weights while a layer runs, and these must stay
                        if name in table and table[name] is not value and not is_sharding(table[name], value):
                            replace(table, name, value)
                if hooks or has_hooks(module):
                    for name, _ in hook_tables(module):
                        replace(vars(module), name, OrderedDict() if hooks is None else hooks[name])
            for table, name, value in self.written:
                # a copy replaces the buffer, because the forward pass has already written to it
                if name in table:
                    replace(table, name, value.clone())
            yield
        finally:
            for table, name, value in reversed(undo):
                table[name] = value
            for module, training in modes:
                module.training = training


def hook_tables(module: nn.Module) -> list[tuple[str, dict[Any, Any]]]:
    return [(name, vars(module)[name]) for name in HOOKS if name in vars(module)]


def is_sharding(one: object, other: object) -> bool:
    """Whether one of these tensors is sharded and the other is not."""
    return hasattr(one, 'full_tensor') != hasattr(other, 'full_tensor')


def same(table: Mapping[str, object], old: Mapping[str, object]) -> bool:
    """Whether both tables hold the same objects in the same order."""
    return len(table) == len(old) and all(map(is_, table.values(), old.values()))


@lru_cache(maxsize=1024)
def is_known(kind: type) -> bool:
    """Whether a class of modules comes from PyTorch or this package: these have no generators as attributes."""
    bases = (base for base in kind.__mro__ if issubclass(base, nn.Module))
    return all(base.__module__.partition('.')[0] in ('torch', PACKAGE) for base in bases)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written in place."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        # tensors created in inference mode have no version counter
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def recompute(
    fn: Callable[..., Result], modules: Sequence[nn.Module], *args: Any, preserve_rng_state: bool = True
) -> Result:
    """Computes `fn(*args)`, and again in the backward pass, without storing its intermediate results.

    In the backward pass the modules have the contents that they had in the forward pass (`Snapshot.restored`). Random
    numbers from PyTorch's default generators and from generators that are attributes of modules are drawn again. If
    gradients are disabled, and under transforms of torch.func, it only calls `fn`.

    Args:
        fn: a function of `args`.
        modules: all modules that `fn` calls.
        preserve_rng_state: whether to draw the same random numbers again from the default generators.

    Raises:
        RuntimeError: in the backward pass, if parameters were changed in place since the forward pass.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return fn(*args)
    if torch.compiler.is_compiling():
        # a graph holds the tensors that it reads, so no snapshot is needed
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    first: tuple[Snapshot, list[int], list[Tensor]] | None = None

    def run(*args: Any) -> Result:
        nonlocal first
        if first is None:
            snapshot = Snapshot(modules)
            states = get_rng_states(snapshot.generators)
            out = fn(*args)
            first = snapshot, versions(snapshot.parameters), states
            return out

        snapshot, written, states = first
        if versions(snapshot.parameters) != written:
            raise RuntimeError(
                'weights were changed in place after the forward pass (optimizer.step, load_state_dict, an average '
                'swapped in), but layers that are computed again (gradient_checkpointing, ff_chunks) need their old '
                'values: run the backward pass first'
            )
        with snapshot.restored(), replay_rng(states, snapshot.generators):
            return fn(*args)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
