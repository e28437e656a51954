"""One hierarchy level: its settings, and the arithmetic of its stride."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .checks import MOST, MOST_IN_TURN, check_int, check_number, is_int, per_level, user_frame

if TYPE_CHECKING:
    from .config import Config

COMPRESSORS = ('conv', 'attention', 'mean', 'linear')
# stands for a user's module in `Level.compressor`
OWN = 'module'


class Grid(NamedTuple):
    """Positions 0, stride, 2 * stride, ...: where the tokens of a level stand in a finer sequence.

    Positions may be `memory.Position`s, whose values a CUDA graph reads from memory.
    """

    stride: int

    def count(self, n: int) -> int:
        """The number of grid positions below `n`. It is also the index of the first grid position from `n` on."""
        return -(-n // self.stride)

    def offset(self, position: int) -> int:
        """The distance from `position` to the first grid position from there on."""
        return -position % self.stride

    def at(self, position: int) -> slice:
        """The grid positions of a chunk that starts at `position`, as a slice of it."""
        return slice(self.offset(position), None, self.stride)

    def since(self, position: int) -> int:
        """The distance from the last grid position up to `position`."""
        return position % self.stride


@dataclass(frozen=True)
class Level:
    """The settings of one hierarchy level.

    A level compresses `compression` positions into a token, at every `stride`-th position. Its tokens attend within
    `phases` interleaved sequences. Each token attends to itself and `window` tokens before it (None: all, 0: none).

    A placed level, one with `boundaries`, has a token wherever a rule says, on average at every `compression`-th
    position if the rule keeps to that. It has one phase, and its `stride` has no meaning.
    """

    compression: int
    stride: int
    dim: int
    dim_head: int
    heads: int
    ff_mult: float
    window: int | None
    compressor: str = 'conv'
    mixer: str | type[nn.Module] = 'attention'
    mixer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 1
    boundaries: str | None = None
    downsample: str = 'token'
    upsample: str = 'repeat'
    max_piece: int | None = None
    grid: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'grid', Grid(self.stride))

    def __str__(self) -> str:
        """A description in one line."""
        mixer = self.mixer if isinstance(self.mixer, str) else self.mixer.__name__
        if mixer == 'attention':
            reach = 'full' if self.window is None else f'window {self.window}'
            mixer = f'attention of {self.heads} x {self.dim_head}, {reach}' if self.mixes else 'no attention'
        place = f'stride {self.stride}' if self.boundaries is None else f'boundaries {self.boundaries}'
        return (
            f'level {self.compression}x: {place}, dim {self.dim}, depth {self.depth}, '
            f'{mixer}, feed-forward of {self.ff_dim}'
        )

    @property
    def phases(self) -> int:
        """The number of interleaved sequences: tokens whose indices agree modulo `phases` attend to each other."""
        return 1 if self.is_placed else self.compression // self.stride

    @property
    def is_placed(self) -> bool:
        """Whether boundaries place its tokens."""
        return self.boundaries is not None

    @property
    def spacing(self) -> int:
        """The number of positions from one token to the next. For a placed level, the intended mean."""
        return self.compression if self.is_placed else self.stride

    @property
    def ff_dim(self) -> int:
        """The hidden width of the feed-forward."""
        return int(self.dim * self.ff_mult)

    @property
    def mixes(self) -> bool:
        """Whether its blocks have a mixer. Attention with a window of 0 has none."""
        return self.mixer != 'attention' or self.window != 0

    def length(self, n: int) -> int:
        """The number of level tokens for `n` positions. Not for placed levels."""
        return self.grid.count(n)

    def longest(self, seq_len: int) -> int:
        """The largest number of tokens of a phase in a pass over `seq_len` positions."""
        return seq_len if self.is_placed else Grid(self.compression).count(seq_len)


def build_levels(config: Config, mixers: Collection[str], rules: Collection[str]) -> tuple[Level, ...]:
    """The levels of a configuration, whose per-level options are one value or one for each hierarchy.

    Raises ValueError, naming the option, where a value is not allowed.
    """
    hierarchies = config.hierarchies
    compressions = tuple(hierarchies) if isinstance(hierarchies, (tuple, list)) else (hierarchies,)
    if not compressions:
        raise ValueError('hierarchies must name at least one compression factor, got none')
    for c in compressions:
        check_compression(c, is_power_of_two(c) or config.boundaries is not None, hierarchies)
    if len(set(compressions)) != len(compressions):
        raise ValueError(f'hierarchies must all differ, got {hierarchies!r}')

    options = [each for each in fields(config) if each.metadata['per_level']]
    columns = {each.name: per_level(each.name, getattr(config, each.name), len(compressions)) for each in options}
    if not isinstance(config.boundaries, (tuple, list)):
        # one rule places all levels but the finest
        if config.boundaries is not None and len(compressions) == 1:
            raise ValueError(
                f'boundaries place levels inside the finest one, and hierarchies is {hierarchies!r}, got '
                f'{config.boundaries!r}'
            )
        finest = min(compressions)
        columns['boundaries'] = tuple(None if c == finest else config.boundaries for c in compressions)
    for c, rule in zip(compressions, columns['boundaries'], strict=True):
        # the number of a placed level is a mean
        check_compression(c, is_power_of_two(c) or rule is not None, hierarchies)
    return tuple(
        build_level(config, c, {name: column[i] for name, column in columns.items()}, mixers, rules)
        for i, c in enumerate(compressions)
    )


def check_compression(c: Any, allowed: bool, hierarchies: Any) -> None:
    if not is_int(c) or c < 1 or not allowed:
        raise ValueError(f'hierarchies must be powers of two (1, 2, 4, ...), got {c!r} in {hierarchies!r}')
    check_int('hierarchies', c, maximum=MOST_IN_TURN)


def build_level(
    config: Config, c: int, given: dict[str, Any], mixers: Collection[str], rules: Collection[str]
) -> Level:
    """The level of compression `c` from its value of each per-level option."""
    stride = given.pop('hierarchical_stride')
    if not is_power_of_two(stride):
        raise ValueError(f'hierarchical_stride must be powers of two (1, 2, 4, ...), got {stride!r} for hierarchy {c}')
    if stride > c:
        raise ValueError(f'hierarchical_stride must not exceed its hierarchy, got stride {stride} for hierarchy {c}')
    for each in fields(config):
        if each.name in given and each.metadata['check'] is not None:
            each.metadata['check'](each.name, given[each.name])
    dim, mult, mixer, kwargs = given['dim'], given['ff_mult'], given['mixer'], given['mixer_kwargs']
    check_number('ff_mult', mult, maximum=MOST / dim)
    if int(dim * mult) < 1:
        raise ValueError(f'ff_mult must leave a hidden width of at least 1, got {mult!r} for dim {dim}')
    if isinstance(given['compressor'], nn.Module):
        if not isinstance(config.compressor, (tuple, list)) and config.hierarchies not in ([c], (c,), c):
            raise ValueError('compressor must have one module for each hierarchy, got one module for all')
        given['compressor'] = OWN
    elif given['compressor'] not in COMPRESSORS:
        raise ValueError(
            f'compressor must be one of {", ".join(COMPRESSORS)}, or a module, got {given["compressor"]!r} for '
            f'hierarchy {c}'
        )
    is_class = isinstance(mixer, type) and issubclass(mixer, nn.Module)
    if not is_class and not (isinstance(mixer, str) and mixer in mixers):
        raise ValueError(
            f'mixer must be one of {", ".join(mixers)}, or a class of modules, got {mixer!r} for hierarchy {c}'
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f'mixer_kwargs must be a dict or None, got {kwargs!r} for hierarchy {c}')
    given['mixer_kwargs'] = dict(kwargs or {})
    window = find_window(given.pop('window_sizes'), c, config.seq_len, placed=given['boundaries'] is not None)
    if mixer == 'attention' and window != 0 and given['dim_head'] % 2:
        raise ValueError(f'dim_head must be even (rotary embeddings turn pairs of channels), got {given["dim_head"]}')
    # options that no level module reads, as the weights of objectives, are not in it
    rule = given['boundaries']
    if isinstance(rule, nn.Module):
        if not isinstance(config.boundaries, (tuple, list)):
            raise ValueError('boundaries must have one module or None for each hierarchy, got one module for all')
        given['boundaries'] = OWN
    elif rule is not None and not (isinstance(rule, str) and rule in rules):
        raise ValueError(
            f'boundaries must be None, one of {", ".join(rules)}, or a module, got {rule!r} for hierarchy {c}'
        )
    names = {each.name for each in fields(Level)}
    own = {name: value for name, value in given.items() if name in names}
    return Level(compression=c, stride=stride, window=window, **own)


def find_window(window: Any, c: int, seq_len: int, *, placed: bool = False) -> int | None:
    """The window of a level of compression `c` from its `window_sizes`. Warns where that exceeds the level."""
    longest = seq_len // c
    if window == 'auto':
        return max(longest // 2, 1) if longest else None
    if isinstance(window, str):
        raise ValueError(f"window_sizes must be integers, None or 'auto', got {window!r}")
    # a placed level may have a token at every position
    if window is None or check_int('window_sizes', window, 0) <= (seq_len if placed else longest):
        return window
    warnings.warn(
        f'window_sizes: {window} exceeds the {longest} tokens that hierarchy {c} has of seq_len {seq_len}, '
        'so that level attends in full',
        stacklevel=user_frame(),
    )
    return None


def is_power_of_two(value: Any) -> bool:
    return is_int(value) and value >= 1 and not value & (value - 1)
