"""What a run writes and shows while it trains."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT
from support.runs import FEW, validated

from simple_hierarchical_transformer.training import run as run_module


def test_short_runs_have_a_curve(
    corpus: Path,
    tmp_path: Path,
    train_here: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, 'sample_text', lambda *args: 'text')
    out = tmp_path / 'run'
    train_here('--data', corpus, '--out', out, *FEW, '--steps', 30, '--log-every', 2)
    with (out / 'metrics.csv').open(encoding='utf-8') as file:
        rows = {int(row['step']): row for row in csv.DictReader(file)}
    assert [step for step in rows if rows[step]['valid_bits_per_byte']] == list(range(0, 31, 3))
    trained = [step for step in rows if rows[step]['train_bits_per_byte']]
    assert trained == sorted({*range(2, 31, 2), *range(3, 31, 3)})
    assert all(1 < float(rows[step]['train_bits_per_byte']) < 16 for step in trained)
    # a log file shows the bar once, at the end
    assert capsys.readouterr().err.count(' bytes/s, ') == 1


def test_runs_in_minutes_have_a_curve_too(
    corpus: Path, tmp_path: Path, train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves on by a tick whenever it is read."""
    ticks = itertools.count()
    seconds = 0.0
    whole = run_module.Run.validate

    def validate(run: Any) -> None:
        nonlocal seconds
        whole(run)
        seconds += slow

    clock = types.SimpleNamespace(**{**vars(time), 'monotonic': lambda: 0.05 * next(ticks) + seconds})
    monkeypatch.setattr(run_module, 'time', clock)
    monkeypatch.setattr(run_module, 'sample_text', lambda *args: 'text')
    monkeypatch.setattr(run_module.Run, 'validate', validate)
    # a step takes two ticks: 30 steps if scoring takes no time
    slow = 0.0
    train_here('--data', corpus, '--out', tmp_path / 'quick', *FEW, '--minutes', 0.05)
    assert len(validated(tmp_path / 'quick')) >= 11
    # slow scoring must not take all of the run
    slow = 1.0
    train_here('--data', corpus, '--out', tmp_path / 'slow', *FEW, '--minutes', 0.05)
    rows = validated(tmp_path / 'slow')
    assert len(rows) in (3, 4)
    assert int(rows[-1]['step']) > 10


def test_what_is_scored_is_what_the_run_read(
    corpus: Path,
    tmp_path: Path,
    train_here: Callable[..., None],
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, out = tmp_path / 'text.txt', tmp_path / 'run'
    text.write_text(corpus.read_text()[:9000])
    load = run_module.load_sources
    # stands in for the default corpus, which would be downloaded
    monkeypatch.setattr(
        run_module, 'load_sources', lambda data, *args, **kwargs: load(data or [str(text)], *args, **kwargs)
    )
    train_here('--out', out, *FEW, '--steps', 2)
    monkeypatch.setattr(run_module, 'load_sources', load)
    assert f'| data | `["{text}"]` |' in (out / 'report.md').read_text(encoding='utf-8')
    assert '`null`' not in (out / 'report.md').read_text(encoding='utf-8')

    capsys.readouterr()
    train_here('--eval', out / 'final', '--batch-size', 5)
    shown = capsys.readouterr()
    assert f'the data of the run: {text}\n' in shown.out
    assert f'over 450 bytes of {text}, in windows of 32' in shown.out
    # 15 windows in batches of five
    assert '3/3' in shown.err
    for model in (out / 'checkpoint-2', out / 'final'):
        train_here('--eval', model, '--data', text)
        assert 'the data of the run' not in capsys.readouterr().out
        train_here('--eval', model)
        assert f'the data of the run: {text}\n' in capsys.readouterr().out

    text.write_text(corpus.read_text()[1:9001])
    assert f'error: the data of the run, {text}, has changed since. Give --data' in refuse('--eval', out / 'final')
    text.unlink()
    assert f'error: the data of the run, {text}, cannot be loaded: ' in refuse('--eval', out / 'final')


@pytest.mark.parametrize('fails', ['say', 'sample_text'])
def test_a_checkpoint_is_written_before_anything_is_shown(
    corpus: Path, tmp_path: Path, train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*args: Any) -> str:
        if fails == 'say' and not str(args[0]).startswith('step 2'):
            return ''
        raise RuntimeError('cannot be shown')

    monkeypatch.setattr(run_module, fails, fail)
    command = ('--data', corpus, '--out', tmp_path / 'run', *FEW, '--steps', 2)
    if fails == 'say':
        with pytest.raises(RuntimeError, match='cannot be shown'):
            train_here(*command)
    else:
        # a sample that fails does not end the run
        train_here(*command)
        assert 'no sample: cannot be shown' in (tmp_path / 'run' / 'report.md').read_text(encoding='utf-8')
    assert (tmp_path / 'run' / 'checkpoint-2' / 'training.json').exists()


BOTH = """
import sys
import train
from simple_hierarchical_transformer import sample
train.main(sys.argv[1:])
out = sys.argv[sys.argv.index('--out') + 1]
train.main(['--resume', out, '--steps', '4'])
train.main(['--eval', out + '/final'])
sample.main([out + '/final', '--prompt', 'a \\u65e5 \\xe9', '--length', '3'])
"""


@pytest.mark.parametrize(
    ('env', 'says'),
    [(dict(PYTHONIOENCODING='cp1252'), b'a \\u65e5 \xe9'), (dict(LC_ALL='C', PYTHONUTF8='0'), b'a \\u65e5 \\xe9')],
)
def test_terminals_that_do_not_know_a_character_are_told_of_it(
    tmp_path: Path, env: dict[str, str], says: bytes
) -> None:
    name = 'caf\u00e9 \u65e5.txt'
    for file in (name.encode(), b'broken \xff.txt'):
        Path(os.fsdecode(bytes(tmp_path) + b'/' + file)).write_bytes('\u65e5\u672c \u2026 '.encode() * 300)
    args = (bytes(tmp_path) + b'/' + name.encode(), bytes(tmp_path) + b'/broken \xff.txt', b'--out')
    args += (bytes(tmp_path) + b'/r\xc3\xbcn', *(str(each).encode() for each in (*FEW, '--steps', 2)))
    script = BOTH.replace("'a \\u65e5 \\xe9'", "__import__('os').fsdecode('a \\u65e5 \\xe9'.encode())")
    result = subprocess.run(
        [sys.executable, '-c', script, b'--data', *args], capture_output=True, timeout=300, cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **env},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode(errors='replace')
    assert says in result.stdout
    out = tmp_path / 'r\u00fcn'
    report = (out / 'report.md').read_text(encoding='utf-8')
    assert name in report
    assert 'broken \\xff.txt' in report
    assert '\u65e5\u672c' in report
    columns = (out / 'metrics.csv').read_text(encoding='utf-8').splitlines()[0]
    assert f'{name}_bits_per_byte' in columns
    assert 'broken \\xff.txt_bits_per_byte' in columns
    assert 'broken \\xff.txt' in (out / 'final' / 'README.md').read_text(encoding='utf-8')
