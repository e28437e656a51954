"""Several processes train a model with placed levels as one does."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from support.commands import ROOT, run

SETTINGS: tuple[object, ...] = (
    '--preset', 'cpu', '--steps', 8, '--every', 8, '--valid-bytes', 512, '--seq-len', 32,
    '--batch-size', 2, '--optimizer', 'adamw', '--lr', 3e-3, '--table-lr', 3e-3, '--model', 'dim=16', 'depth=2',
    'heads=1', 'ngram_rows=64', 'ngram_dropout=0', 'window_sizes=8', 'ff_mult=2', 'hierarchies=(1,4,8)',
    'hierarchical_stride=1',
)  # fmt: skip


def trained(corpus: Path, folder: Path, *more: object) -> list[dict[str, torch.Tensor]]:
    """The weights after the same run in one process and in two, whose rows have different numbers of tokens."""
    settings = ('--data', corpus, *SETTINGS, *more)
    result = run('--out', folder / 'one', *settings, '--grad-accum', 2)
    assert result.returncode == 0, result.stderr
    two = ('--nproc_per_node', 2, ROOT / 'train.py', '--out', folder / 'two', *settings)
    result = run(*two, module='torch.distributed.run', ACCELERATE_USE_CPU='true')
    assert result.returncode == 0, result.stderr
    return [load_file(folder / name / 'final' / 'model.safetensors') for name in ('one', 'two')]


def test_two_processes_equal_one(corpus: Path, tmp_path: Path) -> None:
    """A segment of a process may have no token of a level, and its weights a gradient of zeros."""
    one, two = trained(corpus, tmp_path, "boundaries=(None,'words','learned')", '--segment-length', 16)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=lambda said, key=key: f'{key}: {said}')


def test_processes_share_the_threshold_of_surprise(corpus: Path, tmp_path: Path) -> None:
    """One process moves it after each batch of a step, and two after both."""
    one, two = trained(corpus, tmp_path, "boundaries=(None,'surprise','rise')")
    for key in ('boundaries.1.threshold', 'boundaries.2.threshold'):
        assert one[key].isfinite()
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0.05)
