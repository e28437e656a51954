"""Data sources of a run: files, folders and globs, or the names of known corpora."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..data.batches import scale_weights
from ..data.corpus import Corpus, load_corpus
from ..data.download import DOWNLOADS, load_download
from ..data.files import find_files, standard_library
from ..data.formats import display_name

NAMED = (*DOWNLOADS, 'stdlib')


def load_source(source: str | None, folder: Path, *, text_key: str, say: Callable[[str], object]) -> Corpus:
    """Loads the corpus that `source` names.

    Args:
        source: a name of `NAMED`, or a file, folder or glob. None stands for enwik8, or for the standard library if
            enwik8 cannot be downloaded.
        folder: the folder for downloads. Its subfolder `cache` holds unpacked corpora.
        text_key: the column of a table that holds the text.
        say: receives messages for the user.
    """
    cache = folder / 'cache'
    if source is not None and source not in NAMED:
        return load_corpus(source, find_files(source), cache, text_key=text_key)

    if source != 'stdlib':
        name = source or 'enwik8'
        try:
            with tqdm(unit='B', unit_scale=True, desc=f'fetching {name}', delay=1) as bar:
                return load_download(name, folder, cache, progress=bar.update)
        except OSError as error:
            if source:
                raise
            say(f'{name} is not in {folder} and cannot be downloaded: {error}')
            say("using the source text of Python's standard library instead (give --data to use another text)")
    return load_corpus('stdlib', standard_library(), cache)


def load_sources(
    sources: Sequence[str] | None, folder: Path, *, text_key: str, say: Callable[[str], object]
) -> tuple[list[Corpus], list[float] | None]:
    """Loads the corpora that the user named, with their weights.

    Args:
        sources: a name for each corpus, see `load_source`, or `name=weight`. None stands for the default corpus.
        folder: see `load_source`.
        text_key: see `load_source`.
        say: see `load_source`.

    Returns:
        The corpora, and their weights if they have any.

    Raises:
        ValueError: some sources have weights and others do not, or the weights are too different.
    """
    named = [split_weight(source) for source in sources] if sources else [(None, None)]
    weights = [weight for _, weight in named if weight is not None]
    if weights:
        if len(weights) < len(named):
            got = display_name(' '.join(sources or []))
            raise ValueError(f'--data must have a weight above 0 for every source, or for none, got {got}')
        try:
            scale_weights(weights)
        except ValueError as error:
            raise ValueError(f'--data: {error}') from error
    return [load_source(name, folder, text_key=text_key, say=say) for name, _ in named], weights or None


def split_weight(source: str) -> tuple[str | None, float | None]:
    """Splits a source into its name and its weight. The weight is None if there is none. File names may contain '='."""
    name, equals, weight = source.rpartition('=')
    if equals and not os.path.exists(os.path.expanduser(source)):
        with contextlib.suppress(ValueError):
            return name, float(weight)
    return source, None
