"""How options are declared: default, check and one line of help in one place.

`Config` is a dataclass of `option`s. What shows options to people, or passes them on, reads the dataclass.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, field, fields
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from .checks import MOST, MOST_IN_TURN, check_choice, check_int, check_number, check_sequence, is_int

P = ParamSpec('P')
M = TypeVar('M')
C = TypeVar('C')
Check = Callable[[str, Any], object]


def about(*, help: str, check: Check | None = None, per_level: bool = False) -> dict[str, Any]:
    """The metadata of an option. With `per_level`, it takes one value, or one for each hierarchy; `check` gets each."""
    return dict(help=help, check=check, per_level=per_level)


def option(default: Any, *, help: str, check: Check | None = None, per_level: bool = False) -> Any:
    """A field of `Config` with a default. Required options are plain fields, so that type checkers require them."""
    return field(default=default, metadata=about(help=help, check=check, per_level=per_level))


def integer(minimum: int = 1, maximum: int = MOST) -> Check:
    return lambda name, value: check_int(name, value, minimum, maximum)


def choice(*allowed: str) -> Check:
    return lambda name, value: check_choice(name, value, allowed)


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}')


def check_id(name: str, value: Any) -> None:
    if not is_int(value):
        raise ValueError(f'{name} must be an integer, got {value!r}')
    check_int(name, value, -MOST)


def check_power_of_two(name: str, value: Any) -> None:
    if check_int(name, value, 2) & (value - 1):
        raise ValueError(f'{name} must be a power of two, got {value}')


def check_share(name: str, value: Any) -> None:
    if check_number(name, value) >= 1:
        raise ValueError(f'{name} must be at least 0 and below 1, got {value!r}')


def check_sample(name: str, value: Any) -> None:
    if not 0 < check_number(name, value) <= 1:
        raise ValueError(f'{name} must be above 0 and at most 1, got {value!r}')


def orders(least: int) -> Check:
    """Checks a sequence of different integers, each at least `least`."""

    def check(name: str, value: Any) -> None:
        check_sequence(name, value)
        for order in value:
            check_int(name, order, least, MOST_IN_TURN)
        if len(set(value)) != len(value):
            raise ValueError(f'{name} must all differ, got {value!r}')

    return check


def default_of(each: Field[Any]) -> str:
    """The default of an option as Python writes it, empty where it has none."""
    return '' if each.default is MISSING else repr(each.default)


def describe(config: type[Any], indent: int = 8, skip: Collection[str] = ()) -> str:
    """The options with their defaults and help, as in the `Args` section of a docstring, without those in `skip`."""
    lines = []
    for each in fields(config):
        if each.name in skip:
            continue
        text = f'{each.name}: {each.metadata["help"]}'
        if each.default is not MISSING:
            text += f' Default: {default_of(each)}.'
        lines += textwrap.wrap(text, 118, initial_indent=' ' * indent, subsequent_indent=' ' * (indent + 4))
    return '\n'.join(lines)


def list_per_level(config: type[Any], indent: int = 4) -> str:
    """The names of the options that take one value for each level, as lines of a docstring."""
    names = ', '.join(f'`{each.name}`' for each in fields(config) if each.metadata['per_level'])
    return textwrap.fill(f'{names}.', 118, initial_indent=' ' * indent, subsequent_indent=' ' * indent)


def takes_options(config: Callable[P, C]) -> Callable[[Callable[[M, C], None]], Callable[Concatenate[M, P], None]]:
    """Decorates a constructor that takes a `config`, so that callers give its options as keyword arguments."""
    given, owner = inspect.signature(config), config.__init__.__qualname__
    annotations = {**get_type_hints(config.__init__), 'return': type(None)}

    def decorate(init: Callable[[M, C], None]) -> Callable[Concatenate[M, P], None]:
        @wraps(init, assigned=('__module__', '__name__', '__qualname__', '__doc__'))
        def with_options(self: M, *args: P.args, **kwargs: P.kwargs) -> None:
            try:
                made = config(*args, **kwargs)
            except TypeError as error:
                if owner not in str(error):
                    raise
                # of a wrong name, or a missing option
                raise TypeError(str(error).replace(owner, init.__qualname__)) from None
            init(self, made)

        own = inspect.Parameter('self', inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([own, *given.parameters.values()], return_annotation=None)
        vars(with_options)['__signature__'] = signature
        with_options.__annotations__ = annotations
        # what unwraps functions would find a constructor that takes a config
        del vars(with_options)['__wrapped__']
        return with_options

    return decorate
