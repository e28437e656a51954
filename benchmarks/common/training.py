"""Runs of train.py, each in a process of its own, and the corpus that they read."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from benchmarks.common.machine import ROOT
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import split_bytes
from simple_hierarchical_transformer.data.corpus import Corpus
from simple_hierarchical_transformer.training.sources import load_sources

# the only place that knows how to start a training run
TRAIN = [sys.executable, str(ROOT / 'train.py')]
DATA = ROOT / 'data'
# for options that count steps: a run never gets that far
NEVER = str(10**9)


def load_corpus(source: str, seq_len: int) -> tuple[Corpus, dict[str, range]]:
    """The corpus that `train.py --data` would read, and the bytes of each split of it."""
    [corpus], _ = load_sources([source], DATA, text_key='text', say=print)
    return corpus, split_bytes(len(corpus), seq_len=seq_len)


def train_command(preset: str, data: str, out: Path, *options: str) -> list[str]:
    """The command of a run that writes its metrics and its final model to `out`, and no other checkpoint."""
    return [*TRAIN, '--preset', preset, '--data', data, '--checkpoint-every', NEVER, '--out', str(out), *options]


def read_metrics(out: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(out / 'metrics.csv', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def load_final(out: Path) -> HierarchicalTransformer:
    """The final model of a run."""
    return HierarchicalTransformer.from_pretrained(out / 'final')


def model_options(settings: dict[str, object]) -> list[str]:
    """Arguments of the model as options of train.py."""
    return ['--model', *(f'{name}={value!r}' for name, value in settings.items())]
