"""Validation of arguments, with error messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from sys import _getframe
from typing import Any, ParamSpec

from torch import Tensor, nn

P = ParamSpec('P')

# modules whose frames are between a user's call and a warning of this package
INTERNAL = (__name__.partition('.')[0], 'functools')
# no tensor has a longer dimension
MOST = 10**12
# the largest number of parts that are built or run one after another
MOST_IN_TURN = 1 << 16
# products of two such numbers still fit into float32
LARGEST = 1e30
# the largest number of layers, rollout steps or codebooks: more take minutes to build, and are surely a mistake
MOST_PARTS = 4096


def plain(value: Any) -> Any:
    """Converts a value to Python's own numbers, lists, tuples and dicts, which JSON can represent.

    Numbers of NumPy and other libraries become ints or floats. Tensors and arrays become numbers or lists, other
    sequences become tuples, and other mappings dicts. Modules, classes, callables and strings are returned unchanged.
    """
    if value is None or isinstance(value, (str, bytes, bytearray, bool, type, nn.Module)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return (list if isinstance(value, list) else tuple)(plain(each) for each in value)
    # tensors, arrays and NumPy's booleans
    if hasattr(value, 'tolist') and not getattr(value, 'is_meta', False):
        return value.tolist()
    return value


def is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_int(name: str, value: Any, minimum: int = 1, maximum: int = MOST) -> int:
    """The value as an int. Raises ValueError if it is no integer or out of bounds."""
    number = plain(value)
    if not is_int(number) or number < minimum:
        raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}')
    if number > maximum:
        raise ValueError(f'{name} must be at most {maximum:,}, got {value!r}')
    return number


def check_number(name: str, value: Any, minimum: float = 0.0, maximum: float = LARGEST) -> float:
    """The value as an int or a float. Raises ValueError if it is no number, not finite or out of bounds."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not minimum <= number < float('inf'):
        raise ValueError(f'{name} must be a finite number of at least {minimum:g}, got {value!r}')
    if number > maximum:
        raise ValueError(f'{name} must be at most {maximum:g}, got {value!r}')
    return number


def check_int_list(name: str, value: Any, stop: int) -> list[int]:
    """A list of integers in `[0, stop)` from an int, or from an iterable, array or tensor of ints."""
    found = plain(value)
    if is_int(found):
        found = [found]
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, bytearray, Mapping)):
        raise ValueError(f'{name} must be integers in [0, {stop}), got {value!r}')
    found = [plain(each) for each in found]
    for each in found:
        if not is_int(each) or not 0 <= each < stop:
            raise ValueError(f'{name} must be in [0, {stop}), got {each!r}')
    return found


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f'{name} must be one of {", ".join(allowed)}, got {value!r}')


def check_output(name: str, out: Any, expected: tuple[int, ...], given: Tensor) -> Tensor:
    """The output of a user's module. Raises ValueError if it does not have the shape `expected`."""
    if not isinstance(out, Tensor) or out.shape != expected:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f'{name} must return shape {tuple(expected)} for an input {tuple(given.shape)}, got {got}')
    return out


def check_sequence(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)):
        raise ValueError(f'{name} must be a tuple or list, got {value!r}')


def per_level(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """The value for each level, from one value for all or from a tuple or list with one for each."""
    if not isinstance(value, (tuple, list)):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f'{name} must be one value or one for each of the {count} hierarchies, got {value!r}')
    return tuple(value)


def user_frame() -> int:
    """The `stacklevel` at which the caller of this function warns about the first frame outside of this package."""
    frame, level = _getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get('__name__', '').partition('.')[0] in INTERNAL:
        frame, level = frame.f_back, level + 1
    return level
