"""A run of train.py: its record, its report, and the commands that it prints."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import ROOT, run, run_command
from support.runs import FEW, validated
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simple_hierarchical_transformer import sample

TRACKED = 'simple-hierarchical-transformer'


@pytest.fixture(scope='module')
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp('runs') / 'run'
    settings = ('--seq-len', 128, '--batch-size', 2, '--steps', 60, '--checkpoint-every', 25, '--every', 20)
    settings += ('--log-with', 'tensorboard', '--log-every', 5, '--keep', 9)
    result = run('--preset', 'cpu', '--data', corpus, '--out', out, *settings)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_learns_and_leaves_a_record(trained: tuple[Path, str]) -> None:
    out, said = trained
    rows = list(csv.DictReader((out / 'metrics.csv').open()))
    first, last = (float(row['valid_bits_per_byte']) for row in (rows[0], rows[-1]))
    assert (int(rows[0]['step']), int(rows[-1]['step'])) == (0, 60)
    assert int(rows[-1]['bytes']) == 60 * 2 * 128
    assert first > 6
    assert last < 0.5 * first
    assert (out / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in out.glob('*-*/')) == [
        'checkpoint-25',
        'checkpoint-50',
        'checkpoint-60',
        TRACKED,
    ]
    assert f'{last:.3f} bits per byte' in said


def test_the_tracker_has_the_curves(trained: tuple[Path, str]) -> None:
    out, _ = trained
    events = EventAccumulator(str(out / TRACKED)).Reload()
    assert 'train/next_latent/4x' in events.Tags()['scalars']
    for name in ('ce', 'recon', 'bits_per_byte', 'gradient_norm', 'learning_rate', 'bytes_per_second', 'share_of_peak'):
        values = events.Scalars(f'train/{name}')
        assert [each.step for each in values] == list(range(5, 61, 5))
    losses = [each.value for each in events.Scalars('train/bits_per_byte')]
    assert losses[-1] < 0.5 * losses[0]

    rows = validated(out)
    logged = {each.step: each.value for each in events.Scalars('valid_bits_per_byte')}
    assert logged == {int(row['step']): pytest.approx(float(row['valid_bits_per_byte'])) for row in rows}


def test_the_report_says_how_it_went(trained: tuple[Path, str]) -> None:
    out, _ = trained
    text = (out / 'report.md').read_text()
    last = list(csv.DictReader((out / 'metrics.csv').open()))[-1]
    assert text.startswith(f'# {float(last["valid_bits_per_byte"]):.3f} bits per byte')
    assert '![training and validation score by step](loss.png)' in text
    assert f'python train.py --resume {out}' in text
    assert f'python -m simple_hierarchical_transformer.sample {out}/final --prompt "The "' in text
    assert '>>>' in text
    assert '| seq_len | `128` |' in text
    card = (out / 'final' / 'README.md').read_text()
    assert re.search(r'60 steps of muon, 15,360 bytes read in \d:\d\d:\d\d', card)
    assert str(out) not in card
    assert '| 4x | 4 | 96 | 2 x 48 | full |' in card
    assert f'| valid | {float(next(csv.DictReader((out / "metrics.csv").open()))["valid_bits_per_byte"]):.3f} |' in card


def test_the_commands_it_names_score_and_sample(trained: tuple[Path, str]) -> None:
    commands = [shlex.split(line) for line in re.findall(r'python (.+)', trained[1])]
    assert len(commands) == 2

    scored = run(*commands[0][1:], '--split', 'test')
    assert scored.returncode == 0, scored.stderr
    windows, stream = map(float, re.findall(r'test: ([\d.]+) bits per byte', scored.stdout))
    assert stream < windows + 0.1 < 4

    module, *args = commands[1][1:]
    sampled = [run(*args, '--length', 20, '--seed', 1, module=module) for _ in range(2)]
    assert sampled[0].returncode == 0, sampled[0].stderr
    assert sampled[0].stdout.startswith('The ')
    assert len(sampled[0].stdout) >= len('The ') + 20 + 1
    assert sampled[0].stdout == sampled[1].stdout
    assert re.search(r'20 bytes, \d+ per second', sampled[0].stderr)


def test_a_sample_ends_where_it_is_told_to(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    args = map(str, (trained[0] / 'final', '--prompt', 'The ', '--length', 200, '--seed', 1))
    sample.main([*args])
    whole = capsys.readouterr().out
    stops = [whole[20:22], whole[30:33]]
    sample.main(
        [
            str(trained[0] / 'final'),
            '--prompt',
            'The ',
            '--length',
            '200',
            '--seed',
            '1',
            '--stop',
            stops[0],
            '--stop',
            stops[1],
        ]
    )
    ended = capsys.readouterr().out
    end = min(whole.index(stop, 4) + len(stop) for stop in stops)
    assert ended == whole[:end] + '\n'

    sample.main(
        [str(trained[0] / 'final'), '--prompt', 'The ', '--length', '200', '--seed', '1', '--repetition-penalty', '3']
    )
    assert len(set(capsys.readouterr().out)) > len(set(whole))


def test_samples_from_a_file_and_shows_broken_bytes(trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / 'prompt').write_bytes(b'caf\xc3\xa9 \xff ')
    module = 'simple_hierarchical_transformer.sample'
    result = run(trained[0] / 'final', '--prompt-file', tmp_path / 'prompt', '--length', 3, module=module)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('caf\u00e9 \\xff ')


def test_ctrl_c_ends_sampling_cleanly(trained: tuple[Path, str]) -> None:
    endless = run_command(trained[0] / 'final', '--length', 10**6, module='simple_hierarchical_transformer.sample')
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert len(process.stdout.read(30)) == 30
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r'\d+ bytes, \d+ per second', errors)
    assert 'Traceback' not in errors


def test_the_config_is_json_without_surprises(trained: tuple[Path, str]) -> None:
    config = json.loads((trained[0] / 'final' / 'config.json').read_text())
    assert config['seq_len'] == 128
    assert config['ignore_index'] == -1


def test_refuses_before_work_is_lost(
    trained: tuple[Path, str], corpus: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    out, _ = trained
    before = (out / 'metrics.csv').read_bytes()
    short = tmp_path / 'short.txt'
    short.write_text('too short')
    new = tmp_path / 'new'
    cases: list[tuple[tuple[object, ...], str]] = [
        (('--data', corpus, '--out', out), f'--out: {out} is not empty'),
        (('--data', tmp_path / 'missing', '--out', new), 'is not a file or folder, and matches no file as a glob'),
        (('--data', short, '--out', new), f'{short}: data has 9 bytes'),
        (
            ('--data', corpus, f'{corpus}=2', '--out', new),
            '--data must have a weight above 0 for every source',
        ),
        (('--data', f'{corpus}=-1', '--out', new), '--data: weights must be finite and above 0, got -1.0'),
        (('--data', corpus, '--model', 'dim=7', 'width=3', '--out', new), '--model: '),
        (('--data', corpus, '--model', 'dim=-7', '--out', new), 'dim must be'),
        (('--data', corpus, '--model', 'dim', '--out', new), '--model takes NAME=VALUE, got dim'),
        (('--steps', 3, '--minutes', 1), '--steps and --minutes: give one of them'),
        (('--steps', 0), 'argument --steps: must be from 1 to 1e+12, got 0'),
        (('--ema', 1), 'argument --ema: must be at least 0 and below 1, got 1'),
        (('--data', corpus, '--valid-bytes', 10, '--out', new), '--valid-bytes must be at least 16, got 10'),
        (('--workers', -1), 'argument --workers: must be from 0 to 1024, got -1'),
        (('--split', 'test'), '--split is for --eval, which was not given'),
        (('--eval', out / 'final', '--lr', 1), '--lr is for training, and cannot be given with --eval'),
        (('--eval', out / 'final', '--dry-run'), '--dry-run is for training, and cannot be given with --eval'),
        (('--eval', out / 'final', '--resume', out), '--resume is for training, and cannot be given with --eval'),
        (('--eval', out / 'final', '--seq-len', 256, '--data', corpus), '--seq-len must be at most the 128'),
        (('--data', corpus, '--segment-length', 10**6, '--out', new), 'too few'),
        (('--data', corpus, '--segment-length', 3, '--out', new), 'must be at least the largest stride, 4, got 3'),
        (('--lr', 'fast'), "argument --lr: invalid float value: 'fast'"),
        (('--eval', tmp_path, '--data', corpus), f'error: {tmp_path} is not a saved model'),
        (('--resume', '--out', new, '--data', tmp_path / 'missing'), 'is not a file'),
        (('--data', corpus, '--out', tmp_path / '\udcff', *FEW), 'must have a name in UTF-8'),
    ]
    for args, message in cases:
        assert message in refuse(*args)
    assert (out / 'metrics.csv').read_bytes() == before
    assert not new.exists()


def test_the_sampling_command_refuses_too(
    tmp_path: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    final = trained[0] / 'final'
    for name, damage in (('torn', lambda text: text[:-50]), ('weightless', None), ('garbage', lambda text: b'{')):
        folder = shutil.copytree(final, tmp_path / name)
        file = folder / ('config.json' if name == 'garbage' else 'model.safetensors')
        if damage:
            file.write_bytes(damage(file.read_bytes()))
        else:
            file.unlink()
    for args, message in (
        ((tmp_path,), 'is not a saved model'),
        ((tmp_path / 'torn',), 'is damaged'),
        ((tmp_path / 'weightless',), 'No such file'),
        ((tmp_path / 'garbage',), 'error: '),
        ((final, '--prompt', ''), 'prompt must hold at least one token'),
        ((final, '--temperature', '-1'), 'temperature must be a finite number of at least 0'),
        ((final, '--prompt-file', tmp_path / 'missing'), 'No such file'),
    ):
        with pytest.raises(SystemExit) as end:
            sample.main(list(map(str, args)))
        assert message in str(end.value.code)
    for option, value, message in (
        ('--seed', 10**30, 'must be from -9.22337e+18 to 1.84467e+19, got 1'),
        ('--seed', 'x', "invalid int value: 'x'"),
        ('--length', -3, 'must be from 0 to 1e+12, got -3'),
        ('--length', 10**13, 'must be from 0 to 1e+12, got 1'),
    ):
        with pytest.raises(SystemExit):
            sample.main([str(final), f'{option}={value}'])
        said = capsys.readouterr()
        assert f'argument {option}: {message}' in said.err
        assert said.out == ''
    result = run(tmp_path / 'torn', module='simple_hierarchical_transformer.sample')
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr


def test_readers_of_a_sample_may_leave(trained: tuple[Path, str]) -> None:
    module = 'simple_hierarchical_transformer.sample'
    command = run_command(trained[0] / 'final', '--length', 10**6, module=module)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr
        assert process.stderr.read() == ''
