"""Declarations of modules about their weights: roles, levels and the number of tokens that each weight reads.

A module declares in its class, and only where a default is wrong:

- `roles`, a mapping from the names of its own parameters and direct children to one of `ROLES`;
- `token_counts(n)`, the parts that do not process the `n` tokens that the module reads, with their numbers of tokens;
- `operations(n)`, the number of operations to read `n` tokens, without products with weights;
- `by_level()`, the parts of each hierarchy level. Only the model declares it.

`walk` reads these declarations. They reach through wrappers (`torch.compile`, FSDP2, PEFT, parametrizations), because
parts without a declaration inherit that of the module around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..checks import check_choice

MATRIX = 'matrix'
"""Multiplies tokens. The default for two or more dimensions."""
VECTOR = 'vector'
"""A bias or a gain. The default for one dimension, and for every parameter whose name ends with 'bias'."""
HEAD = 'head'
"""A matrix that maps to ids. It has a row for each id, so a rotation of its rows means nothing."""
LOOKUP = 'lookup'
"""A table whose rows are looked up."""
ROWS = 'rows'
"""A table. Each step reads only a few of its rows, so it is updated row by row."""
KERNEL = 'kernel'
"""A convolution kernel, or a weight that generates one. No token is multiplied with it."""
ROLES = (MATRIX, VECTOR, HEAD, LOOKUP, ROWS, KERNEL)

Part = nn.Module | nn.Parameter


class Weight(NamedTuple):
    """A parameter at one of its places in the model."""

    parameter: nn.Parameter
    role: str
    level: int | None
    """The index of its level. None if several levels use it."""
    tokens: float
    """How many tokens read it."""

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies tokens."""
        return self.role in (MATRIX, HEAD)


class Visit(NamedTuple):
    """A module at one of its places in the model."""

    module: nn.Module
    tokens: float
    """How many tokens it reads."""
    weights: list[Weight]
    """Its own parameters, without those of its children."""


def walk(module: nn.Module, tokens: float = 1.0) -> Iterator[Visit]:
    """Visits a module that reads `tokens` tokens, and all modules inside it, in the order of `named_modules`.

    A module that stands in several places is visited in each of them. The declaration closest to a parameter wins.

    Raises ValueError if a class declares a role that does not exist.
    """
    yield from _walk(module, tokens, None, None, {}, {})


def _walk(
    module: nn.Module,
    tokens: float,
    role: str | None,
    level: int | None,
    counts: Mapping[Part, float],
    levels: Mapping[Part, int],
    around: Mapping[str, str] | None = None,
) -> Iterator[Visit]:
    tokens, level = counts.get(module, tokens), levels.get(module, level)
    # from the class: wrappers forward other attributes to the module that they wrap
    kind: Any = type(module)
    roles = declared_roles(kind) if around is None else around
    if callable(getattr(kind, 'by_level', None)):
        levels = {**levels, **dict(kind.by_level(module))}
    if callable(getattr(kind, 'token_counts', None)):
        found: Iterable[tuple[Part, float]] = kind.token_counts(module, tokens)
        counts = {**counts, **dict(found)}

    weights = [
        Weight(p, role_of(name, p, roles.get(name, role)), levels.get(p, level), counts.get(p, tokens))
        for name, p in module._parameters.items()
        if p is not None
    ]
    yield Visit(module, tokens, weights)
    for name, child in module._modules.items():
        if child is not None:
            # parametrizations hold a module's own parameters, under their names
            inherited = roles if name == 'parametrizations' else None
            yield from _walk(child, tokens, roles.get(name, role), level, counts, levels, inherited)


def declared_roles(kind: type[nn.Module]) -> Mapping[str, str]:
    roles = getattr(kind, 'roles', {})
    if not isinstance(roles, Mapping):
        # a class of another library, where the attribute means something else
        return {}
    for name, role in roles.items():
        check_choice(f'{kind.__name__}.roles[{name!r}]', role, ROLES)
    return roles


def role_of(name: str, parameter: nn.Parameter, declared: str | None) -> str:
    """The role of a parameter. `declared` is the role that its module declares, if any."""
    if declared in (ROWS, KERNEL):
        return declared
    if parameter.ndim < 2 or name.endswith('bias'):
        return VECTOR
    return declared or MATRIX
