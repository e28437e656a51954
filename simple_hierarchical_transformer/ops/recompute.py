"""What is computed again in the backward pass, with the modules as they were in the forward pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear import has_hooks

# the tables in which a module registers hooks that its calls run
HOOKS = [name for name, table in vars(nn.Module()).items() if 'ward' in name and isinstance(table, dict)]

PACKAGE = __name__.partition('.')[0]


class Snapshot:
    """What modules and all inside them hold at the moment: tensors, submodules, hooks, modes, generators.

    Tensors are not copied. It is made for each layer of each step, so that every microsecond counts.
    """

    def __init__(self, roots: Iterable[nn.Module | None]) -> None:
        # each with its mode, parameters, buffers, submodules, and tables of hooks if it has any
        self.held: list[tuple[nn.Module, bool, dict[str, Any], dict[str, Any], dict[str, Any], Any]] = []
        self.generators: list[torch.Generator] = []
        # buffers that a forward pass may write, of modules that are not this package's: with their values
        self.written: list[tuple[dict[str, Any], str, Tensor]] = []
        self.has_hooks = False
        modules, seen = [*roots], set()
        found: list[Any] = []
        for module in modules:
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            parameters, buffers, children = module._parameters, module._buffers, module._modules
            hooks = None
            if has_hooks(module):
                hooks, self.has_hooks = {name: table.copy() for name, table in tables_of_hooks(module)}, True
            self.held.append((module, module.training, {**parameters}, {**buffers}, {**children}, hooks))
            found += parameters.values()
            modules += children.values()
            kind: Any = type(module)
            if buffers and not kind.__module__.startswith(f'{PACKAGE}.'):
                self.written += [
                    (buffers, name, each.detach().clone()) for name, each in buffers.items() if each is not None
                ]
            if not is_known(kind):
                self.generators += [value for value in vars(module).values() if isinstance(value, torch.Generator)]
        self.parameters: list[Tensor] = list({id(p): p for p in found if p is not None}.values())

    def is_current(self) -> bool:
        """Whether the modules still hold that, generators aside."""
        for module, training, parameters, buffers, children, hooks in self.held:
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
        """Inside, the modules hold what they held. What was changed since is there again after.

        It holds for weights that `functional_call` put in for a call, for another mode (`train()`, `eval()`), and for
        modules, hooks and buffers that were replaced, added or removed.
        """
        if self.is_current() and not self.written:
            yield
            return
        undo: list[tuple[Any, Any, Any]] = []
        modes = [(module, module.training) for module, mode, *_ in self.held if module.training is not mode]

        def put(table: Any, name: str, value: Any) -> None:
            undo.append((table, name, table[name]))
            table[name] = value

        try:
            for module, training in modes:
                module.training = not training
            for module, _, parameters, buffers, children, hooks in self.held:
                tables: Any = (
                    (module._parameters, parameters),
                    (module._buffers, buffers),
                    (module._modules, children),
                )
                for table, old in tables:
                    for name, value in old.items():
                        # FSDP puts whole weights in place of shards for as long as a layer runs
                        if name in table and table[name] is not value and not is_sharding(table[name], value):
                            put(table, name, value)
                if hooks or has_hooks(module):
                    for name, _ in tables_of_hooks(module):
                        put(vars(module), name, OrderedDict() if hooks is None else hooks[name])
            for table, name, value in self.written:
                # a copy is written in place of the buffer, which the forward pass has written already
                if name in table:
                    put(table, name, value.clone())
            yield
        finally:
            for table, name, value in reversed(undo):
                table[name] = value
            for module, training in modes:
                module.training = training


def tables_of_hooks(module: nn.Module) -> list[tuple[str, dict[Any, Any]]]:
    return [(name, vars(module)[name]) for name in HOOKS if name in vars(module)]


def is_sharding(one: Any, other: Any) -> bool:
    """Whether one of them is sharded and the other is not."""
    return hasattr(one, 'full_tensor') != hasattr(other, 'full_tensor')


def same(table: Any, old: dict[str, Any]) -> bool:
    return len(table) == len(old) and all(map(is_, table.values(), old.values()))


@lru_cache(maxsize=1024)
def is_known(kind: Any) -> bool:
    """Whether a class of modules is one of PyTorch or this package, whose modules have no generators."""
    bases = (base for base in kind.__mro__ if issubclass(base, nn.Module))
    return all(base.__module__.partition('.')[0] in ('torch', PACKAGE) for base in bases)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written in place."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        # tensors of inference mode do not count
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def recompute(fn: Callable[..., Any], modules: Sequence[nn.Module], *args: Any, preserve_rng_state: bool = True) -> Any:
    """`fn(*args)`, computed again in the backward pass in place of keeping what it computes on the way.

    `modules` are all that `fn` calls. In the backward pass they are as they were (`Snapshot.restored`), and random
    numbers from PyTorch's default generators and from generators that are attributes of `modules` are drawn again.
    Where there is no gradient, and under the transforms of torch.func, `fn` is called and nothing more.

    The backward pass raises RuntimeError where parameters were written in place since.
    """
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return fn(*args)
    if torch.compiler.is_compiling():
        # a compiler's graph holds what it reads
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    before: tuple[Snapshot, list[int], list[Tensor]] | None = None

    def run(*args: Any) -> Any:
        nonlocal before
        if before is None:
            now = Snapshot(modules)
            drawn = [generator.get_state() for generator in now.generators]
            out = fn(*args)
            before = now, versions(now.parameters), drawn
            return out

        now, written, drawn = before
        if versions(now.parameters) != written:
            raise RuntimeError(
                'weights were changed in place after the forward pass (optimizer.step, load_state_dict, an average '
                'swapped in), and layers that are computed again (gradient_checkpointing, ff_chunks) need them as they '
                'were: run the backward pass first'
            )
        with now.restored(), generators_at(now.generators, drawn):
            return fn(*args)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def generators_at(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> Iterator[None]:
    """Inside, generators draw what came after `states`. Outside, they go on as if nothing had been drawn."""
    now = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in zip(generators, now, strict=True):
            generator.set_state(state)
