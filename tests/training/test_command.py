"""The command of a user who installed the package: train, plan, eval, sample."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT
from support.runs import FEW

from simple_hierarchical_transformer import __main__ as command
from simple_hierarchical_transformer.training import run as run_module
from simple_hierarchical_transformer.training.progress import Workspace
from simple_hierarchical_transformer.training.settings import parse_args, parse_eval_args

MODULE = 'python -m simple_hierarchical_transformer'


def run_in(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs the package in a folder of the user, where train.py is not."""
    return subprocess.run(
        [sys.executable, '-m', 'simple_hierarchical_transformer', *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )


def test_a_user_plans_trains_scores_and_samples(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # two of the commands run in this process, which is faster
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['__main__.py'])
    (tmp_path / 'text.txt').write_text(corpus.read_text()[:20_000])
    settings = ('--data', 'text.txt', *FEW, '--steps', 2)
    command.main(['plan', *map(str, settings)])
    assert 'the run: 2 steps' in capsys.readouterr().out
    assert not (tmp_path / 'runs').exists()

    trained = run_in(tmp_path, 'train', *settings)
    assert trained.returncode == 0, trained.stderr
    [out] = (tmp_path / 'runs').iterdir()
    final = Path('runs') / out.name / 'final'
    assert (tmp_path / final / 'config.json').is_file()
    # the commands that it prints are those of this user, and work
    commands = [shlex.split(line) for line in re.findall(rf'{MODULE} (.+)', trained.stdout)]
    assert [(each[0], each[1]) for each in commands] == [('eval', str(final)), ('sample', str(final))]
    assert f'{MODULE} train --resume runs/{out.name} --steps 4' in (out / 'report.md').read_text()
    scored = run_in(tmp_path, *commands[0], '--split', 'test')
    assert scored.returncode == 0, scored.stderr
    assert re.search(r'test: [\d.]+ bits per byte over', scored.stdout)
    sampled = run_in(tmp_path, *commands[1], '--length', 3)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith('The ')

    command.main(['train', '--resume', '--steps', '3'])
    assert (out / 'checkpoint-3').is_dir()


@pytest.mark.parametrize('program', ['/usr/bin/simple-hierarchical-transformer', '/lib/package/__main__.py'])
def test_each_command_takes_the_flags_of_train_py(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, Workspace]] = []
    monkeypatch.setattr(run_module, 'execute', lambda args, workspace: called.append((args, workspace)))
    monkeypatch.setattr(sys, 'argv', [program])
    flags = ['--seq-len', '64', '--batch-size', '2', '--data', 'a.txt']
    command.main(['train', *flags, '--lr', '0.1'])
    command.main(['plan', *flags])
    command.main(['eval', 'runs/x/final', '--split', 'test', *flags])
    name = MODULE if 'main' in program else 'simple-hierarchical-transformer'
    workspace = Workspace(Path(), f'{name} train', f'{name} eval', f'{name} sample')
    assert {each for _, each in called} == {workspace}
    assert vars(called[0][0]) == vars(parse_args([*flags, '--lr', '0.1'], None))
    assert vars(called[1][0]) == vars(parse_args([*flags, '--dry-run'], None))
    asked = vars(parse_args(['--eval', 'runs/x/final', '--split', 'test', *flags], None))
    assert vars(called[2][0]) == {key: value for key, value in asked.items() if value is not None} | {'text_key': None}
    assert vars(called[2][0]) == vars(parse_eval_args(['runs/x/final', '--split', 'test', *flags], '', ''))
    assert (workspace.data, workspace.runs) == (Path('data'), Path('runs'))


@pytest.mark.parametrize(
    ('args', 'code', 'message'),
    [
        ([], 2, 'the following arguments are required: COMMAND'),
        (['bogus'], 2, "invalid choice: 'bogus' (choose from"),
        (['-h'], 0, 'sample  continue a text with a saved model'),
        (['train', '-h'], 0, f'usage: {MODULE} train'),
        (['eval', '-h'], 0, 'folder of the saved model to score'),
        (['sample', '-h'], 0, f'usage: {MODULE} sample'),
        (['eval', 'x', '--lr', '1'], 2, 'unrecognized arguments: --lr 1'),
        (['eval'], 2, 'the following arguments are required: CHECKPOINT'),
        (['plan', '--eval', 'x'], 2, 'unrecognized arguments: --eval x'),
        (['eval', 'missing'], 'error: missing is not a saved model', ''),
    ],
)
def test_help_and_errors_name_the_command(
    args: list[str],
    code: int | str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, 'argv', ['__main__.py'])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command.main(args)
    assert str(end.value.code).startswith(str(code))
    said = capsys.readouterr()
    assert message in said.out + said.err


def test_the_package_installs_the_command() -> None:
    assert 'simple-hierarchical-transformer=simple_hierarchical_transformer.__main__:main' in (
        ROOT / 'setup.py'
    ).read_text(encoding='utf-8')
