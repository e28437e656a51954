"""A hierarchy level's settings, checked once, before anything is built."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .checks import MOST, MOST_IN_TURN, MOST_PARTS, check_int, check_number, is_int, per_level


@dataclass(frozen=True)
class Level:
    """What one hierarchy level is made of.

    A level compresses `compression` tokens into one, every `stride` tokens. Its tokens attend within `phases`
    interleaved sub-sequences, each to itself and `window` tokens before it (None: all of them, 0: none).
    """

    compression: int
    stride: int
    dim: int
    dim_head: int
    heads: int
    ff_mult: float
    window: int | None
    next_latent_loss_weight: float
    prophet_loss_weight: float = 0.0
    quantized_loss_weight: float = 0.0
    compressor: str = 'conv'
    mixer: str | type[nn.Module] = 'attention'
    mixer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 1

    def __str__(self) -> str:
        """One line, for people."""
        mixer = self.mixer if isinstance(self.mixer, str) else self.mixer.__name__
        if mixer == 'attention':
            reach = 'full' if self.window is None else f'window {self.window}'
            mixer = f'attention of {self.heads} x {self.dim_head}, {reach}' if self.mixes else 'no attention'
        return (
            f'level {self.compression}x: stride {self.stride}, dim {self.dim}, depth {self.depth}, '
            f'{mixer}, feed-forward of {int(self.dim * self.ff_mult)}'
        )

    @property
    def phases(self) -> int:
        return self.compression // self.stride

    @property
    def mixes(self) -> bool:
        """Whether its blocks have a mixer. A window of 0 leaves attention out."""
        return self.mixer != 'attention' or self.window != 0

    def length(self, n: int) -> int:
        """How many level tokens `n` tokens become."""
        return -(-n // self.stride)


COMPRESSORS = ('conv', 'attention', 'mean', 'linear')
# what a module from outside counts as
OWN = 'module'


def build_levels(
    *,
    hierarchies: int | Sequence[int],
    hierarchical_stride: int | Sequence[int],
    dim: int | Sequence[int],
    depth: int | Sequence[int],
    dim_head: int | Sequence[int],
    heads: int | Sequence[int],
    ff_mult: float | Sequence[float],
    window_sizes: int | str | Sequence[int | str | None] | None,
    next_latent_loss_weight: float | Sequence[float],
    prophet_loss_weight: float | Sequence[float],
    quantized_loss_weight: float | Sequence[float],
    compressor: str | nn.Module | Sequence[str | nn.Module],
    mixer: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    mixer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    mixers: Collection[str],
    seq_len: int,
) -> tuple[Level, ...]:
    """Turns the constructor's scalar-or-per-level arguments into levels.

    Raises ValueError, naming the argument, where a value is not allowed.
    """
    compressions = tuple(hierarchies) if isinstance(hierarchies, (tuple, list)) else (hierarchies,)

    if not compressions:
        raise ValueError('hierarchies must name at least one compression factor, got none')
    for c in compressions:
        if not is_int(c) or c < 1 or c & (c - 1):
            raise ValueError(f'hierarchies must be powers of two (1, 2, 4, ...), got {c!r} in {hierarchies!r}')
        check_int('hierarchies', c, maximum=MOST_IN_TURN)
    if len(set(compressions)) != len(compressions):
        raise ValueError(f'hierarchies must all differ, got {hierarchies!r}')

    count = len(compressions)
    strides = per_level('hierarchical_stride', hierarchical_stride, count)
    dims = per_level('dim', dim, count)
    depths = per_level('depth', depth, count)
    dim_heads = per_level('dim_head', dim_head, count)
    all_heads = per_level('heads', heads, count)
    ff_mults = per_level('ff_mult', ff_mult, count)
    windows = per_level('window_sizes', window_sizes, count)
    next_latents = per_level('next_latent_loss_weight', next_latent_loss_weight, count)
    prophets = per_level('prophet_loss_weight', prophet_loss_weight, count)
    quantized = per_level('quantized_loss_weight', quantized_loss_weight, count)
    compressors = per_level('compressor', compressor, count)
    named = per_level('mixer', mixer, count)
    settings = per_level('mixer_kwargs', mixer_kwargs, count)

    levels = []
    for c, s, d, layers, d_head, h, mult, w, next_latent, prophet, quantize, compress, mix, mix_kwargs in zip(
        compressions, strides, dims, depths, dim_heads, all_heads, ff_mults, windows,
        next_latents, prophets, quantized, compressors, named, settings, strict=True,
    ):  # fmt: skip
        if not is_int(s) or s < 1 or s & (s - 1):
            raise ValueError(f'hierarchical_stride must be powers of two (1, 2, 4, ...), got {s!r} for hierarchy {c}')
        if s > c:
            raise ValueError(f'hierarchical_stride must not exceed its hierarchy, got stride {s} for hierarchy {c}')

        # the token shift moves half of the channels, so there must be two of them
        check_int('dim', d, 2)
        check_int('depth', layers, maximum=MOST_PARTS)
        check_int('heads', h)
        check_number('ff_mult', mult, maximum=MOST / d)
        check_number('next_latent_loss_weight', next_latent)
        check_number('prophet_loss_weight', prophet)
        check_number('quantized_loss_weight', quantize)
        check_int('dim_head', d_head)
        if int(d * mult) < 1:
            raise ValueError(f'ff_mult must leave a hidden width of at least 1, got {mult!r} for dim {d}')
        if isinstance(compress, nn.Module):
            if not isinstance(compressor, (tuple, list)) and count > 1:
                raise ValueError('compressor must have one module for each hierarchy, got one module for all')
            compress = OWN
        elif compress not in COMPRESSORS:
            allowed = ', '.join(COMPRESSORS)
            raise ValueError(f'compressor must be one of {allowed}, or a module, got {compress!r} for hierarchy {c}')
        if not (isinstance(mix, type) and issubclass(mix, nn.Module)) and not (isinstance(mix, str) and mix in mixers):
            allowed = ', '.join(mixers)
            raise ValueError(f'mixer must be one of {allowed}, or a class of modules, got {mix!r} for hierarchy {c}')
        if mix_kwargs is not None and not isinstance(mix_kwargs, Mapping):
            raise ValueError(f'mixer_kwargs must be a dict or None, got {mix_kwargs!r} for hierarchy {c}')
        if w == 'auto':
            w = max(seq_len // c // 2, 1) if seq_len >= c else None
        elif isinstance(w, str):
            raise ValueError(f"window_sizes must be integers, None or 'auto', got {w!r}")
        elif w is not None:
            check_int('window_sizes', w, 0)
        if mix == 'attention' and w != 0 and d_head % 2:
            raise ValueError(f'dim_head must be even (rotary embeddings turn pairs of channels), got {d_head}')

        if w is not None and w > seq_len // c:
            warnings.warn(
                f'window_sizes: {w} exceeds the {seq_len // c} tokens that hierarchy {c} has of seq_len {seq_len}, '
                'so that level attends in full',
                stacklevel=4,
            )
            w = None

        settings_of_mixer = dict(mix_kwargs or {})
        levels.append(
            Level(c, s, d, d_head, h, mult, w, next_latent, prophet, quantize, compress, mix, settings_of_mixer, layers)
        )

    return tuple(levels)
