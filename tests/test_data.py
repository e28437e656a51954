"""Corpora: found, fetched, verified and read, and what happens where they are broken."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import json
import lzma
import pickle
import re
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch

from simple_hierarchical_transformer import data
from simple_hierarchical_transformer.data import Download

TEXT = bytes(range(256)) * 40


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


def load(*files: Path, cache: Path) -> data.Corpus:
    return data.load_corpus('corpus', list(files), cache)


# read


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
        assert as_bytes(load(*data.find_files(path), cache=tmp_path / 'cache').data) == TEXT
    assert (tmp_path / 'cache').exists() == bool(suffix)


def test_reads_folders_and_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / 'texts' / 'deep').mkdir(parents=True)
    (tmp_path / 'texts' / '.git').mkdir()
    (tmp_path / 'texts' / '.git' / 'config').write_bytes(b'hidden')
    (tmp_path / 'texts' / 'b.txt').write_bytes(b'second ')
    (tmp_path / 'texts' / 'a.txt').write_bytes(b'first ')
    (tmp_path / 'texts' / 'deep' / 'c.md').write_bytes(b'third')

    def read(source: str | Path) -> bytes:
        return as_bytes(load(*data.find_files(source), cache=tmp_path / 'cache').data)

    assert read(tmp_path / 'texts') == b'first second third'
    assert read(str(tmp_path / 'texts' / '*.txt')) == b'first second '
    assert read(str(tmp_path / '**' / '*.md')) == b'third'


def test_a_changed_file_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / 'text.gz'
    for text in (b'one', b'another'):
        path.write_bytes(gzip.compress(text))
        assert as_bytes(load(path, cache=tmp_path / 'cache').data) == text


@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zip'])
@pytest.mark.parametrize('damage', ['torn', 'foreign'])
def test_broken_archives_are_named_and_leave_nothing(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f'text{suffix}'
    if suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('a', TEXT)
        packed = path.read_bytes()
    else:
        packed = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}[suffix](TEXT)
    path.write_bytes(packed[: len(packed) // 2] if damage == 'torn' else b'this is no archive')

    with pytest.raises(ValueError, match=re.escape(f'data: {path} is torn, or not a {suffix} file')):
        load(path, cache=tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


def test_a_locked_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'locked.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a', TEXT)
    packed = bytearray(path.read_bytes())
    # the bit that says encrypted, in the local header and in the directory
    packed[6] |= 1
    packed[packed.index(b'PK\x01\x02') + 8] |= 1
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r'locked\.zip cannot be unpacked: .*encrypted'):
        load(path, cache=tmp_path / 'cache')


def test_missing_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is no file, no folder, and matches none as a glob'):
        data.find_files(tmp_path / 'nothing')
    with pytest.raises(ValueError, match='is a folder without files'):
        data.find_files(tmp_path)
    (tmp_path / 'empty').touch()
    with pytest.raises(ValueError, match='hold no byte'):
        load(*data.find_files(tmp_path), cache=tmp_path / 'cache')


def test_standard_library_is_at_hand() -> None:
    files = data.standard_library()
    assert sum(file.stat().st_size for file in files) > 5_000_000
    assert not any('site-packages' in file.parts for file in files)


# rows of tables, and downloads


def test_rows_of_tables_are_texts(tmp_path: Path) -> None:
    rows = [{'text': 'caf\u00e9', 'n': 1}, {'text': None, 'n': 2}, {'text': '', 'n': 3}, {'text': 'b', 'n': 4}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    datasets.Dataset.from_list([{'text': 'last'}]).to_parquet(tmp_path / 'b.parquet')
    (tmp_path / 'c.jsonl.bz2').write_bytes(bz2.compress(b'{"text": "packed"}'))
    (tmp_path / 'd.txt').write_text('plain')
    corpus = load(*data.find_files(tmp_path), cache=tmp_path / 'cache')
    assert as_bytes(corpus.data) == 'caf\u00e9blastpackedplain'.encode()
    assert corpus.ends.tolist() == [5, 6, 10, 16, 21]

    for name, key, message in (
        ('a.jsonl', 'body', "there is no column 'body', only text, n"),
        ('a.jsonl', 'n', "column 'n' holds int, not text"),
        ('torn.jsonl', 'text', 'cannot be read'),
        ('torn.parquet', 'text', 'cannot be read'),
    ):
        (tmp_path / name).exists() or (tmp_path / name).write_text('{"text": "a"}\n{"te')
        with pytest.raises(ValueError, match=re.escape(message)):
            data.load_corpus('x', [tmp_path / name], tmp_path / 'other', text_key=key)
    assert list((tmp_path / 'other').iterdir()) == []


def test_packed_tables_that_cannot_be_read_are_not_taken_for_text(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'a.jsonl.zip', 'w') as archive:
        archive.writestr('a.jsonl', '{"text": "a"}')
    with pytest.raises(ValueError, match=r'a\.jsonl\.zip has to be unpacked first'):
        load(tmp_path / 'a.jsonl.zip', cache=tmp_path / 'cache')


def test_tables_without_the_package_that_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match=r'a\.jsonl is read through the datasets package: pip install datasets'):
        load(tmp_path / 'a.jsonl', cache=tmp_path / 'cache')


def test_a_corpus_reaches_workers_by_its_path(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(TEXT)
    (tmp_path / 'b').write_bytes(TEXT)
    corpus = load(tmp_path / 'a', tmp_path / 'b', cache=tmp_path / 'cache')
    again = pickle.loads(packed := pickle.dumps(corpus))
    assert len(packed) < 1000
    assert again.ends.tolist() == [len(TEXT), 2 * len(TEXT)]
    assert torch.equal(again.data, corpus.data)


@pytest.mark.parametrize('size', [1, 300_000, 3_000_000])
def test_fingerprints_tell_corpora_apart(tmp_path: Path, size: int) -> None:
    path, ends = tmp_path / 'corpus', tmp_path / 'ends'

    def fingerprint(content: bytes, at: int) -> str:
        path.write_bytes(content)
        ends.write_bytes(torch.tensor([at, len(content)]).numpy().tobytes())
        return data.Corpus('corpus', path, ends).fingerprint()

    before = fingerprint(bytes(size), 1)
    assert before == fingerprint(bytes(size), 1)
    changed = bytearray(size)
    changed[size // 2] = 1
    others = [fingerprint(changed, 1), fingerprint(bytes(size + 1), 1), fingerprint(bytes(size), 0)]
    assert len({before, *others}) == 4


def test_fingerprints_of_large_corpora_are_taken_here_and_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, 'FINGERPRINT', 1 << 21)
    path = tmp_path / 'corpus'
    path.write_bytes(bytes(10 << 20))
    before = data.Corpus('corpus', path).fingerprint()
    for at, seen in ((5, True), ((5 << 20) + 5, True), ((1 << 20) + 5, False)):
        content = bytearray(10 << 20)
        content[at] = 1
        path.write_bytes(content)
        assert (data.Corpus('corpus', path).fingerprint() != before) == seen


def test_named_corpora_are_found_fetched_and_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TEXT
    with zipfile.ZipFile(tmp_path / 'packed.zip', 'w') as archive:
        archive.writestr('text', content)
    server.body = (tmp_path / 'packed.zip').read_bytes()
    download = Download(
        url=f'http://127.0.0.1:{server.server_address[1]}/',
        size=len(server.body),
        sha256=hashlib.sha256(server.body).hexdigest(),
        content=f'sha1:{hashlib.sha1(content).hexdigest()}',
        content_size=len(content),
    )
    monkeypatch.setitem(data.DOWNLOADS, 'text8', download)
    folder, cache = tmp_path / 'data', tmp_path / 'cache'
    assert as_bytes(data.load_download('text8', folder, cache).data) == content
    assert (folder / 'text8.zip').is_file()

    (folder / 'text8').write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r'has 10,239 bytes; text8 has 10,240, so it is torn'):
        data.load_download('text8', folder, cache)
    (folder / 'text8').write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r'is not text8: its sha1 is [0-9a-f]{40}, not'):
        data.load_download('text8', folder, cache)


# fetch


class Server(http.server.ThreadingHTTPServer):
    body = TEXT
    status = 200
    ranges = True
    # how many bytes the next responses send before they break off
    breaks: list[int]
    requests: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get('Range')
        self.server.requests.append(asked)
        start = int(asked[len('bytes=') : -1]) if asked and self.server.ranges else 0
        body = self.server.body[start:]
        self.send_response(206 if start else self.server.status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks.pop(0)] if self.server.breaks else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(('127.0.0.1', 0), Handler) as server:
        server.breaks, server.requests = [], []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def wanted(server: Server) -> Download:
    url = f'http://127.0.0.1:{server.server_address[1]}/text'
    return Download(url, len(TEXT), hashlib.sha256(TEXT).hexdigest())


def test_fetches_and_verifies(server: Server, tmp_path: Path) -> None:
    pieces: list[int] = []
    path = data.fetch(wanted(server), tmp_path / 'new' / 'text', progress=pieces.append)
    assert path.read_bytes() == TEXT
    assert sum(pieces) == len(TEXT)
    assert [file.name for file in path.parent.iterdir()] == ['text']


def test_goes_on_where_a_transfer_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = [3000, 2000]
    assert data.fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT
    assert server.requests == [None, 'bytes=3000-', 'bytes=5000-']


def test_goes_on_with_what_an_earlier_run_left(server: Server, tmp_path: Path) -> None:
    (tmp_path / 'text.part').write_bytes(TEXT[:7000])
    assert data.fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT
    assert server.requests == ['bytes=7000-']


def test_begins_anew_where_the_server_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [3000]
    assert data.fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT
    assert server.requests == [None, 'bytes=3000-']


def test_a_transfer_that_brings_nothing_ends_with_a_clear_error(server: Server, tmp_path: Path) -> None:
    server.breaks = [3000, 0]
    with pytest.raises(OSError, match=r'broke off after 3,000 of 10,240 bytes; fetch again to go on'):
        data.fetch(wanted(server), tmp_path / 'text')
    assert not (tmp_path / 'text').exists()
    assert data.fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT


@pytest.mark.parametrize('body', [TEXT[:-1] + b'?', TEXT + b'more', b'<html>please log in</html>'])
def test_a_file_that_is_another_is_thrown_away(server: Server, tmp_path: Path, body: bytes) -> None:
    server.body = body
    with pytest.raises(OSError, match='is not the file it should be'):
        data.fetch(wanted(server), tmp_path / 'text')
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_partial_file_does_not_poison_the_next_try(server: Server, tmp_path: Path) -> None:
    (tmp_path / 'text.part').write_bytes(b'?' * 4000)
    with pytest.raises(OSError, match='is not the file it should be'):
        data.fetch(wanted(server), tmp_path / 'text')
    assert data.fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT


def test_a_server_that_says_no_is_named(server: Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(OSError, match='could not be fetched: HTTP Error 503'):
        data.fetch(wanted(server), tmp_path / 'text')
    assert list(tmp_path.iterdir()) == []


def test_gives_up_within_seconds_where_nothing_answers(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen()
        nowhere = Download(f'http://127.0.0.1:{silent.getsockname()[1]}/text', 1, '')
        start = time.monotonic()
        with pytest.raises(OSError, match=r'could not be fetched|broke off'):
            data.fetch(nowhere, tmp_path / 'text', timeout=0.5)
        assert time.monotonic() - start < 10
