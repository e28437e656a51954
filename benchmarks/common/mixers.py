"""Flat models with one mixer each."""

from __future__ import annotations

from typing import Any

# one level, so that only the mixer connects tokens
BASE: dict[str, Any] = dict(
    dim=128, depth=3, heads=2, hierarchies=1, hierarchical_stride=1, window_sizes=None, recon_loss_weight=0.0,
    next_latent_loss_weight=0.0,
)  # fmt: skip
DEFAULT = 'attention'


def mixer(name: str, **kwargs: Any) -> dict[str, Any]:
    return dict(mixer=name, mixer_kwargs=kwargs)


MIXERS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    'attention in a window of 64': dict(window_sizes=64),
    'attention, one head of keys': mixer('attention', kv_heads=1),
    'attention, strided, interleaved': mixer('attention', pattern='strided'),
    'attention, strided, union': mixer('attention', pattern='strided', pattern_mode='union'),
    'attention, fixed, heads': mixer('attention', pattern='fixed', pattern_mode='heads'),
    'lsh': mixer('lsh'),
    'gateloop': mixer('gateloop'),
    'simple-gateloop': mixer('simple-gateloop'),
    's4d': mixer('s4d'),
    's4d, inv': mixer('s4d', init='inv'),
    's4d, by matrices': mixer('s4d', fft='monarch'),
    'h3': mixer('h3'),
    'hyena': mixer('hyena'),
}
# options around a mixer
AROUND: dict[str, dict[str, Any]] = {
    'attention, gated residuals': dict(residual='gru'),
    'attention, reversible': dict(reversible=True),
    'attention, shared layers': dict(share_layers=True),
    'attention, shared layers that halt': dict(share_layers=True, halting='act'),
}
OPTIONS = {**MIXERS, **AROUND}
