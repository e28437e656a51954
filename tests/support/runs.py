"""Short runs of train.py."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

MODEL: dict[str, Any] = dict(
    dim=32, depth=1, heads=2, hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=8, ngram_rows=64
)


TINY: tuple[object, ...] = (
    '--preset', 'cpu', '--seq-len', 32, '--batch-size', 2, '--valid-bytes', 1024, '--every', 10**6,
    '--model', *(f'{name}={value}' for name, value in MODEL.items()),
)  # fmt: skip


FEW: tuple[object, ...] = (
    '--preset', 'cpu', '--seq-len', 32, '--batch-size', 1, '--valid-bytes', 512, '--model', 'dim=16', 'depth=1',
    'heads=1', 'ngrams=()', 'word_ngrams=()', 'recall=()', 'word_recall=()',
)  # fmt: skip


# one level, which compiles fastest
FLAT: tuple[object, ...] = (
    *TINY, 'ff_mult=4', 'hierarchies=1', 'hierarchical_stride=1', 'window_sizes=None',
    # a compiled step draws other random numbers
    'ngram_dropout=0', '--steps', 20, '--optimizer', 'muon', '--lr', 0.02,
)  # fmt: skip


def scores_of(out: Path) -> list[float]:
    return [float(row['valid_bits_per_byte']) for row in validated(out)]


def validated(out: Path) -> list[dict[str, str]]:
    """The rows of metrics with a score of the validation split."""
    with (out / 'metrics.csv').open(encoding='utf-8') as file:
        return [row for row in csv.DictReader(file) if row['valid_bits_per_byte']]
