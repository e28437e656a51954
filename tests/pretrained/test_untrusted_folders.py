"""Folders that are damaged, foreign or hostile are refused, with an error that says why."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import GOOD, edit_config
from support.commands import run

from simple_hierarchical_transformer import HierarchicalTransformer, __version__, sample
from simple_hierarchical_transformer.weights import read_tensors, write_tensors


def test_foreign_settings_are_named(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'rope_theta': 1}))
    with pytest.raises(ValueError, match='has settings unknown here: rope_theta'):
        HierarchicalTransformer.from_pretrained(tmp_path)


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
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
        HierarchicalTransformer.from_pretrained(tmp_path)


def test_the_config_says_who_wrote_it_and_newer_formats_are_refused(tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['library_version'] == __version__
    assert config['dim'] == 8

    # The first versions wrote no format.
    older = {key: value for key, value in config.items() if key not in ('format', 'library_version')}
    (tmp_path / 'config.json').write_text(json.dumps(older))
    HierarchicalTransformer.from_pretrained(tmp_path)

    newer = {**config, 'format': config['format'] + 1, 'library_version': '9.0', 'warp_drive': True}
    (tmp_path / 'config.json').write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r'has format 2, by version 9\.0 of the library; this is version'):
        HierarchicalTransformer.from_pretrained(tmp_path)

    (tmp_path / 'config.json').unlink()
    with pytest.raises(ValueError, match=r'is not a saved model: there is no config\.json in it'):
        HierarchicalTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize('number', [True, 0, -1, '1'])
def test_a_format_that_is_none_is_refused(number: Any, tmp_path: Path) -> None:
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format': number}))
    with pytest.raises(ValueError, match='has format'):
        HierarchicalTransformer.from_pretrained(tmp_path)


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """Raises MemoryError once the process takes `more` bytes above its present size."""
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
        (b'', r'config\.json is not JSON: Expecting value'),
        (b'{"dim": ', r'config\.json is not JSON: Expecting value'),
        (b'\xff{}', r'config\.json is not JSON: .*utf-8'),
        (b'[' * 100_000, r'config\.json is not JSON: .*recursion'),
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
    """Opening a pipe would wait for another process forever."""
    HierarchicalTransformer(**GOOD).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    code = (
        'import sys; from simple_hierarchical_transformer import HierarchicalTransformer;'
        'HierarchicalTransformer.from_pretrained(sys.argv[1])'
    )
    ended = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, timeout=60)
    assert ended.stderr.endswith(f'ValueError: {tmp_path / name} is not a regular file\n')


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    model = HierarchicalTransformer(**GOOD)
    model.save_pretrained(tmp_path, state_dict=dict(model.state_dict(), **{'norms.0.bias': torch.zeros(8).long()}))
    with pytest.raises(ValueError, match=r'has norms\.0\.bias of torch\.int64, which must be torch\.float32'):
        HierarchicalTransformer.from_pretrained(tmp_path)
