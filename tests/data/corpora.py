"""Small corpora for the tests of data, and their bytes."""

from __future__ import annotations

from pathlib import Path

import torch

from simple_hierarchical_transformer.data import Corpus, load_corpus

TEXT = bytes(range(256)) * 40


def text_of(corpus: Corpus) -> bytes:
    [ids] = corpus.read(torch.tensor([0]), torch.tensor([len(corpus)]), len(corpus), pad=0)
    return bytes(ids.tolist())


def load(*files: Path, cache: Path) -> Corpus:
    return load_corpus('corpus', list(files), cache)


def tree(folder: Path, **files: str) -> Path:
    """A folder with files; an underscore in a name stands for a slash."""
    for name, text in files.items():
        path = folder / name.replace('_', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
