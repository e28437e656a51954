"""A run that was killed, stopped, torn or starved goes on as if nothing had been, or says why it does not."""

from __future__ import annotations

import csv
import ctypes
import functools
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run, run_command
from safetensors.torch import load_file

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import checkpoints

# all that a step's outcome hangs on: states of segments, drawn losses, averages, two optimizers in one, shared weights
SETTINGS: tuple[object, ...] = (
    '--preset', 'cpu', '--steps', 24, '--every', 7, '--checkpoint-every', 5, '--keep', 9, '--valid-bytes', 1024,
    '--seq-len', 64, '--segment-length', 16, '--batch-size', 1, '--grad-accum', 2, '--optimizer', 'muon', '--ema', 0.9,
    '--model', 'dim=16', 'depth=1', 'heads=1', 'ff_mult=2', 'share_feed_forward=True', 'recon_loss_weight=0.1',
    'recon_sample=0.5', 'next_latent_loss_weight=0.25', 'ngrams=(2,3)', 'ngram_rows=256',
)  # fmt: skip


def start(*args: object, **popen: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        run_command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **popen
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob('*')) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def outcome(out: Path, step: int = 24) -> dict[str, Any]:
    """All of a run that has to be the same again: everything but the clock."""
    folder = out / f'checkpoint-{step}'
    tensors = {**load_file(folder / 'model.safetensors'), **load_file(folder / 'training.safetensors')}
    record = checkpoints.read_record(folder)['progress']
    for row in record['rows']:
        del row['minutes']
    del record['elapsed'], record['identity']
    return dict(tensors=tensors, record=record)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours['record'] == theirs['record']
    assert ours['tensors'].keys() == theirs['tensors'].keys()
    assert all(torch.equal(ours['tensors'][key], theirs['tensors'][key]) for key in theirs['tensors'])


@pytest.fixture(scope='module')
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('unbroken') / 'run'
    result = run('--data', corpus, '--out', out, *SETTINGS)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def halfway(unbroken: Path, tmp_path: Path) -> Path:
    """The run as it was after step 15."""
    out = tmp_path / 'run'
    out.mkdir()
    for name in ('checkpoint-10', 'checkpoint-15'):
        shutil.copytree(unbroken / name, out / name)
    shutil.copy(unbroken / 'metrics.csv', out)
    return out


# killed

KILLER = textwrap.dedent(
    """
    import os, random, signal, sys, time
    import train                                                    # once: children are forked, and begin at once

    draw, out, kills = random.Random(int(sys.argv[1])), sys.argv[2], 0
    seen = set()
    while True:
        child = os.fork()
        if not child:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            try:
                train.main(sys.argv[3:] + ['--out', out, '--resume'])
            except BaseException as error:
                with open(out + '.error', 'a') as file:
                    file.write(repr(error))
                os._exit(1)
            os._exit(0)
        # some at any instant, some while a checkpoint is being written
        in_write = draw.random() < 0.5
        end = time.monotonic() + (60 if in_write else draw.uniform(0.3, 2.5))
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            names = os.listdir(out) if os.path.isdir(out) else []
            partial = [name for name in names if name.endswith('.partial') and name not in seen]
            if kills < 12 and ((partial and in_write) or time.monotonic() > end):
                seen.update(partial)
                os.kill(child, signal.SIGKILL)
                kills += 1
                os.waitpid(child, 0)
                break
            time.sleep(0.0005)
        else:
            print(kills, len(seen), os.waitstatus_to_exitcode(status[1]))
            break
    """
)


