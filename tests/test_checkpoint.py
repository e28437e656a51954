"""A model saved is the model loaded, or an error says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, configs
from hypothesis import HealthCheck, given, settings
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer

GOOD: dict[str, Any] = dict(num_tokens=11, dim=8, depth=1, seq_len=16, dim_head=4, heads=2, hierarchies=(1, 2))


@given(config=configs())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loads_as_it_was_saved(tmp_path: Path, config: dict[str, Any]) -> None:
    model = build(config).float()
    model.save_pretrained(tmp_path / 'model')
    again = HierarchicalTransformer.from_pretrained(tmp_path / 'model')

    assert again.levels == model.levels
    assert not again.training
    ids = torch.randint(0, 11, (2, 20))
    loss, same = (m(ids, return_loss=True)[0] for m in (model, again))
    assert torch.equal(loss, same)
    files = sorted(path.name for path in (tmp_path / 'model').iterdir())
    assert files == ['README.md', 'config.json', 'model.safetensors']


def test_foreign_settings_are_named(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'rope_theta': 1}))
    with pytest.raises(ValueError, match='has settings unknown here: rope_theta'):
        HierarchicalTransformer.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'depth': 2}))
    with pytest.raises(RuntimeError, match='Missing key'):
        HierarchicalTransformer.from_pretrained(tmp_path)


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r'model\.safetensors is torn'):
        HierarchicalTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ('name', 'value'),
    [('next_latent_loss_type', nn.functional.mse_loss), ('chunk_summarizers', (None, nn.Identity()))],
)
def test_what_json_cannot_hold_is_not_lost_in_silence(tmp_path: Path, name: str, value: Any) -> None:
    model = HierarchicalTransformer(**GOOD, **{name: value})
    with pytest.raises(ValueError, match=f'{name} cannot be written to config.json'):
        model.save_pretrained(tmp_path / 'model')


def test_unknown_keys_in_weights_are_refused() -> None:
    model = HierarchicalTransformer(**GOOD)
    with pytest.raises(RuntimeError, match='Unexpected key'):
        model.load_state_dict({**model.state_dict(), 'layers.0.0.attn.to_gates.weight': torch.zeros(1)})
