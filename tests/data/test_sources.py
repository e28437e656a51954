"""The corpora that a run names on the command line, and their weights."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
from corpora import TEXT, text_of, tree

from simple_hierarchical_transformer.data import find_files
from simple_hierarchical_transformer.training import sources


def test_no_name_is_not_this_folder() -> None:
    for source in ('', '=2'):
        with pytest.raises(ValueError, match="a source must be a file, a folder or a glob, got ''"):
            sources.load_sources([source], Path('nowhere'), text_key='text', say=print)
    # There is no user of this name.
    with pytest.raises(ValueError, match='is not a file or folder'):
        find_files('~nobody-of-this-name/a')


def test_names_that_are_no_text_can_be_shown(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.txt')
    try:
        Path(path).write_bytes(TEXT)
    except OSError:
        # Some file systems refuse such names.
        return
    [corpus], _ = sources.load_sources([path], tmp_path / 'data', text_key='text', say=print)
    assert corpus.name.encode() == os.fsencode(tmp_path) + rb'/caf\xe9.txt'
    assert text_of(corpus) == TEXT
    assert text_of(pickle.loads(pickle.dumps(corpus))) == TEXT
    Path(path).write_bytes(b'')
    with pytest.raises(ValueError, match=re.escape(r'caf\xe9.txt hold no byte')) as error:
        sources.load_sources([path], tmp_path / 'data', text_key='text', say=print)
    str(error.value).encode()
    (tmp_path / 'rows').mkdir()
    Path(path).rename(tmp_path / 'rows' / Path(path).with_suffix('.jsonl').name)
    [rows] = (tmp_path / 'rows').iterdir()
    rows.write_text('[')
    for source in (str(rows), str(rows) + 'x'):
        with pytest.raises(ValueError, match=re.escape(r'caf\xe9.jsonl')) as error:
            sources.load_sources([source], tmp_path / 'data', text_key='text', say=print)
        str(error.value).encode()


@pytest.mark.parametrize(
    'weights', [('1e308', '1e-308'), ('1', '1e-9'), ('inf', '1'), ('0', '1'), ('-1', '2'), ('nan', '1'), ('nan', 'nan')]
)
def test_weights_that_leave_a_corpus_out_are_refused(tmp_path: Path, weights: tuple[str, str]) -> None:
    tree(tmp_path, a='a', b='b')
    asked = [f'{tmp_path / name}={weight}' for name, weight in zip('ab', weights, strict=True)]
    with pytest.raises(ValueError, match='--data: weights must'):
        sources.load_sources(asked, tmp_path / 'data', text_key='text', say=print)
    for mixed in ([asked[0], str(tmp_path / 'b')], [str(tmp_path / 'a'), asked[1]]):
        with pytest.raises(ValueError, match='--data must have a weight above 0 for every source, or for none'):
            sources.load_sources(mixed, tmp_path / 'data', text_key='text', say=print)