def test_killed_at_any_instant_a_run_ends_as_if_it_had_not_been(unbroken: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    args = [sys.executable, '-c', KILLER, 0, out, '--data', corpus, *SETTINGS]
    result = subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    kills, in_writing, code = map(int, result.stdout.split())
    assert not out.with_suffix('.error').exists(), out.with_suffix('.error').read_text()
    assert code == 0
    assert kills >= 3
    assert in_writing >= 1
    assert_same(outcome(out), outcome(unbroken))
    assert (out / 'final' / 'model.safetensors').read_bytes() == (unbroken / 'final' / 'model.safetensors').read_bytes()

    def columns(path: Path) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if k != 'minutes'} for row in csv.DictReader(path.open())]

    assert columns(out / 'metrics.csv') == columns(unbroken / 'metrics.csv')
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in unbroken.iterdir())


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_first(
    unbroken: Path, corpus: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / 'run'
    process = start('--data', corpus, '--out', out, *SETTINGS, '--checkpoint-every', 1000, '--workers', 1)
    while not (out / 'metrics.csv').exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert 'Traceback' not in said
    (saved,) = out.glob('checkpoint-*')
    command = re.findall(r'python train\.py (.+)', said)[0].split()
    result = run(*command, '--checkpoint-every', 5)
    assert result.returncode == 0, result.stderr
    assert f'going on from {saved}' in result.stdout
    assert_same(outcome(out), outcome(unbroken))


def test_a_newer_torn_one_does_not_push_out_what_was_just_saved(unbroken: Path, halfway: Path) -> None:
    shutil.copytree(unbroken / 'checkpoint-24', halfway / 'checkpoint-24')
    (halfway / 'checkpoint-24' / 'model.safetensors').unlink()
    process = start('--resume', halfway, '--keep', 1, '--checkpoint-every', 1000)
    assert process.stdout
    while 'to train on' not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    saved = int(re.findall(r'stopped at step (\d+)', said)[0])
    assert 15 <= saved < 24
    found = checkpoints.newest(halfway, lambda said: None)
    assert found
    assert found[1]['step'] == saved


def test_two_runs_do_not_share_a_folder(halfway: Path) -> None:
    held = checkpoints.lock(halfway / 'run.json')
    result = run('--resume', halfway)
    assert result.returncode == 1
    assert 'another run is at work in this folder' in result.stderr
    assert held


# train.py with a clock that moves on by a tick whenever it is read, whatever the pace of the machine
CLOCKED = """
import itertools, sys, time, types
import train
from simple_hierarchical_transformer.training import run
ticks = itertools.count(int(sys.argv[1]))
run.time = types.SimpleNamespace(**{**vars(time), 'monotonic': lambda: 0.05 * next(ticks)})
train.main(sys.argv[2:])
"""


def test_a_run_in_minutes_goes_on_with_the_time_it_has_left(corpus: Path, tmp_path: Path) -> None:
    def clocked(begins: int, *args: object) -> dict[str, Any]:
        command = [sys.executable, '-c', CLOCKED, str(begins), *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        _, record = checkpoints.newest(out, print)  # type: ignore[misc]
        return record['progress']

    out = tmp_path / 'run'
    settings = [x for x in SETTINGS if x not in ('--steps', 24)]
    whole = clocked(0, '--data', corpus, '--out', out, *settings, '--minutes', 0.05)
    # two ticks a step
    assert 3 <= whole['elapsed'] < 3.11
    assert 28 <= whole['step'] <= 31
    for path in out.glob('*-*'):
        if path.name != 'checkpoint-15':
            shutil.rmtree(path)

    resumed = clocked(10**6, '--resume', out)
    assert 3 <= resumed['elapsed'] < 3.11
    assert 0 <= resumed['step'] - whole['step'] <= 1
    minutes = [row['minutes'] for row in resumed['rows']]
    assert minutes == sorted(minutes)
    assert max(minutes) <= 0.052


# torn, foreign, changed


def test_a_torn_checkpoint_is_passed_over(unbroken: Path, halfway: Path) -> None:
    newest = halfway / 'checkpoint-15'
    weights = newest / 'training.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = contents(halfway)

    result = run('--resume', newest)
    assert result.returncode == 1
    assert re.search(
        r'error: .*checkpoint-15 is torn: training\.safetensors has [\d,]+ bytes, not [\d,]+', result.stderr
    )
    assert contents(halfway) == before

    result = run('--resume', halfway)
    assert result.returncode == 0, result.stderr
    assert 'checkpoint-15 is torn' in result.stdout
    assert f'going on from {halfway / "checkpoint-10"}' in result.stdout
    assert_same(outcome(halfway), outcome(unbroken))
    checkpoints.read_record(halfway / 'checkpoint-15')


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda folder: (folder / 'model.safetensors').unlink(), 'is torn: model.safetensors is missing'),
        (lambda folder: flip(folder / 'model.safetensors'), 'is torn: model.safetensors is not what was written'),
        (lambda folder: (folder / 'training.json').write_text('{'), 'is torn, or no checkpoint of train.py'),
        (lambda folder: (folder / 'training.json').write_text('[]'), 'is torn, or no checkpoint of train.py'),
        (lambda folder: (folder / 'training.json').unlink(), 'there is no training.json in it'),
        (lambda folder: edit(folder, format=2), 'has format 2, by a newer version'),
        (shutil.rmtree, 'there is no such folder'),
    ],
)
def test_a_foreign_or_broken_checkpoint_is_named(halfway: Path, damage: Any, message: str) -> None:
    damage(halfway / 'checkpoint-15')
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoints.read_record(halfway / 'checkpoint-15')


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(folder: Path, *drop: str, **changes: Any) -> None:
    record = {**json.loads((folder / 'training.json').read_text()), **changes}
    kept = {key: value for key, value in record.items() if key not in drop}
    (folder / 'training.json').write_text(json.dumps(kept))


