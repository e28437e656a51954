"""Small models that are compiled, exported and transformed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = dict(
    num_tokens=256, dim=8, depth=1, seq_len=128, heads=2, dim_head=4, ff_mult=1, hierarchies=(1, 4),
    hierarchical_stride=(1, 2), window_sizes=(3, None), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip
# the options of the presets, and phases
RECIPE: dict[str, Any] = dict(
    SMALL, arrangement='hourglass', compressor='linear', merge='linear', ff_activation='relu2',
    mixer_kwargs=dict(qk_norm=True), ngrams=(2, 3), word_ngrams=(1, 2), ngram_rows=64, recall=(2,), word_recall=(1,),
    recon_loss_weight=0.0, next_latent_loss_weight=0.0,
)  # fmt: skip
LOSSES: dict[str, Any] = dict(
    SMALL, prophet_loss_weight=0.2, quantized_loss_weight=0.2, quantizer_codebook_size=5, quantizer_dim=3
)


ONE_LEVEL: dict[str, Any] = dict(
    num_tokens=256, dim=8, depth=1, seq_len=128, heads=2, dim_head=4, ff_mult=1, next_latent_loss_weight=0.0
)


def words(batch: int, n: int) -> Tensor:
    """Ids in which words and n-grams repeat."""
    drawn = torch.randint(0, 4, (batch, n))
    return torch.tensor(list(b'ab A'))[drawn]
