"""The training script and the sampling command as a user runs them."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simple_hierarchical_transformer import HierarchicalTransformer

ROOT = Path(__file__).parent.parent


def command(*args: object, module: str | None = None) -> list[str]:
    return [sys.executable, *(('-m', module) if module else (str(ROOT / 'train.py'),)), *map(str, args)]


def run(*args: object, module: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args, module=module),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, **env},
    )


@pytest.fixture(scope='module')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a small grammar: well below a bit per byte once learnt, four and more before."""
    draw = random.Random(0)
    words = [('the', 'a'), ('old', 'young', 'wise'), ('king', 'queen', 'fox'), ('sees', 'hears'), ('us', 'you')]
    path = tmp_path_factory.mktemp('corpus') / 'text.txt'
    path.write_text(' '.join(' '.join(map(draw.choice, words)) + '.' for _ in range(4000)))
    return path


@pytest.fixture(scope='module')
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp('runs') / 'run'
    settings = ('--seq-len', 128, '--batch-size', 2, '--steps', 60, '--checkpoint-every', 25)
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
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ['checkpoint-25', 'checkpoint-50', 'final']
    assert f'{last:.3f} bits per byte' in said


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
    assert re.search(r'20 bytes, \d+ a second', sampled[0].stderr)


def test_samples_from_a_file_and_shows_broken_bytes(trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / 'prompt').write_bytes(b'caf\xc3\xa9 \xff ')
    module = 'simple_hierarchical_transformer.sample'
    result = run(trained[0] / 'final', '--prompt-file', tmp_path / 'prompt', '--length', 3, module=module)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('caf\u00e9 \\xff ')


def test_ctrl_c_ends_sampling_cleanly(trained: tuple[Path, str]) -> None:
    endless = command(trained[0] / 'final', '--length', 10**6, module='simple_hierarchical_transformer.sample')
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert len(process.stdout.read(30)) == 30
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r'\d+ bytes, \d+ a second', errors)
    assert 'Traceback' not in errors


def test_the_config_is_json_without_surprises(trained: tuple[Path, str]) -> None:
    config = json.loads((trained[0] / 'final' / 'config.json').read_text())
    assert config['seq_len'] == 128
    assert config['ignore_index'] == -1


def test_refuses_before_work_is_lost(trained: tuple[Path, str], corpus: Path, tmp_path: Path) -> None:
    out, _ = trained
    before = (out / 'metrics.csv').read_bytes()
    short = tmp_path / 'short.txt'
    short.write_text('too short')
    new = tmp_path / 'new'
    cases = [
        (('--data', corpus, '--out', out), f'--out: {out} is not empty'),
        (('--data', tmp_path / 'missing', '--out', new), 'is no file, no folder, and matches none as a glob'),
        (('--data', short, '--out', new), 'data has 9 bytes'),
        (('--steps', 3, '--minutes', 1), '--steps and --minutes: give one of them'),
        (('--steps', 0), 'argument --steps: must be above 0, got 0'),
        (('--split', 'test'), '--split is for --eval, which was not given'),
        (('--eval', out / 'final', '--lr', 1), '--lr is for training, --eval does none'),
        (('--eval', out / 'final', '--seq-len', 256, '--data', corpus), '--seq-len must be at most the 128'),
        (('--data', corpus, '--segment-length', 10**6, '--out', new), 'too few'),
        (('--lr', 'fast'), "argument --lr: invalid float value: 'fast'"),
        (('--eval', tmp_path, '--data', corpus), f'--eval: {tmp_path} is no saved model'),
    ]
    for args, message in cases:
        result = run(*args)
        assert result.returncode != 0
        assert message in result.stderr
        assert 'Traceback' not in result.stderr
    assert (out / 'metrics.csv').read_bytes() == before
    assert not new.exists()