def test_what_does_not_fit_is_refused_and_nothing_touched(
    unbroken: Path, halfway: Path, corpus: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    before = contents(halfway)
    (tmp_path / 'foreign').mkdir()
    shutil.copytree(halfway / 'checkpoint-15', tmp_path / 'checkpoint-1')
    edit(tmp_path / 'checkpoint-1', 'settings')
    (tmp_path / 'other.txt').write_text('other text. ' * 5000)
    cases: list[tuple[tuple[object, ...], str]] = [
        (('--resume', halfway, '--lr', 0.1), 'was made with other arguments: --lr 0.1, not 0.006. Leave them out'),
        (('--resume', halfway, '--steps', 48, '--model', 'dim=64'), '--steps 48, not 24; --model dim=64, not 16'),
        (('--resume', halfway, '--steps', 48), 'A run can be made longer once it is finished'),
        (('--resume', halfway, '--batch-size', 3), 'a step of this run has 2 sequences'),
        (('--resume', halfway / 'checkpoint-10', '--out', halfway / '..' / halfway.name), 'is not the newest'),
        (('--resume', halfway / 'checkpoint-10'), f'is not the newest: --resume {halfway} goes on from checkpoint-15'),
        (
            ('--resume', tmp_path / 'checkpoint-1'),
            f'{tmp_path / "checkpoint-1" / "training.json"}: settings is missing',
        ),
        (('--resume', tmp_path / 'foreign'), 'there is no whole checkpoint in'),
        (('--resume', unbroken / 'final'), f'is a model alone: --resume {unbroken} goes on with its run'),
        (('--resume', halfway, '--data', tmp_path / 'other.txt'), '--data ['),
        (('--resume', halfway, '--out', unbroken), 'is not empty'),
        (('--resume', '--out', unbroken.parent), 'is not empty'),
    ]
    for args, message in cases:
        assert message in refuse(*args)
    record = (halfway / 'checkpoint-15' / 'training.json').read_bytes()
    for changes, message in (
        (dict(format=2), 'by a newer version'),
        (dict(progress=dict(fuel=1)), 'progress.identity is missing'),
    ):
        edit(halfway / 'checkpoint-15', **changes)
        assert message in refuse('--resume', halfway)
        (halfway / 'checkpoint-15' / 'training.json').write_bytes(record)
    text = corpus.read_text()
    try:
        corpus.write_text(text[:9999] + '!' + text[10000:])
        assert 'was made with other data than' in refuse('--resume', halfway)
    finally:
        corpus.write_text(text)
    assert contents(halfway) == before


def test_an_older_checkpoint_is_a_branch(unbroken: Path, halfway: Path, tmp_path: Path) -> None:
    before = contents(halfway)
    # what does not change the outcome may be asked for otherwise
    branch = ('--resume', halfway / 'checkpoint-10', '--out', tmp_path / 'branch', '--keep', 1, '--workers', 2)
    result = run(*branch, '--batch-size', 1)
    assert result.returncode == 0, result.stderr
    assert contents(halfway) == before
    assert_same(outcome(tmp_path / 'branch'), outcome(unbroken))
    scores = {row['step']: row.get('valid_bits_per_byte') for row in outcome(unbroken)['record']['rows']}
    best = min((step for step in (15, 20, 24)), key=lambda step: scores[step])
    kept = sorted(path.name for path in (tmp_path / 'branch').glob('checkpoint-*'))
    assert kept == sorted({f'checkpoint-{best}', 'checkpoint-24'})


# what the disk does


@pytest.mark.parametrize('what', ['model.safetensors', 'training.safetensors', 'loss.png'])
def test_a_full_disk_ends_the_run_and_touches_nothing(unbroken: Path, halfway: Path, what: str) -> None:
    size = (unbroken / ('.' if what == 'loss.png' else 'checkpoint-15') / what).stat().st_size

    def small_files() -> None:
        # as a full disk does, refuses what grows beyond; the signal that goes with it is ignored by Python
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    before = {name: data for name, data in contents(halfway).items() if name.startswith('checkpoint')}
    process = start('--resume', halfway, preexec_fn=small_files)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert 'Traceback' not in said
    errors = re.findall(r'error: .*', said)
    assert len(errors) == 1
    assert 'could not be written' in errors[0]
    assert {name: data for name, data in contents(halfway).items() if name.startswith('checkpoint')} == before
    assert list(halfway.glob('.*')) == []

    if what == 'training.safetensors':
        assert run('--resume', halfway).returncode == 0
        assert_same(outcome(halfway), outcome(unbroken))


def without_power_over_permissions() -> None:
    """Takes from root what lets it write everywhere; from others there is nothing to take."""
    pr_capbset_drop, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_a_folder_that_cannot_be_written_is_named(halfway: Path, corpus: Path) -> None:
    before = contents(halfway)
    halfway.chmod(0o555)
    try:
        for args in (('--resume', halfway), ('--data', corpus, '--out', halfway / 'new', *SETTINGS)):
            process = start(*args, preexec_fn=without_power_over_permissions)
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 1, said
            assert re.search(r'error: .*Permission denied', said), said
            assert 'Traceback' not in said
    finally:
        halfway.chmod(0o755)
    assert contents(halfway) == before


# numbers

INJECT = textwrap.dedent(
    """
    import sys
    import train
    from simple_hierarchical_transformer import HierarchicalTransformer

    what, broken = sys.argv[1], set(map(int, sys.argv[2].split(',')))
    losses, calls = HierarchicalTransformer.losses, [0]

    def spoilt(self, *args):
        loss, parts = losses(self, *args)
        if loss.is_meta:
            # no step: the memory of one is planned
            return loss, parts
        step, calls[0] = calls[0], calls[0] + 1
        if step in broken:
            # a loss that is not finite, or a finite one whose gradient is not
            loss = loss * float('nan') if what == 'loss' else loss + (0 * self.norms[0].weight.sum()).sqrt()
        return loss, parts

    HierarchicalTransformer.losses = spoilt
    train.main(sys.argv[3:])
    """
)


def inject(what: str, steps: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-c', INJECT, what, steps, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=ROOT)


PLAIN = (
    '--preset',
    'cpu',
    '--steps',
    12,
    '--every',
    4,
    '--log-every',
    4,
    '--checkpoint-every',
    4,
    '--valid-bytes',
    1024,
)
PLAIN += ('--seq-len', 32, '--batch-size', 1, '--model', 'dim=16', 'depth=1', 'heads=1')


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_step_that_is_not_finite_is_left_out(corpus: Path, tmp_path: Path, what: str) -> None:
    result = inject(what, '2,7,8', '--data', corpus, '--out', tmp_path / 'run', *PLAIN)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / 'run' / 'metrics.csv').open()))
    # the checkpoint of step 8, whose step was left out, has to wait for a good one
    assert [(int(row['step']), int(row['skipped'])) for row in rows] == [(0, 0), (4, 1), (8, 2), (12, 3)]
    assert sorted(path.name for path in (tmp_path / 'run').glob('checkpoint-*')) == ['checkpoint-12', 'checkpoint-4']
    assert all(float(row['valid_bits_per_byte']) < 9 for row in rows)
    model = HierarchicalTransformer.from_pretrained(tmp_path / 'run' / 'final')
    assert all(p.isfinite().all() for p in model.parameters())
    assert '| steps skipped | 3 |' in (tmp_path / 'run' / 'report.md').read_text()


