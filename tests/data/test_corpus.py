"""A corpus reads the bytes of its files, in every process, and reports a file that is truncated."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from corpora import TEXT, load, text_of
from support.commands import ROOT
from torch.utils.data import DataLoader

from simple_hierarchical_transformer.data import Batches, Corpus, find_files


@pytest.mark.parametrize('suffix', ['', '.gz', '.bz2', '.xz', '.zip', '.GZ'])
def test_reads_plain_and_packed_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'text{suffix}'
    if suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('b', TEXT[100:])
            archive.writestr('a', TEXT[:100])
    else:
        pack = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}[suffix.lower()]
        path.write_bytes(pack(TEXT))

    for _ in range(2):
        assert text_of(load(*find_files(path), cache=tmp_path / 'cache')) == TEXT
    assert (tmp_path / 'cache').exists() == bool(suffix)


def test_slices_of_a_corpus_are_its_bytes(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(TEXT)
    corpus = load(tmp_path / 'a', cache=tmp_path)
    for span in (slice(None), slice(3, 7), slice(-5, None), slice(7, 3), slice(9, 10**9), slice(None, None, 3)):
        assert corpus[span].dtype == torch.uint8
        assert bytes(corpus[span].tolist()) == TEXT[span]


def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """In a subprocess, since the system would end it if the file were mapped."""
    path = tmp_path / 'text'
    path.write_bytes(bytes(1 << 20))
    code = f"""
        import os, torch
        from pathlib import Path
        from simple_hierarchical_transformer.data.corpus import Corpus
        from simple_hierarchical_transformer.data.batches import Batches
        corpus = Corpus('text', Path({str(path)!r}))
        batches = Batches([corpus], [range(len(corpus))], rows=4, seq_len=64)
        batches[0]
        os.truncate({str(path)!r}, 100)
        try:
            batches[0]
        except ValueError as error:
            print(error)
        """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f'data: {path} was truncated while it was read: it had 1,048,576 bytes, and has 100\n'


@pytest.mark.parametrize('workers', [0, 1])
def test_a_worker_says_in_one_line_that_a_file_is_truncated(tmp_path: Path, workers: int) -> None:
    path = tmp_path / 'text'
    path.write_bytes(TEXT)
    batches = Batches([load(path, cache=tmp_path)], [range(len(TEXT))], rows=2, seq_len=64)
    path.write_bytes(b'')
    loader = DataLoader(
        batches, None, sampler=range(2), num_workers=workers, multiprocessing_context='fork' if workers else None
    )
    with pytest.raises(ValueError, match='truncated') as error:
        next(iter(loader))
    assert str(error.value) == f'data: {path} was truncated while it was read: it had 10,240 bytes, and has 0'


def test_without_pread_reading_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a').write_bytes(TEXT)
    corpus = load(tmp_path / 'a', cache=tmp_path)
    monkeypatch.delattr(os, 'pread')
    assert text_of(corpus) == TEXT
    assert bytes(corpus[70:80].tolist()) == TEXT[70:80]


def test_a_large_read_may_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a').write_bytes(TEXT)
    corpus = load(tmp_path / 'a', cache=tmp_path)
    pread = os.pread
    monkeypatch.setattr(os, 'pread', lambda file, size, start: pread(file, min(size, 1000), start))
    assert text_of(corpus) == TEXT


def test_a_corpus_reaches_workers_by_its_path(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(TEXT)
    (tmp_path / 'b').write_bytes(TEXT)
    corpus = load(tmp_path / 'a', tmp_path / 'b', cache=tmp_path / 'cache')
    again = pickle.loads(packed := pickle.dumps(corpus))
    assert len(packed) < 1000
    assert again.ends.tolist() == [len(TEXT), 2 * len(TEXT)]
    assert text_of(again) == text_of(corpus) == 2 * TEXT


@pytest.mark.parametrize('size', [1, 300_000, 3_000_000])
def test_fingerprints_tell_corpora_apart(tmp_path: Path, size: int) -> None:
    path, ends = tmp_path / 'corpus', tmp_path / 'ends'

    def fingerprint(content: bytes, at: int) -> str:
        path.write_bytes(content)
        ends.write_bytes(torch.tensor([at, len(content)]).numpy().tobytes())
        return Corpus('corpus', path, ends).fingerprint()

    before = fingerprint(bytes(size), 1)
    assert before == fingerprint(bytes(size), 1)
    changed = bytearray(size)
    changed[size // 2] = 1
    others = [fingerprint(changed, 1), fingerprint(bytes(size + 1), 1), fingerprint(bytes(size), 0)]
    assert len({before, *others}) == 4


def test_fingerprints_of_large_corpora_are_taken_here_and_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('simple_hierarchical_transformer.data.corpus.FINGERPRINT', 1 << 21)
    path = tmp_path / 'corpus'
    path.write_bytes(bytes(10 << 20))
    before = Corpus('corpus', path).fingerprint()
    for at, seen in ((5, True), ((5 << 20) + 5, True), ((1 << 20) + 5, False)):
        content = bytearray(10 << 20)
        content[at] = 1
        path.write_bytes(content)
        assert (Corpus('corpus', path).fingerprint() != before) == seen
