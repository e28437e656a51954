"""The matrix of the contracts: every named case at a small size, and every arrangement of three uneven levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.cases import BASE, CASES, DoubledIds, LastByte, trains, words
from support.configs import UNEVEN, build
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer

LENGTH = 45
SMALL_BASE: dict[str, Any] = BASE | dict(dim=8, dim_head=4, seq_len=96, ngram_rows=64)
# an FFT or a sort over the sequence rounds outputs differently when later tokens change
ROUNDED = {'lsh', 's4d', 'h3', 'hyena'}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The same options with smaller levels and windows."""
    config = {**SMALL_BASE, **config}
    if 'window_sizes' in config:
        config['window_sizes'] = shrink_window(config['window_sizes'])
    if 'chunk_summarizers' in config:
        config['chunk_summarizers'] = tuple(each and LastByte(8, each.stride) for each in config['chunk_summarizers'])
    if any(isinstance(rule, nn.Module) for rule in config.get('boundaries', ())):
        config['boundaries'] = tuple(rule and DoubledIds(8) for rule in config['boundaries'])
    return config


def shrink_window(window: Any) -> Any:
    if isinstance(window, tuple):
        return tuple(map(shrink_window, window))
    return -(-window // 16) if isinstance(window, int) else window


class OldestAndNewest(nn.Module):
    """A user's compressor: a projection of the oldest and the newest token in a window."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * dim, 12)

    def forward(self, windows: Tensor) -> Tensor:
        return self.proj(torch.cat((windows[:, 0], windows[:, -1]), dim=-1))


# what levels of different widths and strides, given out of order, can do
UNEVEN_CASES: dict[str, dict[str, Any]] = {
    'prophet': dict(prophet_loss_weight=(0.1, 0.2, 0.3)),
    'quantized compressed': dict(quantized_loss_weight=0.1, quantizer_codebook_size=7, quantizer_dim=4),
    'quantized output': dict(
        quantized_loss_weight=(0.0, 0.1, 0.2), quantize_from='output', quantizer_codebooks=2, quantizer_codebook_size=7
    ),
    'merge into all': dict(merge_into='all'),
    'merge into two': dict(merge_into=(8, 1)),
    'merge by attention': dict(merge='attention'),
    'merge by attention over the last': dict(merge='attention', merge_window=3, merge_into='all'),
    'linear merge': dict(merge='linear'),
    'linear merge into all': dict(merge='linear', merge_into='all'),
    'shared attention': dict(share_attention=True, heads=2),
    'shared feed-forward': dict(share_feed_forward=True),
    'attention compressor': dict(compressor='attention'),
    'mean compressor': dict(compressor='mean'),
    'linear compressor': dict(compressor='linear'),
    'a compressor per level': dict(compressor=('conv', 'attention', 'mean')),
    'own compressor': dict(compressor=('conv', OldestAndNewest(12), 'conv')),
    'autoencoder': dict(autoencoder=True),
    'autoencoder, strides out of order': dict(autoencoder=True, hierarchical_stride=(1, 2, 4)),
    'hourglass': dict(arrangement='hourglass', depth=3),
    'hourglass as published': dict(arrangement='hourglass', hierarchical_stride=(1, 8, 4)),
    'hourglass by attention': dict(
        arrangement='hourglass', merge='attention', merge_window=2, compressor='attention',
        predict_use_all_hierarchy=True,
    ),
    'hourglass of coarse levels': dict(
        arrangement='hourglass', hierarchies=(2, 8, 4), hierarchical_stride=(1, 4, 1), compressor='linear'
    ),
    'hourglass of different depths': dict(arrangement='hourglass', depth=(1, 3, 2), merge='linear'),
    'placed': dict(
        arrangement='hourglass', depth=2, hierarchical_stride=1, boundaries=(None, 'learned', 'learned'),
        upsample=('repeat', 'smooth', 'offset'), downsample=('token', 'attention', 'token'),
    ),
    'placed inside a placed level, merged by a skip': dict(
        arrangement='hourglass', depth=3, hierarchical_stride=1, boundaries=(None, 'every', 'rise'), merge='skip',
        upsample='boundary', predict_use_all_hierarchy=True,
    ),
    'placed inside a stride': dict(
        arrangement='hourglass', hierarchical_stride=(1, 1, 2), boundaries=(None, 'surprise', None), merge='linear',
        quantized_loss_weight=0.1, quantizer_codebook_size=7, prophet_loss_weight=0.1,
    ),
    'n-grams': dict(ngrams=(2, 5, 3), ngram_rows=64),
    'n-grams of an hourglass': dict(ngrams=(4,), ngram_rows=2, arrangement='hourglass'),
    'words': dict(word_ngrams=(2, 1), num_tokens=256, ngram_rows=64),
    'recall of words': dict(word_recall=(2, 1), recall=(3,), num_tokens=256),
    'recall': dict(recall=(3, 1)),
    'recall and n-grams of an hourglass': dict(recall=(2,), ngrams=(3,), ngram_rows=64, arrangement='hourglass'),
    'SwiGLU in chunks': dict(ff_activation='swiglu', ff_chunks=2),
    'windows of half a level': dict(window_sizes='auto'),
    'gated residuals': dict(residual='gru'),
    'reversible': dict(reversible=True, depth=3, merge_into='all', ff_chunks=2),
    'reversible with shared layers': dict(
        reversible=True, share_layers=True, merge='attention', share_feed_forward=True
    ),
    'shared layers': dict(share_layers=True, depth=3, merge='attention'),
    'shared layers that halt': dict(share_layers=True, depth=4, halting='act', merge_into='all'),
}  # fmt: skip

UNEVEN_MATRIX = {f'uneven levels, {name}': {**UNEVEN, **config} for name, config in UNEVEN_CASES.items()}
MATRIX = {name: shrink(config) for name, config in CASES.items()} | UNEVEN_MATRIX
# FlexAttention trains on CUDA only
TRAINED = {name: config for name, config in MATRIX.items() if config.get('attn_backend') != 'flex'}

every_case = pytest.mark.parametrize('config', MATRIX.values(), ids=MATRIX)
every_trained_case = pytest.mark.parametrize('config', TRAINED.values(), ids=TRAINED)
every_uneven_case = pytest.mark.parametrize('config', UNEVEN_MATRIX.values(), ids=UNEVEN_MATRIX)


def mixers(config: dict[str, Any]) -> set[Any]:
    mixer = config.get('mixer', 'attention')
    return set(mixer) if isinstance(mixer, tuple) else {mixer}


def build_case(config: dict[str, Any]) -> HierarchicalTransformer:
    """A float64 model, in evaluation mode where training draws random numbers."""
    return build(config).train(trains(config))


def ids_of(config: dict[str, Any], batch: int = 2, length: int = LENGTH) -> Tensor:
    return words(batch, length) % config['num_tokens']