def test_several_in_a_row_end_the_run(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    result = inject('loss', '5,6,7,8,9,10,11', '--data', corpus, '--out', out, *PLAIN)
    assert result.returncode == 1
    assert 'not finite in 5 steps in a row, the last being step 10' in result.stderr
    assert 'Traceback' not in result.stderr
    record = checkpoints.read_record(out / 'checkpoint-4')
    assert record['progress']['skipped'] == 0

    # what was injected is gone, so it goes on
    assert run('--resume', out).returncode == 0
    assert checkpoints.read_record(out / 'checkpoint-12')['progress']['skipped'] == 0


# told to stop by what is lost


@pytest.mark.parametrize(('number', 'times', 'code'), [(signal.SIGHUP, 2, 129), (signal.SIGTERM, 1, 143)])
def test_what_tells_all_of_its_processes_to_stop_has_it_save_first(
    corpus: Path, tmp_path: Path, number: signal.Signals, times: int, code: int
) -> None:
    """A terminal that closes, `timeout`, and what schedules jobs: they tell workers, too."""
    out = tmp_path / 'run'
    args = ('--data', corpus, '--out', out, *PLAIN, '--steps', 10**6, '--every', 2, '--workers', 1)
    process = start(*args, start_new_session=True)
    metrics = out / 'metrics.csv'
    # a worker is at work once there is a second row
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2) and process.poll() is None:
        time.sleep(0.002)
    for _ in range(times):
        os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert 'Traceback' not in said
    assert checkpoints.newest(out, print)


