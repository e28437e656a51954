"""The reconstruction loss."""

from __future__ import annotations

import pytest
import torch

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.ops import cross_entropy as kernel


def test_the_model_samples_its_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, hierarchies=(1, 4), window_sizes=4, recon_sample=0.5)
    ids, rows = torch.randint(1, 11, (2, 41)), []
    real = kernel.linear_cross_entropy
    monkeypatch.setattr(kernel, 'linear_cross_entropy', lambda x, *args: rows.append(len(x)) or real(x, *args))
    model(ids, return_loss=True)
    model.eval()
    model(ids, return_loss=True)
    assert rows == [80, 40, 80, 80]
