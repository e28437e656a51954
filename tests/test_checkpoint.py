"""A model saved is the model loaded, or an error says why not."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import build, configs
from hypothesis import HealthCheck, given, settings
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer, __version__

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


def test_the_config_says_who_wrote_it_and_newer_formats_are_refused(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['library_version'] == __version__
    assert config['dim'] == 8

    # folders that were written before there was a format
    older = {key: value for key, value in config.items() if key not in ('format', 'library_version')}
    (tmp_path / 'config.json').write_text(json.dumps(older))
    HierarchicalTransformer.from_pretrained(tmp_path)

    newer = {**config, 'format': config['format'] + 1, 'library_version': '9.0', 'warp_drive': True}
    (tmp_path / 'config.json').write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r'has format 2, by version 9\.0 of the library; this is version'):
        HierarchicalTransformer.from_pretrained(tmp_path)

    (tmp_path / 'config.json').unlink()
    with pytest.raises(ValueError, match=r'is no saved model: there is no config\.json in it'):
        HierarchicalTransformer.from_pretrained(tmp_path)


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    model.to_logits.weight = model.token_emb.weight
    model.layers[0][1].ff = model.layers[0][0].ff
    model.save_pretrained(tmp_path)

    again = HierarchicalTransformer.from_pretrained(tmp_path)
    assert again.to_logits.weight is again.token_emb.weight
    assert len(list(again.parameters())) == len(list(model.parameters()))
    ids = torch.randint(0, 11, (2, 16))
    assert torch.equal(again(ids), model(ids))

    again.save_pretrained(tmp_path / 'twice')
    assert HierarchicalTransformer.from_pretrained(tmp_path / 'twice').to_logits.weight.shape == (11, 8)


def test_other_weights_than_its_own_can_be_written(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    again = HierarchicalTransformer.from_pretrained(tmp_path)
    assert torch.equal(again.token_emb.weight, model.token_emb.weight + 1)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk does, to files that would grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with largest_file(4096), pytest.raises(OSError, match='could not be written'):
        HierarchicalTransformer(**{**GOOD, 'dim': 64}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='cannot be written'):
        HierarchicalTransformer(**GOOD, next_latent_loss_type=nn.functional.mse_loss).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loads_by_its_name_on_the_hub(tmp_path: Path) -> None:
    """From the hub's own cache on disk, where a download would have put it."""
    model = HierarchicalTransformer(**GOOD)
    repo = tmp_path / 'models--someone--tiny'
    model.save_pretrained(repo / 'snapshots' / ('a' * 40))
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('a' * 40)
    again = HierarchicalTransformer.from_pretrained('someone/tiny', cache_dir=tmp_path)
    assert torch.equal(again.token_emb.weight, model.token_emb.weight)


def test_what_is_pushed_to_the_hub_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(api: Any, repo_id: str, **_: Any) -> Any:
        return huggingface_hub.RepoUrl(f'https://huggingface.co/{repo_id}')

    def upload(api: Any, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, tmp_path / repo_id)
        return 'commit'

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', create)
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', upload)
    model = HierarchicalTransformer(**GOOD)
    assert model.push_to_hub('someone/tiny') == 'commit'
    saved = model.save_pretrained(
        tmp_path / 'own', push_to_hub=True, repo_id='someone/again', model_card_kwargs=dict(training='Trained on tea.')
    )
    assert saved == 'commit'
    for name in ('tiny', 'again'):
        loaded = HierarchicalTransformer.from_pretrained(tmp_path / 'someone' / name)
        assert torch.equal(loaded.token_emb.weight, model.token_emb.weight)
    card = huggingface_hub.ModelCard.load(tmp_path / 'someone' / 'again' / 'README.md')
    assert card.data.library_name == 'simple-hierarchical-transformer'
    assert '| 2x | 1 | 8 | 2 x 4 | full |' in card.text
    assert 'Trained on tea.' in card.text
