"""The training script and the sampling command as a user runs them."""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*args: object, module: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(('-m', module) if module else (str(ROOT / 'train.py'),)), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


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


def test_says_how_to_score_and_how_to_sample(trained: tuple[Path, str], corpus: Path) -> None:
    out, said = trained
    commands = re.findall(r'python (train\.py|-m simple_hierarchical_transformer\.sample) (.+)', said)
    assert len(commands) == 2

    scored = run('--eval', out / 'final', '--data', corpus, '--split', 'test')
    assert scored.returncode == 0, scored.stderr
    score = float(re.search(r'test: ([\d.]+) bits per byte', scored.stdout)[1])
    assert score < 4

    sampled = [
        run(out / 'final', '--prompt', 'the old ', '--length', 20, '--seed', 1, module=commands[1][0][len('-m ') :])
        for _ in range(2)
    ]
    assert sampled[0].returncode == 0, sampled[0].stderr
    assert sampled[0].stdout.startswith('the old ')
    assert len(sampled[0].stdout) > len('the old ')
    assert sampled[0].stdout == sampled[1].stdout


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
        (('--data', corpus, '--out', out), f'--out: {out} already holds a run'),
        (('--data', tmp_path / 'missing', '--out', new), 'is no file, no folder, and matches none as a glob'),
        (('--data', short, '--out', new), 'data has 9 bytes'),
        (('--steps', 3, '--minutes', 1), '--steps and --minutes: give one of them'),
        (('--steps', 0), 'argument --steps: must be above 0, got 0'),
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
    for args, message in (
        ((tmp_path,), 'is no saved model'),
        ((trained[0] / 'final', '--prompt', ''), 'prompt must hold at least one token'),
        ((trained[0] / 'final', '--temperature', '-1'), 'temperature must be a finite number of at least 0'),
    ):
        result = run(*args, module='simple_hierarchical_transformer.sample')
        assert result.returncode != 0
        assert message in result.stderr
        assert 'Traceback' not in result.stderr
