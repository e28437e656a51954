"""The corpora that a run names: files, several with weights, or those that are known by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..data import corpus as data
from ..data.batches import scale_weights
from ..data.corpus import Corpus

NAMED = (*data.DOWNLOADS, 'stdlib')


def load_source(source: str | None, folder: Path, *, text_key: str, say: Callable[[str], object]) -> Corpus:
    """What was asked for; without a name enwik8, and where that cannot be had, the standard library.

    `folder` is where downloads lie and what is unpacked goes.
    """
    cache = folder / 'cache'
    if source not in (None, *NAMED):
        return data.load_corpus(str(source), data.find_files(str(source)), cache, text_key=text_key)

    if source != 'stdlib':
        name = source or 'enwik8'
        try:
            with tqdm(unit='B', unit_scale=True, desc=f'fetching {name}', delay=1) as bar:
                return data.load_download(name, folder, cache, progress=bar.update)
        except OSError as error:
            if source:
                raise
            say(f'{name} is not in {folder} and cannot be had: {error}')
            say("using the source text of Python's standard library instead (--data takes any other text)")
    return data.load_corpus('stdlib', data.standard_library(), cache)


def load_sources(
    sources: Sequence[str] | None, folder: Path, *, text_key: str, say: Callable[[str], object]
) -> tuple[list[Corpus], list[float] | None]:
    """The corpora, and their weights where they have some: `name=weight`.

    Raises ValueError where some have weights and some not, or where weights are too far apart.
    """
    asked = [split_weight(source) for source in sources or [None]]  # type: ignore[list-item]
    weights = [weight for _, weight in asked if weight is not None]
    if weights:
        if len(weights) < len(asked):
            got = data.shown(' '.join(sources or []))
            raise ValueError(f'--data takes a weight above 0 for every source, or for none, got {got}')
        try:
            scale_weights(weights)
        except ValueError as error:
            raise ValueError(f'--data: {error}') from error
    return [load_source(name, folder, text_key=text_key, say=say) for name, _ in asked], weights or None


def split_weight(source: str | None) -> tuple[str | None, float | None]:
    """A source's name, and its weight if it has one. A file's name may have an equals sign in it."""
    name, equals, weight = (source or '').rpartition('=')
    if equals and not os.path.exists(os.path.expanduser(source or '')):
        with contextlib.suppress(ValueError):
            return name, float(weight)
    return source, None
