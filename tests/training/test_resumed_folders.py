"""Finished runs that are trained longer, folders of others, and edited records."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.resumed import PLAIN, assert_same, contents, copy_half, edit, outcome, train_whole

from simple_hierarchical_transformer.training import checkpoints
from simple_hierarchical_transformer.training.run import Run


@pytest.fixture(scope='module')
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(corpus, tmp_path_factory.mktemp('unbroken') / 'run')


@pytest.fixture
def halfway(unbroken: Path, tmp_path: Path) -> Path:
    """The run as it was after step 15."""
    return copy_half(unbroken, tmp_path / 'run')


def test_a_finished_run_is_trained_longer(
    unbroken: Path, tmp_path: Path, train_here: Callable[..., None], refuse: Callable[..., str]
) -> None:
    whole, broken = (shutil.copytree(unbroken, tmp_path / name) for name in ('whole', 'broken'))
    for args, message in (
        (('--steps', 20), 'has run for 24 steps and'),
        (('--steps', 20), '--steps 20 is not longer (it counts the whole run'),
        (('--steps', 30, '--lr', 0.1), '--lr 0.1, not 0.006'),
    ):
        assert message in refuse('--resume', whole, *args)

    train_here('--resume', whole, '--steps', 28)
    assert checkpoints.read_record(whole / 'final')['step'] == 28
    final = load_file(whole / 'final' / 'model.safetensors')
    assert all(torch.equal(final[key], each) for key, each in load_file(weights_of(whole, 28)).items())
    assert not torch.equal(final['token_emb.weight'], load_file(weights_of(unbroken, 24))['token_emb.weight'])
    assert '28 steps of muon' in (whole / 'final' / 'README.md').read_text(encoding='utf-8')
    assert f'python train.py --resume {whole} --steps 56' in (whole / 'report.md').read_text(encoding='utf-8')
    assert [path.name for path in whole.glob('.*')] == []

    # it can be stopped and resumed like any run, with the same result
    shutil.copytree(whole / 'checkpoint-25', broken / 'checkpoint-25')
    train_here('--resume', broken)
    assert_same(outcome(broken, 28), outcome(whole, 28))
    # its own number of steps does not make it longer
    before = contents(broken)
    train_here('--resume', broken, '--steps', 28)
    assert contents(broken) == before

    # a run in steps may be continued in minutes
    assert 'is not longer' in refuse('--resume', broken, '--minutes', 1e-6)


def weights_of(run: Path, step: int) -> Path:
    return run / f'checkpoint-{step}' / 'model.safetensors'


def test_what_a_run_did_not_write_is_not_written_over(
    unbroken: Path, corpus: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    new = ('--data', corpus, *PLAIN)
    tool = tmp_path / 'tool'
    (tool / '.checkpoint-7').mkdir(parents=True)
    for name in ('metrics.csv', 'report.md', '.checkpoint-7/state'):
        (tool / name).write_text('of another tool')
    begun = tmp_path / 'begun'
    begun.mkdir()
    (begun / 'run.json').write_text('{"metrics": []}')
    hidden = tmp_path / 'hidden'
    (hidden / '.git').mkdir(parents=True)
    gone = shutil.copytree(unbroken, tmp_path / 'gone')
    for path in gone.glob('checkpoint-*'):
        shutil.rmtree(path)
    edited = shutil.copytree(unbroken, tmp_path / 'edited')
    (edited / 'final' / 'README.md').write_text('my own words')
    later = shutil.copytree(unbroken, tmp_path / 'later')
    (later / 'checkpoint-26').mkdir()
    (later / 'checkpoint-26' / 'model.bin').write_text('of another tool')
    mixed = shutil.copytree(unbroken, tmp_path / 'mixed')
    mark = json.loads((mixed / 'run.json').read_text())
    (mixed / 'run.json').write_text(json.dumps(dict(mark, identity='01234567')))

    before = contents(tmp_path)
    cases: list[tuple[tuple[object, ...], str]] = [
        (('--out', tool, '--resume', *new), f'--out: {tool} is not empty'),
        (('--out', begun, '--resume', *new), f'--out: {begun} is not empty'),
        (('--out', hidden, '--resume', *new), f'--out: {hidden} is not empty'),
        (('--out', gone, '--resume', *new), f'{gone} has a finished run, but none of its checkpoints'),
        (('--out', gone, *new), f'--out: {gone} is not empty'),
        (('--resume', edited, '--steps', 30), f'{edited / "final"} is not as this run wrote it: move it away'),
        (('--resume', later, '--steps', 30), f'{later / "checkpoint-26"} is not as this run wrote it'),
        (('--resume', mixed, '--steps', 30), f'--out: {mixed} is not empty, and of another run'),
    ]
    for args, message in cases:
        assert message in refuse(*args)
    assert contents(tmp_path) == before


def test_a_run_without_a_checkpoint_yet_begins_as_it_was_asked_to(
    corpus: Path, tmp_path: Path, train_here: Callable[..., None], refuse: Callable[..., str]
) -> None:
    out = tmp_path / 'run'
    train_here('--data', corpus, '--out', out, *PLAIN, '--steps', 2)
    shutil.rmtree(out / 'final')
    shutil.rmtree(out / 'checkpoint-2')
    foreign = out / '.checkpoint-2.partial'
    foreign.mkdir()
    (foreign / 'file').write_text('of another tool')
    # left behind by a run that was killed while writing
    left = out / f'.{json.loads((out / "run.json").read_text())["identity"]}.partial' / 'checkpoint-2'
    left.mkdir(parents=True)
    begun = ('--data', corpus, '--out', out, '--resume', *PLAIN)
    assert 'was made with other arguments: --steps 12, not 2' in refuse(*begun)
    train_here(*begun, '--steps', 2)
    assert checkpoints.read_record(out / 'final')['step'] == 2
    assert (foreign / 'file').read_text() == 'of another tool'
    assert not left.exists()
    # checkpoints of other runs are not removed
    other = shutil.copytree(out / 'checkpoint-2', out / 'checkpoint-1')
    edit(other, progress=dict(identity='01234567'), step=1)
    train_here('--resume', out, '--steps', 4, '--keep', 1)
    assert sorted(path.name for path in out.glob('checkpoint-*')) == ['checkpoint-1', 'checkpoint-4']


EDITS: list[tuple[str, Any]] = [
    *((f'settings.{name}', value) for name, values in {
        'lr': ('fast', -1, None, [], True, '0.006', float('nan')),
        'steps': (0, -5, 2.5, '24', True, [24], None, 10**400),
        'minutes': (3, 'long'),
        'seq_len': (0, None, {}, 64.0),
        'segment_length': (-16, 'x'),
        'batch_size': (0, None, 'two'),
        'grad_accum': (0, 1.5),
        'optimizer': ('sgd', None, 3, 'adamw'),
        'fuel': (1,),
        'schedule': ('cubic', {}),
        'mixed_precision': ('fp8', None),
        'data': ('text.txt', [], [3], {}),
        'model': (None, [], 'dim=16', {'seq_len': 8}, {'dim': 'wide'}, {'dim': 32}, {'width': 3}),
        'documents': ('yes', 1, None),
        'compile': ('no',),
        'ema': (1.5, 'x'),
        'every': (0, 'x'),
        'checkpoint_every': (0, None),
        'keep': (-1, 'all'),
        'log_every': (0, None),
        'log_with': ('tensorboard', ['paper'], 5),
        'workers': (-1, None, 'x'),
        'valid_bytes': (0, None),
        'seed': ('x', None, 1.5),
        'warmup': (1, -0.1),
        'weight_decay': ('x', 2),
        'clip': (0, None),
        'text_key': (5, None),
        'preset': ('tpu', 5, None),
    }.items() for value in values),
    *((f'progress.{name}', value) for name, values in {
        'step': ('x', -1, 14, None, 1e3),
        'elapsed': ('x', -1, float('inf'), None),
        'nats': ('x', None),
        'scored': (1.5, 'x'),
        'skipped': (None, -2),
        'in_a_row': ('x',),
        'updates': ('x', -1),
        'position': ('x', 7.5),
        'scaler': ([], {'scale': 'x'}),
        'identity': (None, '../../home', 5, 'ABC'),
        'rows': (None, {}, [5], [{}], [{'step': 'x'}], []),
        'fuel': (1,),
    }.items() for value in values),
    ('settings', None), ('settings', []), ('progress', None), ('progress', []), ('rows', 'x'), ('rows', 0),
    ('rows', 3), ('data', 'x'), ('data', [1]), ('step', 1e400), ('step', -1), ('files', []), ('files', {'x': 'y'}),
    ('format', 'x'), ('format', None), ('settings.model.dim', 32), ('settings.model.dim', 'wide'),
    ('settings.model.depth', [1, 2, 3]),
]  # fmt: skip


def test_records_that_were_edited_are_refused_by_name(
    halfway: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # records that pass the check must not start training here
    monkeypatch.setattr(Run, 'train', lambda run: print('not refused'))
    file = halfway / 'checkpoint-15' / 'training.json'
    whole = json.loads(file.read_text())
    before = contents(halfway)
    for path, value in EDITS:
        changed = json.loads(json.dumps(whole))
        *owners, name = path.split('.')
        functools.reduce(dict.__getitem__, owners, changed)[name] = value
        file.write_text(json.dumps(changed))
        said = refuse('--resume', halfway / 'checkpoint-15')
        assert 'checkpoint-15' in said, (path, value, said)
        assert said.count('\n') <= 1, (path, value, said)
    for text in ('[' * 10**5, '\ud800', '{"step": 1e999}'):
        file.write_bytes(text.encode('utf-8', 'surrogatepass'))
        assert 'checkpoint-15 is damaged' in refuse('--resume', halfway / 'checkpoint-15')
    file.write_text(json.dumps(whole, indent=1) + '\n')
    assert contents(halfway) == before
