"""Configurations of every mixer, alone and in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simple_hierarchical_transformer.mixers import (
    MIXERS,
)
from support.configs import SEQ_LEN

DIM, LENGTH = 12, 40


STRIDED = dict(pattern='strided', stride=5)


FIXED = dict(pattern='fixed', stride=5, summary=2)


# for each case the name of the mixer, whether it is causal to the bit, and its settings
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    'grouped queries': ('attention', True, dict(kv_heads=2)),
    'one head of keys': ('attention', True, dict(kv_heads=1)),
    'one head of keys in a window': ('attention', True, dict(kv_heads=1, window=3)),
    'strided': ('attention', True, STRIDED),
    'strided, union': ('attention', True, dict(STRIDED, pattern_mode='union', kv_heads=2)),
    'strided, heads': ('attention', True, dict(STRIDED, pattern_mode='heads')),
    'fixed': ('attention', True, FIXED),
    'fixed, union': ('attention', True, dict(FIXED, pattern_mode='union')),
    'fixed, heads': ('attention', True, dict(FIXED, pattern_mode='heads', kv_heads=2)),
    'stride by default': ('attention', True, dict(pattern='fixed', pattern_mode='union')),
    'lsh': ('lsh', False, dict(entries=5, buckets=4)),
    'lsh of wide windows': ('lsh', False, dict(entries=64, rounds=3)),
    'lsh of one': ('lsh', False, dict(entries=1, rounds=1, buckets=2)),
    'gateloop': ('gateloop', True, {}),
    'gateloop, 3 heads': ('gateloop', True, dict(state_heads=3)),
    'simple-gateloop': ('simple-gateloop', True, {}),
    's4d': ('s4d', False, dict(state_dim=8)),
    's4d, inv, by matrices': ('s4d', False, dict(state_dim=8, init='inv', fft='monarch')),
    'h3': ('h3', False, dict(state_dim=8, shift_dim=5)),
    'h3 by matrices': ('h3', False, dict(state_dim=8, shift_dim=1, fft='monarch')),
    'hyena': ('hyena', False, dict(filter_dim=8)),
    'hyena of order 3, by matrices': ('hyena', False, dict(filter_dim=8, order=3, short=1, fft='monarch')),
}


cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


HEADS = dict(heads=4, dim_head=4)


BASE: dict[str, Any] = dict(
    num_tokens=11, dim=(8, 12, 8), depth=2, seq_len=SEQ_LEN, **HEADS, ff_mult=2, hierarchies=(1, 8, 4),
    hierarchical_stride=(1, 4, 2), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip


def make(case: tuple[str, bool, dict[str, Any]], **settings: Any) -> nn.Module:
    """A mixer in float64 for sequences of 40 tokens of width 12. No parameter keeps its initial zeros or ones."""
    name, _, options = case
    arguments = dict(length=LENGTH, **HEADS) if name in ('attention', 'lsh') else {}
    if name == 'hyena':
        arguments = dict(length=LENGTH)
    if name == 'lsh':
        del arguments['length']
    torch.manual_seed(0)
    mixer = MIXERS[name](dim=DIM, **{**arguments, **options, **settings}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def in_model(case: tuple[str, bool, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The configuration of a model whose coarse levels have this mixer. `state_heads` is 4, which suits every level."""
    name, _, options = case
    options = {**options, 'state_heads': 4} if 'state_heads' in options else dict(options)
    window = options.pop('window', None)
    level_settings = dict(
        mixer=('attention', name, name), mixer_kwargs=(None, options, options), window_sizes=(3, window, window)
    )
    return {**BASE, **changes, **level_settings}


def taps_written_out(kernel: Tensor, x: Tensor) -> Tensor:
    """A causal convolution tap by tap. The tap of the newest token comes first."""
    return sum(F.pad(x, (0, 0, s, 0))[:, : x.shape[1]] * tap for s, tap in enumerate(kernel))  # type: ignore[return-value]