def test_a_closed_stdout_has_it_save_first(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    command = run_command('--data', corpus, '--out', out, *PLAIN, '--steps', 10**6)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        assert 'to train on' in process.stdout.readline()
        # as head -1 does
        process.stdout.close()
        assert process.stderr
        said = process.stderr.read()
        assert process.wait(timeout=60) == 141, said
    assert 'Traceback' not in said
    assert 'BrokenPipe' not in said
    assert checkpoints.newest(out, print)


# trained longer


def test_a_finished_run_is_trained_longer(
    unbroken: Path, tmp_path: Path, train_here: Callable[..., None], refuse: Callable[..., str]
) -> None:
    whole, broken = (shutil.copytree(unbroken, tmp_path / name) for name in ('whole', 'broken'))
    for args, message in (
        (('--steps', 20), 'has 24 steps and'),
        (('--steps', 20), '--steps 20 is no longer (it counts all of the run'),
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

    # it is a run like others: broken off and resumed, it computes the same
    shutil.copytree(whole / 'checkpoint-25', broken / 'checkpoint-25')
    train_here('--resume', broken)
    assert_same(outcome(broken, 28), outcome(whole, 28))
    # nor is it trained longer by what it was asked before
    before = contents(broken)
    train_here('--resume', broken, '--steps', 28)
    assert contents(broken) == before

    # steps that are done may be gone on with in minutes
    assert 'is no longer' in refuse('--resume', broken, '--minutes', 1e-6)


def weights_of(run: Path, step: int) -> Path:
    return run / f'checkpoint-{step}' / 'model.safetensors'


# a folder that is not the run's own


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
    # what the run left when it was ended in the middle of writing
    left = out / f'.{json.loads((out / "run.json").read_text())["identity"]}.partial' / 'checkpoint-2'
    left.mkdir(parents=True)
    begun = ('--data', corpus, '--out', out, '--resume', *PLAIN)
    assert 'was made with other arguments: --steps 12, not 2' in refuse(*begun)
    train_here(*begun, '--steps', 2)
    assert checkpoints.read_record(out / 'final')['step'] == 2
    assert (foreign / 'file').read_text() == 'of another tool'
    assert not left.exists()
    # of checkpoints of others, none is removed
    other = shutil.copytree(out / 'checkpoint-2', out / 'checkpoint-1')
    edit(other, progress=dict(identity='01234567'), step=1)
    train_here('--resume', out, '--steps', 4, '--keep', 1)
    assert sorted(path.name for path in out.glob('checkpoint-*')) == ['checkpoint-1', 'checkpoint-4']


# edited by hand

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
    # what is not refused does not train
    monkeypatch.setattr(importlib.import_module('train').Run, 'train', lambda run: print('not refused'))
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
        assert 'checkpoint-15 is torn' in refuse('--resume', halfway / 'checkpoint-15')
    file.write_text(json.dumps(whole, indent=1) + '\n')
    assert contents(halfway) == before
