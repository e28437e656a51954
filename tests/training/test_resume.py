"""A run that was killed, stopped or damaged ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import csv
import os
import re
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
from support.commands import ROOT, run, run_command
from support.resumed import PLAIN, SETTINGS, assert_same, contents, copy_half, edit, flip, outcome, start, train_whole

from simple_hierarchical_transformer.training import checkpoints, run_folder


@pytest.fixture(scope='module')
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(corpus, tmp_path_factory.mktemp('unbroken') / 'run')


@pytest.fixture
def halfway(unbroken: Path, tmp_path: Path) -> Path:
    """The run as it was after step 15."""
    return copy_half(unbroken, tmp_path / 'run')


KILLER = textwrap.dedent(
    """
    import os, random, signal, sys, time
    import train                                                    # once, before forking: children start quickly

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
        # kill at a random time, or while a checkpoint is being written
        in_write = draw.random() < 0.5
        end = time.monotonic() + (60 if in_write else draw.uniform(0.3, 1.5))
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            names = os.listdir(out) if os.path.isdir(out) else []
            partial = [name for name in names if name.endswith('.partial') and name not in seen]
            if kills < 8 and ((partial and in_write) or time.monotonic() > end):
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


def test_a_run_killed_at_any_instant_ends_as_the_unbroken_one(unbroken: Path, corpus: Path, tmp_path: Path) -> None:
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
def test_a_signal_to_stop_saves_first(
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
    assert f'resuming from {saved}' in result.stdout
    assert_same(outcome(out), outcome(unbroken))


def test_a_newer_torn_checkpoint_does_not_displace_the_one_just_saved(unbroken: Path, halfway: Path) -> None:
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
    held = run_folder.lock(halfway / 'run.json')
    result = run('--resume', halfway)
    assert result.returncode == 1
    assert 'another run is active in this folder' in result.stderr
    assert held


# train.py with a clock that advances by a tick at each reading, independent of the machine
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
    # a step takes two ticks
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


def test_a_torn_checkpoint_is_passed_over(unbroken: Path, halfway: Path) -> None:
    newest = halfway / 'checkpoint-15'
    weights = newest / 'training.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = contents(halfway)

    result = run('--resume', newest)
    assert result.returncode == 1
    assert re.search(
        r'error: .*checkpoint-15 is damaged: training\.safetensors has [\d,]+ bytes, not [\d,]+', result.stderr
    )
    assert contents(halfway) == before

    result = run('--resume', halfway)
    assert result.returncode == 0, result.stderr
    assert 'checkpoint-15 is damaged' in result.stdout
    assert f'resuming from {halfway / "checkpoint-10"}' in result.stdout
    assert_same(outcome(halfway), outcome(unbroken))
    checkpoints.read_record(halfway / 'checkpoint-15')


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda folder: (folder / 'model.safetensors').unlink(), 'is damaged: model.safetensors is missing'),
        (lambda folder: flip(folder / 'model.safetensors'), 'is damaged: model.safetensors is not what was written'),
        (lambda folder: (folder / 'training.json').write_text('{'), 'is damaged, or not a checkpoint of train.py'),
        (lambda folder: (folder / 'training.json').write_text('[]'), 'is damaged, or not a checkpoint of train.py'),
        (lambda folder: (folder / 'training.json').unlink(), 'there is no training.json in it'),
        (lambda folder: edit(folder, format=2), 'has format 2, by a newer version'),
        (shutil.rmtree, 'there is no such folder'),
    ],
)
def test_a_foreign_or_broken_checkpoint_is_named(halfway: Path, damage: Any, message: str) -> None:
    damage(halfway / 'checkpoint-15')
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoints.read_record(halfway / 'checkpoint-15')


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
        (
            ('--resume', halfway / 'checkpoint-10'),
            f'the newest: --resume {halfway} continues from checkpoint-15',
        ),
        (
            ('--resume', tmp_path / 'checkpoint-1'),
            f'{tmp_path / "checkpoint-1" / "training.json"}: settings is missing',
        ),
        (('--resume', tmp_path / 'foreign'), 'there is no complete checkpoint in'),
        (('--resume', unbroken / 'final'), f'holds only a model: --resume {unbroken} continues its run'),
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
        assert 'was trained on other data than' in refuse('--resume', halfway)
    finally:
        corpus.write_text(text)
    assert contents(halfway) == before


def test_an_older_checkpoint_is_a_branch(unbroken: Path, halfway: Path, tmp_path: Path) -> None:
    before = contents(halfway)
    # settings that do not change the result may differ
    branch = ('--resume', halfway / 'checkpoint-10', '--out', tmp_path / 'branch', '--keep', 1, '--workers', 2)
    result = run(*branch, '--batch-size', 1)
    assert result.returncode == 0, result.stderr
    assert contents(halfway) == before
    assert_same(outcome(tmp_path / 'branch'), outcome(unbroken))
    scores = {row['step']: row.get('valid_bits_per_byte') for row in outcome(unbroken)['record']['rows']}
    best = min((step for step in (15, 20, 24)), key=lambda step: scores[step])
    kept = sorted(path.name for path in (tmp_path / 'branch').glob('checkpoint-*'))
    assert kept == sorted({f'checkpoint-{best}', 'checkpoint-24'})


@pytest.mark.parametrize(('number', 'times', 'code'), [(signal.SIGHUP, 2, 129), (signal.SIGTERM, 1, 143)])
def test_a_signal_to_all_of_its_processes_saves_first(
    corpus: Path, tmp_path: Path, number: signal.Signals, times: int, code: int
) -> None:
    """Closed terminals, `timeout` and job schedulers signal the workers too."""
    out = tmp_path / 'run'
    args = ('--data', corpus, '--out', out, *PLAIN, '--steps', 10**6, '--every', 2, '--workers', 1)
    process = start(*args, start_new_session=True)
    metrics = out / 'metrics.csv'
    # the workers run once there is a second row
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2) and process.poll() is None:
        time.sleep(0.002)
    for _ in range(times):
        os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert 'Traceback' not in said
    assert checkpoints.newest(out, print)


def test_a_closed_stdout_saves_first(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    command = run_command('--data', corpus, '--out', out, *PLAIN, '--steps', 10**6)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        assert 'to train on' in process.stdout.readline()
        # like head -1
        process.stdout.close()
        assert process.stderr
        said = process.stderr.read()
        assert process.wait(timeout=60) == 141, said
    assert 'Traceback' not in said
    assert 'BrokenPipe' not in said
    assert checkpoints.newest(out, print)
