"""A model saved is the model loaded, or an error says why not."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import build, configs, run
from hypothesis import HealthCheck, given, settings
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer, __version__, sample
from simple_hierarchical_transformer.weights import read_tensors, write_tensors

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


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    (folder / 'config.json').write_text(json.dumps({**config, **changes}), encoding='utf-8')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(depth=2), r'Missing key.*layers\.1\.0\.ff'),
        (dict(num_tokens=12), r'size mismatch for token_emb\.weight'),
        (dict(ff_activation='swiglu'), r'size mismatch for layers\.0\.0\.ff'),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf'model\.safetensors does not fit its config\.json: .*{message}'):
        HierarchicalTransformer.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_end_commands_with_one_line(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    weights, _ = read_tensors(tmp_path / 'model.safetensors')
    write_tensors(
        {name: tensor for name, tensor in weights.items() if name != 'norms.0.weight'}, tmp_path / 'model.safetensors'
    )
    with pytest.raises(SystemExit, match=r'error: .*Missing key.*norms\.0\.weight'):
        sample.main([str(tmp_path)])
    ended = run('--eval', tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch(r'error: .*Missing key.*norms\.0\.weight.*\n', ended.stderr)


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


class Wider(HierarchicalTransformer):
    """One more argument, and a part that it makes."""

    def __init__(self, extra: int = 3, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.extra = extra
        self.to_extra = nn.Linear(arguments['dim'], extra)


def test_a_subclass_with_arguments_of_its_own_loads(tmp_path: Path) -> None:
    for number, model in enumerate((Wider(5, **GOOD), Wider(extra=5, **GOOD), Wider(**GOOD))):
        model.save_pretrained(tmp_path / str(number))
        again = Wider.from_pretrained(tmp_path / str(number))
        assert type(again) is Wider
        assert again.extra == model.extra
        assert again.levels == model.levels
        assert torch.equal(again.to_extra.weight, model.to_extra.weight)
    assert Wider.from_pretrained(tmp_path / '0', recon_sample=0.5).recon_sample == 0.5
    with pytest.raises(TypeError, match='unexpected arguments: extras'):
        Wider.from_pretrained(tmp_path / '0', extras=1)
    edit_config(tmp_path / '0', extras=1)
    with pytest.raises(ValueError, match='has settings unknown here: extras'):
        Wider.from_pretrained(tmp_path / '0')


def test_a_subclass_with_fixed_settings_loads(tmp_path: Path) -> None:
    class Small(HierarchicalTransformer):
        def __init__(self, width: int = 8) -> None:
            super().__init__(**{**GOOD, 'dim': width})

    Small(12).save_pretrained(tmp_path)
    assert Small.from_pretrained(tmp_path).token_emb.weight.shape == (11, 12)


def test_a_subclass_keeps_what_is_not_among_the_weights(tmp_path: Path) -> None:
    """Where the constructor computes with values, or keeps tensors that are not saved."""

    class Computes(HierarchicalTransformer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.rates = [rate / 2 for rate in torch.arange(3).tolist()]

    class Keeps(HierarchicalTransformer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.register_buffer('rates', torch.arange(3) / 2, persistent=False)
            self.scale = torch.tensor(2.0)

    for number, cls in enumerate((Computes, Keeps)):
        model: Any = cls(**GOOD)
        model.save_pretrained(tmp_path / str(number))
        again: Any = cls.from_pretrained(tmp_path / str(number))
        assert list(again.rates) == [0, 0.5, 1]
        assert torch.equal(again.token_emb.weight, model.token_emb.weight)
    assert again.scale == 2


@pytest.mark.parametrize('name', ['args', 'format'])
def test_a_subclass_whose_arguments_would_be_lost_is_not_saved(tmp_path: Path, name: str) -> None:
    class Taking(HierarchicalTransformer):
        def __init__(self, *args: Any, format: str = 'text', **arguments: Any) -> None:
            super().__init__(**arguments)

    model = Taking(3, **GOOD) if name == 'args' else Taking(format='bytes', **GOOD)
    with pytest.raises(ValueError, match=f'{name} cannot be written to config.json'):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = HierarchicalTransformer(**GOOD, mixer=('attention', 's4d')).to(dtype)
    model.save_pretrained(tmp_path)
    for asked in ({}, dict(dtype='auto'), dict(torch_dtype='auto')):
        again = HierarchicalTransformer.from_pretrained(tmp_path, **asked)
        for (name, tensor), same in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert same.dtype == tensor.dtype, name
            assert torch.equal(same, tensor), name


def test_weights_of_several_dtypes_keep_them(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD).bfloat16()
    model.norms.float()
    model.save_pretrained(tmp_path)
    again = HierarchicalTransformer.from_pretrained(tmp_path)
    assert again.norms[0].weight.dtype == torch.float32
    assert again.token_emb.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    'settings', [dict(dtype=torch.bfloat16), dict(torch_dtype='bfloat16'), dict(dtype='torch.bfloat16')]
)
def test_the_dtype_that_is_asked_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = HierarchicalTransformer(**GOOD)
    model.save_pretrained(tmp_path)
    expected = model.bfloat16().state_dict()
    for name, tensor in HierarchicalTransformer.from_pretrained(tmp_path, **settings).state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    'settings',
    [
        dict(map_location=torch.device('cpu')),
        dict(map_location='cpu', device_map='cpu'),
        dict(device_map=torch.device('cpu')),
        dict(device_map={'': 'cpu'}),
        dict(map_location='meta'),
    ],
    ids=str,
)
def test_the_device_that_is_asked_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    again = HierarchicalTransformer.from_pretrained(tmp_path, **settings)
    expected = 'meta' if 'meta' in settings.values() else 'cpu'
    assert {tensor.device.type for tensor in again.state_dict().values()} == {expected}


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(device_map='auto'), "device_map must be one device, as 'cpu' or 'cuda:0', got 'auto'"),
        (dict(device_map={'layers': 'cpu', 'norms': 'cpu'}), 'device_map must be one device'),
        (dict(map_location=[]), 'map_location must be one device'),
        (dict(map_location='cpu', device_map='meta'), "must be the same, got 'cpu' and 'meta'"),
        (dict(dtype='int8'), "dtype must be a floating point dtype, its name or 'auto', got 'int8'"),
        (dict(torch_dtype='nn'), "torch_dtype must be a floating point dtype, its name or 'auto', got 'nn'"),
        (dict(dtype=16), 'dtype must be a floating point dtype'),
        (dict(dtype='float16', torch_dtype=torch.float32), "must be the same, got 'float16' and torch.float32"),
    ],
    ids=str,
)
def test_devices_and_dtypes_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        HierarchicalTransformer.from_pretrained(tmp_path, **settings)


def test_weights_need_not_fit_where_that_is_asked_for(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD).bfloat16()
    state = dict(model.state_dict(), stranger=torch.zeros(3))
    del state['norms.1.weight']
    model.save_pretrained(tmp_path)
    write_tensors(state, tmp_path / 'model.safetensors')
    with pytest.warns(UserWarning, match=r'missing norms\.1\.weight; unknown here stranger'):
        again = HierarchicalTransformer.from_pretrained(tmp_path, strict=False)
    assert torch.equal(again.token_emb.weight, model.token_emb.weight)
    # as the constructor makes it, in the dtype of the others
    assert torch.equal(again.norms[1].weight, torch.ones(8, dtype=torch.bfloat16))

    edit_config(tmp_path, num_tokens=12)
    with pytest.raises(ValueError, match=r'size mismatch for token_emb\.weight'):
        HierarchicalTransformer.from_pretrained(tmp_path, strict=False)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    again = HierarchicalTransformer.from_pretrained(tmp_path)
    before = again.token_emb.weight.clone()
    with open(tmp_path / 'model.safetensors', 'r+b') as file:
        file.truncate(0)
    assert torch.equal(again.token_emb.weight, before)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    """Weights are not drawn that the file replaces: that would take most of the time."""
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    HierarchicalTransformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """Ends with a MemoryError what takes that much more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != 'linux', reason='limits memory as Linux does')
@pytest.mark.parametrize(
    'changes',
    [
        dict(depth=10**6),
        dict(depth=4096),
        dict(depth=4096, share_layers=True),
        dict(depth=10**9, share_layers=True),
        dict(num_tokens=10**8),
        dict(num_tokens=10**30),
        dict(dim=10**6),
        dict(dim=2**62),
        dict(num_rollouts=10**9),
        dict(dynamics_num_layers=10**9),
        dict(dynamics_num_layers=4096),
        dict(dynamics_hidden_dim=10**9),
        dict(hierarchies=[2**i for i in range(1000)]),
        dict(quantized_loss_weight=1.0, quantizer_codebooks=10**9),
        dict(quantized_loss_weight=1.0, quantizer_codebook_size=10**9),
        dict(prophet_loss_weight=1.0, hierarchies=[1, 2**40]),
        dict(ngrams=[2, 3], ngram_rows=2**40),
        dict(ngrams=list(range(2, 10_000))),
        dict(ff_mult=1e308),
        dict(ff_mult=1e12),
        dict(heads=10**12),
        dict(mixer='hyena', mixer_kwargs=dict(order=10**9)),
        dict(mixer='lsh', mixer_kwargs=dict(rounds=10**9)),
        dict(mixer='s4d', mixer_kwargs=dict(state_dim=10**12)),
        dict(mixer_kwargs=dict(heads=3)),
        dict(dim=None),
        dict(compressor=[[]]),
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_strangers_settings_take_no_time_and_no_memory(tmp_path: Path, changes: dict[str, Any]) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    start = time.process_time()
    with little_memory(), pytest.raises(ValueError, match=r'config\.json'):
        HierarchicalTransformer.from_pretrained(tmp_path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'[]', r'config\.json must hold a JSON object of settings, got list'),
        (b'3', r'config\.json must hold a JSON object of settings, got int'),
        (b'', r'config\.json is no JSON: Expecting value'),
        (b'{"dim": ', r'config\.json is no JSON: Expecting value'),
        (b'\xff{}', r'config\.json is no JSON: .*utf-8'),
        (b'[' * 100_000, r'config\.json is no JSON: .*recursion'),
        (b'{}', r"config\.json of .* does not make a model: .*missing 3 required .*'num_tokens', 'dim', and 'depth'"),
        (b'{"format": []}', r'config\.json of .* has format \[\]'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_are_none_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    (tmp_path / 'config.json').write_bytes(text)
    with pytest.raises(ValueError, match=message):
        HierarchicalTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ('shared', 'message'),
    [
        ({'seq_len': 'token_emb.weight'}, 'weights share token_emb.weight as seq_len, which the model does not have'),
        ({'_forward_pre_hooks': 'token_emb.weight'}, 'which the model does not have'),
        ({'token_emb': 'token_emb.weight'}, 'which the model does not have'),
        ({'layers.0.0.attn.weight': 'token_emb.weight'}, 'which the model does not have'),
        ({'norms.0.bias': 'token_emb.weight'}, r'weights share token_emb.weight \(11, 8\) as norms.0.bias \(8,\)'),
        (['seq_len'], "metadata 'shared' that do not map names to names"),
        ({'to_logits.weight': 3}, "metadata 'shared' that do not map names to names"),
    ],
    ids=str,
)
def test_shared_names_are_those_of_weights(tmp_path: Path, shared: Any, message: str) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    weights, _ = read_tensors(tmp_path / 'model.safetensors')
    own = {name: tensor.clone() for name, tensor in weights.items()}
    write_tensors(own, tmp_path / 'model.safetensors', {'shared': json.dumps(shared)})
    with pytest.raises(ValueError, match=message):
        HierarchicalTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_pipes_are_refused(tmp_path: Path, name: str) -> None:
    """Opening one would wait for another process for ever."""
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    code = (
        'import sys; from simple_hierarchical_transformer import HierarchicalTransformer;'
        'HierarchicalTransformer.from_pretrained(sys.argv[1])'
    )
    ended = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, timeout=60)
    assert ended.stderr.endswith(f'ValueError: {tmp_path / name} is no regular file\n')


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    model.save_pretrained(tmp_path, state_dict=dict(model.state_dict(), **{'norms.0.bias': torch.zeros(8).long()}))
    with pytest.raises(ValueError, match=r'has norms\.0\.bias of torch\.int64, which must be torch\.float32'):
        HierarchicalTransformer.from_pretrained(tmp_path)


def test_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """And names of files that are no UTF-8 do not end a save."""
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


def give_activation(model: Any) -> None:
    model.layers[0][0].ff.net[2] = nn.ReLU()


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
    # looking draws no random number
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


def test_a_subclass_that_replaces_modules_itself_is_saved(tmp_path: Path) -> None:
    model = Replacing(**GOOD)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 11, (1, 9))
    torch.testing.assert_close(Replacing.from_pretrained(tmp_path)(ids), model.eval()(ids))


class Replacing(HierarchicalTransformer):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        give_activation(self)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'token_emb.weight': None}, r'state_dict must hold the weights of the model: missing token_emb\.weight'),
        ({'module.x': torch.ones(1)}, r'missing none; unknown module\.x'),
        ({'token_emb.weight': torch.ones(3, 8)}, r'token_emb\.weight \(3, 8\), which must be \(11, 8\)'),
        ({'token_emb.weight': torch.ones(11, 8, device='meta')}, r'token_emb\.weight has no values'),
        ({'token_emb.weight': 3}, r'token_emb\.weight is no plain tensor'),
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
    with pytest.raises(ValueError, match=r'is no plain tensor|from_pretrained would build'):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [True, 0, -1, '1'])
def test_a_format_that_is_none_is_refused(number: Any, tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format': number}))
    with pytest.raises(ValueError, match='has format'):
        HierarchicalTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize('name', ['', None])
def test_a_name_of_nothing_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match='must be a folder or the name of a repository'):
        HierarchicalTransformer.from_pretrained(name)
