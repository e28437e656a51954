"""The quantized loss and its random projection quantizer."""

from __future__ import annotations

import pytest
import torch
from support.configs import UNEVEN
from vector_quantize_pytorch import RandomProjectionQuantizer as PublishedQuantizer

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.objectives import quantized
from simple_hierarchical_transformer.objectives.quantized import RandomProjectionQuantizer


def test_quantizer_assigns_the_ids_of_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = RandomProjectionQuantizer(12, codebooks=3, size=50, dim_code=8)
    x = torch.randn(4, 100, 12)
    for k in range(3):
        theirs = PublishedQuantizer(dim=12, codebook_size=50, codebook_dim=8)
        theirs.rand_projs.copy_(ours.projection[k, None])
        theirs.vq._codebook.embed.copy_(ours.codebook[k, None])
        assert torch.equal(ours(x)[..., k], theirs(x))
        with monkeypatch.context() as patch:
            # the result does not depend on how many rows are scored at once
            patch.setattr(quantized, 'CHUNK', 50 * 7)
            assert torch.equal(ours(x)[..., k], theirs(x))
    assert len(ours(x).unique()) > 40


def test_quantizer_is_saved_and_never_trained() -> None:
    model = HierarchicalTransformer(**UNEVEN, quantized_loss_weight=0.1)
    assert not [name for name, _ in model.named_parameters() if name.startswith('quantizers')]
    assert 'quantizers.1.codebook' in model.state_dict()
