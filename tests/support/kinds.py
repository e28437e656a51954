"""One small model of each mixer, compressor, merge, head and arrangement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.ops.norm import RMSNorm

KIND_BASE: dict[str, Any] = dict(
    num_tokens=13,
    dim=16,
    depth=2,
    seq_len=48,
    dim_head=8,
    heads=2,
    hierarchies=(1, 4),
    hierarchical_stride=(1, 2),
    window_sizes=(4, None),
    ignore_index=-1,
)


# one of each mixer, compressor, merge, head and arrangement
KINDS: dict[str, dict[str, Any]] = {
    'attention': {},
    'lsh': dict(mixer='lsh', mixer_kwargs=dict(buckets=4, entries=8)),
    'gateloop': dict(mixer='gateloop'),
    'simple-gateloop': dict(mixer='simple-gateloop'),
    's4d': dict(mixer='s4d'),
    'h3': dict(mixer='h3'),
    'hyena': dict(mixer='hyena'),
    'all losses': dict(prophet_loss_weight=0.2, quantized_loss_weight=0.2, num_rollouts=2),
    'autoencoder': dict(autoencoder=True, autoencoder_loss_weight=0.1, dim=(16, 12)),
    'linear': dict(compressor='linear', merge='linear', merge_into='all', dim=(16, 12)),
    'pooled': dict(compressor='attention', merge='attention', merge_window=1, merge_into='all'),
    'mean': dict(compressor='mean', hierarchies=(4, 1), hierarchical_stride=(4, 1), dim=(12, 16), merge_into='all'),
    'hourglass': dict(arrangement='hourglass', residual='gru', ff_activation='swiglu', dim=(16, 12)),
    'placed': dict(
        arrangement='hourglass', hierarchies=(1, 4, 8), hierarchical_stride=1, window_sizes=(4, None, None),
        dim=(16, 12, 12), boundaries=(None, 'learned', 'every'), downsample=('token', 'attention', 'token'),
        upsample=('repeat', 'smooth', 'offset'), merge='skip',
    ),
    'reversible': dict(reversible=True),
    'checkpointed': dict(gradient_checkpointing=True, ff_chunks=2),
    'shared': dict(share_layers=True, halting='act', ff_activation='relu2', mixer_kwargs=dict(qk_norm=True)),
}  # fmt: skip


MAPS = (nn.Linear, nn.Conv1d, nn.LayerNorm, RMSNorm)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(ids, return_loss=True)[0]


def read_in_chunks(model: HierarchicalTransformer, ids: Tensor) -> Tensor:
    state, found = None, []
    for chunk in ids.split([3, 1, ids.shape[1] - 4], dim=1):
        logits, state = model(chunk, state=state, return_state=True)
        found.append(logits)
    return torch.cat(found, dim=1)
