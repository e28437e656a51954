"""A run that tests stop and resume."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from simple_hierarchical_transformer.training import checkpoints
from support.commands import ROOT, run, run_command

# all that the result of a step depends on: states of segments, sampled losses, averages, two optimizers, shared weights
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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(folder: Path, *drop: str, **changes: Any) -> None:
    record = {**json.loads((folder / 'training.json').read_text()), **changes}
    kept = {key: value for key, value in record.items() if key not in drop}
    (folder / 'training.json').write_text(json.dumps(kept))


PLAIN: tuple[object, ...] = (
    '--preset', 'cpu', '--steps', 12, '--every', 4, '--log-every', 4, '--checkpoint-every', 4, '--valid-bytes', 1024,
    '--seq-len', 32, '--batch-size', 1, '--model', 'dim=16', 'depth=1', 'heads=1',
)  # fmt: skip


def train_whole(corpus: Path, out: Path) -> Path:
    """Trains a run to its end."""
    result = run('--data', corpus, '--out', out, *SETTINGS)
    assert result.returncode == 0, result.stderr
    return out


def copy_half(whole: Path, out: Path) -> Path:
    """Copies a run as it was after step 15."""
    out.mkdir()
    for name in ('checkpoint-10', 'checkpoint-15'):
        shutil.copytree(whole / name, out / name)
    shutil.copy(whole / 'metrics.csv', out)
    return out
