"""Saving a model writes all that loading needs, or says why it cannot."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from saved_models import GOOD, give_activation
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.mark.parametrize(
    ('name', 'value'),
    [('next_latent_loss_type', nn.functional.mse_loss), ('chunk_summarizers', (None, nn.Identity()))],
)
def test_what_json_cannot_hold_is_not_lost_in_silence(tmp_path: Path, name: str, value: Any) -> None:
    model = HierarchicalTransformer(**GOOD, **{name: value})
    with pytest.raises(ValueError, match=f'{name} cannot be written to config.json'):
        model.save_pretrained(tmp_path / 'model')


def test_other_weights_than_its_own_can_be_written(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    again = HierarchicalTransformer.from_pretrained(tmp_path)
    assert torch.equal(again.token_emb.weight, model.token_emb.weight + 1)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Makes writes fail beyond `size` bytes of a file, as on a full disk."""
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


@pytest.mark.parametrize('name', ['args', 'format'])
def test_a_subclass_whose_arguments_would_be_lost_is_not_saved(tmp_path: Path, name: str) -> None:
    class Taking(HierarchicalTransformer):
        def __init__(self, *args: Any, format: str = 'text', **arguments: Any) -> None:
            super().__init__(**arguments)

    model = Taking(3, **GOOD) if name == 'args' else Taking(format='bytes', **GOOD)
    with pytest.raises(ValueError, match=f'{name} cannot be written to config.json'):
        model.save_pretrained(tmp_path)


def test_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """File names that are not UTF-8 do not make a save fail either."""
    code = (
        'import json, sys; from pathlib import Path;'
        'from simple_hierarchical_transformer import HierarchicalTransformer;'
        f'folder = Path(sys.argv[1]); model = HierarchicalTransformer(**{GOOD!r});'
        "model.save_pretrained(folder, model_card_kwargs=dict(title='caf\\u00e9', training='of \\udcff'));"
        "config = json.loads((folder / 'config.json').read_text());"
        "(folder / 'config.json').write_bytes(json.dumps(config | dict(library_version='\\u00e9'), "
        'ensure_ascii=False).encode());'
        'HierarchicalTransformer.from_pretrained(folder)'
    )
    locale = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    subprocess.run([sys.executable, '-c', code, tmp_path], check=True, env={**os.environ, **locale})
    text = (tmp_path / 'README.md').read_bytes().decode('utf-8')
    assert '# caf\u00e9' in text
    assert 'of \\udcff' in text


def set_activation(model: Any) -> None:
    model.layers[0][0].ff.net[2] = nn.GELU(approximate='tanh')


def parametrize(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.layers[0][0].ff.net[1])


def append_layer(model: Any) -> None:
    model.layers[0][0].ff.net.append(nn.Dropout(0.1))


@pytest.mark.parametrize('change', [give_activation, set_activation, parametrize, append_layer])
def test_a_model_whose_modules_were_replaced_is_not_saved_as_another(change: Any, tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    change(model)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r'layers\.0\.0\.ff\.net\S* .*from_pretrained would build'):
        model.save_pretrained(tmp_path / 'model')
    assert not (tmp_path / 'model').exists()
    # The check draws no random numbers.
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'token_emb.weight': None}, r'state_dict must hold the weights of the model: missing token_emb\.weight'),
        ({'module.x': torch.ones(1)}, r'missing none; unknown module\.x'),
        ({'token_emb.weight': torch.ones(3, 8)}, r'token_emb\.weight \(3, 8\), which must be \(11, 8\)'),
        ({'token_emb.weight': torch.ones(11, 8, device='meta')}, r'token_emb\.weight has no values'),
        ({'token_emb.weight': 3}, r'token_emb\.weight is not a plain tensor'),
    ],
)
def test_a_state_dict_that_is_not_the_models_is_not_saved(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    weights = {**model.state_dict(), **changes}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path, state_dict=weights)
    assert not list(tmp_path.iterdir())


def test_int8_weights_are_not_saved(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = HierarchicalTransformer(**GOOD)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r'is not a plain tensor|from_pretrained would build'):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
