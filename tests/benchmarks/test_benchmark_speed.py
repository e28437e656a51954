"""The benchmarks of speed run at toy size, and every script of the benchmarks prints its help."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPTS = [
    path
    for folder in ('quality', 'speed', 'gpu')
    for path in sorted((ROOT / 'benchmarks' / folder).glob('*.py'))
    if 'sys.path[0] = ' in path.read_text(encoding='utf-8')
]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_each_script_prints_its_help(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, 'path', [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, 'argv', [str(script), '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name='__main__')
    assert end.value.code == 0
    assert f'benchmarks/{script.parent.name}/{script.name}' in capsys.readouterr().out


def test_a_script_finds_this_checkout_without_an_installed_package(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    command = [sys.executable, str(ROOT / 'benchmarks' / 'speed' / 'plan.py')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert '| gpu preset |' in done.stdout


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f'benchmarks.speed.{name}')


def test_kernels_of_products_are_compared(speed: Any, tmp_path: Path) -> None:
    speed('linear').main(['--toy', '--out', str(tmp_path)])
    text = (tmp_path / 'linear.md').read_text()
    assert '| 1 x 16 to 32 |' in text
    assert '| 16 to 32 |' in text


def test_training_steps_of_two_packages_are_compared(
    speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = speed('train_step')
    # two of seven models
    monkeypatch.setattr(train_step, 'CONFIGS', dict(list(train_step.CONFIGS.items())[:2]))
    # this package stands in for the published one
    train_step.main(['--toy', '--rounds', '1', '--published', sys.executable, '--out', str(tmp_path)])
    text = (tmp_path / 'train_step.md').read_text()
    assert text.count('x** |') == 2 + 2
    assert '| `THP_MEM_ALLOC_ENABLE=1` |' in text
    assert (tmp_path / 'train_step.png').stat().st_size > 1000


def test_generation_of_two_packages_is_compared(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = speed('generate')
    monkeypatch.setattr(generate, 'bandwidth', lambda: 1e9)
    monkeypatch.setattr(generate, 'PUBLISHED', dict(list(generate.PUBLISHED.items())[:1]))
    generate.main(['--toy', '--rounds', '1', '--published', sys.executable, '--out', str(tmp_path)])
    text = (tmp_path / 'generate.md').read_text()
    assert text.count('| README example 1 |') == 2
    assert 'Windows only' in text
