"""Positions whose values are also in device memory, so that CUDA graphs can read them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Shared by all positions of one captured step.

    Args:
        rounds: int64 `()`, on the device. A replay reads it.
        equivalents: maps modules with equal results to the one that computes the result for all of them.
    """

    def __init__(self, rounds: Tensor, equivalents: Mapping[Any, Any] | None = None) -> None:
        self.rounds = rounds
        self.equivalents = {} if equivalents is None else equivalents
        self.results: dict[Any, Any] = {}


class Position(int):
    """A position whose value is also in device memory: `clock.rounds * scale + offset`.

    It is an int. A CUDA graph captured with it is valid for every value of `rounds`, provided that the captured work
    depends only on `tensor` and on remainders by divisors of `scale`, and not on the int. Sums with ints, products, and
    quotients by divisors of `scale` are also positions. A remainder that depends on `rounds` raises
    NotImplementedError.

    Args:
        value: the int.
        clock: the clock of the step, which all its positions share.
        scale: the distance between positions with the same remainder.
        offset: the remainder.
    """

    clock: Clock
    scale: int
    offset: int

    def __new__(cls, value: int, clock: Clock, scale: int, offset: int) -> Position:
        self = super().__new__(cls, value)
        self.clock, self.scale, self.offset = clock, scale, offset
        return self

    @property
    def tensor(self) -> Tensor:
        """int64 `(1,)`."""
        rounds = self.clock.rounds
        return self.once('tensor', lambda: torch.full((1,), self.offset, device=rounds.device) + rounds * self.scale)

    def once(self, what: Hashable, make: Callable[[], Any], module: Any = None) -> Any:
        """The result of `make()`, computed once in a step. It must depend only on the position and on `what`.

        With `module`, the result also depends on the module. Modules that are `equivalents` share it.
        """
        key = (self.scale, self.offset, what, self.clock.equivalents.get(module, module))
        if key not in self.clock.results:
            self.clock.results[key] = make()
        return self.clock.results[key]

    def __neg__(self) -> Position:
        return Position(-int(self), self.clock, -self.scale, -self.offset)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Position) or not isinstance(other, int):
            # with a tensor it acts as an int
            return NotImplemented
        return Position(int(self) + other, self.clock, self.scale, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Position) and other.scale == self.scale:
            return self.offset - other.offset
        return self + -other if isinstance(other, int) else NotImplemented

    def __mul__(self, factor: int) -> Position:
        return Position(int(self) * factor, self.clock, self.scale * factor, self.offset * factor)

    def __floordiv__(self, divisor: int) -> Position:
        self.check_divisor(divisor)
        return Position(int(self) // divisor, self.clock, self.scale // divisor, self.offset // divisor)

    def __mod__(self, divisor: int) -> int:
        self.check_divisor(divisor)
        return self.offset % divisor

    def check_divisor(self, divisor: int) -> None:
        if self.scale % divisor:
            raise NotImplementedError(f'positions {self.scale} apart have no common remainder by {divisor}')
