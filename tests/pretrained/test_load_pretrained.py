"""A loaded model is the saved model, on the device and in the dtype that the caller asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from saved_models import GOOD, edit_config, give_activation
from support.configs import build, configs
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.weights import write_tensors


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


def test_unknown_keys_in_weights_are_refused() -> None:
    model = HierarchicalTransformer(**GOOD)
    with pytest.raises(RuntimeError, match='Unexpected key'):
        model.load_state_dict({**model.state_dict(), 'layers.0.0.attn.to_gates.weight': torch.zeros(1)})


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


def test_loads_by_its_name_on_the_hub(tmp_path: Path) -> None:
    """The hub's cache on the disk has the files, as after a download."""
    model = HierarchicalTransformer(**GOOD)
    repo = tmp_path / 'models--someone--tiny'
    model.save_pretrained(repo / 'snapshots' / ('a' * 40))
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('a' * 40)
    again = HierarchicalTransformer.from_pretrained('someone/tiny', cache_dir=tmp_path)
    assert torch.equal(again.token_emb.weight, model.token_emb.weight)


class Wider(HierarchicalTransformer):
    """A subclass with one more argument and one more module."""

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
    """The constructors compute with values, or keep tensors that are not saved."""

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


class Replacing(HierarchicalTransformer):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        give_activation(self)


def test_a_subclass_that_replaces_modules_itself_is_saved(tmp_path: Path) -> None:
    model = Replacing(**GOOD)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 11, (1, 9))
    torch.testing.assert_close(Replacing.from_pretrained(tmp_path)(ids), model.eval()(ids))


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
    # Initialized by the constructor, in the dtype of the other weights.
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
    """The file replaces all weights, and their initialization would take most of the time."""
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    HierarchicalTransformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('name', ['', None])
def test_a_name_of_nothing_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match='must be a folder or the name of a repository'):
        HierarchicalTransformer.from_pretrained(name)