def test_the_sampling_command_refuses_too(tmp_path: Path, trained: tuple[Path, str]) -> None:
    final = trained[0] / 'final'
    for name, damage in (('torn', lambda text: text[:-50]), ('weightless', None), ('garbage', lambda text: b'{')):
        folder = shutil.copytree(final, tmp_path / name)
        file = folder / ('config.json' if name == 'garbage' else 'model.safetensors')
        if damage:
            file.write_bytes(damage(file.read_bytes()))
        else:
            file.unlink()
    for args, message in (
        ((tmp_path,), 'is no saved model'),
        ((tmp_path / 'torn',), 'is torn'),
        ((tmp_path / 'weightless',), 'No such file'),
        ((tmp_path / 'garbage',), 'error: '),
        ((final, '--prompt', ''), 'prompt must hold at least one token'),
        ((final, '--temperature', '-1'), 'temperature must be a finite number of at least 0'),
        ((final, '--prompt-file', tmp_path / 'missing'), 'No such file'),
    ):
        result = run(*args, module='simple_hierarchical_transformer.sample')
        assert result.returncode != 0
        assert message in result.stderr
        assert 'Traceback' not in result.stderr


def test_trains_on_segments_that_remember(corpus: Path, tmp_path: Path) -> None:
    settings = ('--seq-len', 64, '--segment-length', 16, '--batch-size', 2, '--steps', 40, '--grad-accum', 2)
    result = run('--preset', 'cpu', '--data', corpus, '--out', tmp_path / 'run', *settings)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / 'run' / 'metrics.csv').open()))
    assert float(rows[-1]['valid_streaming_bits_per_byte']) < 0.7 * float(rows[0]['valid_streaming_bits_per_byte'])
    assert int(rows[-1]['bytes']) == 40 * 2 * 2 * 16


def test_a_run_counted_in_minutes_ends_by_itself(corpus: Path, tmp_path: Path) -> None:
    result = run('--preset', 'cpu', '--data', corpus, '--out', tmp_path / 'run', '--minutes', 0.05, '--seq-len', 64)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'run' / 'final' / 'model.safetensors').exists()


def test_an_interrupted_run_keeps_what_it_has(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / 'run'
    args = command('--preset', 'cpu', '--data', corpus, '--out', out, '--steps', 10**5, '--seq-len', 64)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        while not (out / 'metrics.csv').exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (saved,) = out.glob('interrupted-*')
    assert HierarchicalTransformer.from_pretrained(saved).seq_len == 64
    assert 'Traceback' not in said


def test_two_processes_train_one_model(corpus: Path, tmp_path: Path) -> None:
    settings = ('--seq-len', 64, '--batch-size', 1, '--steps', 5)
    launch = ('--nproc_per_node', 2, ROOT / 'train.py', '--preset', 'cpu', '--data', corpus, *settings)
    threads = dict(OMP_NUM_THREADS='1')

    result = run(*launch, '--out', tmp_path / 'a', module='torch.distributed.run', ACCELERATE_USE_CPU='true', **threads)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / 'a' / 'metrics.csv').open()))
    assert [int(row['step']) for row in rows] == [0, 5]
    assert int(rows[-1]['bytes']) == 5 * 2 * 64

    result = run(*launch, '--out', tmp_path / 'b', module='torch.distributed.run', **threads)
    assert result.returncode != 0
    assert '2 processes were launched and 1 found each other' in result.stderr
    assert not (tmp_path / 'b').exists()


def test_without_a_network_the_standard_library_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    train = importlib.import_module('train')
    monkeypatch.setattr(train, 'DATA_DIR', tmp_path)
    monkeypatch.setattr(train.corpora, 'ENWIK8', dataclasses.replace(train.corpora.ENWIK8, url='http://127.0.0.1:9/'))

    name, data = train.load_corpus(None)
    assert name == 'stdlib'
    assert len(data) > 5_000_000
    said = capsys.readouterr().out
    assert f'enwik8 is not in {tmp_path} and cannot be had' in said
    assert "using the source text of Python's standard library instead" in said

    with pytest.raises(OSError, match='could not be fetched'):
        train.load_corpus('enwik8')
    (tmp_path / 'enwik8').write_bytes(b'half of it')
    with pytest.raises(ValueError, match='enwik8 has 100,000,000, so it is torn'):
        train.load_corpus(None)
