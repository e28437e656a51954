"""Corpora: found, fetched, verified, read, split and sampled, and what happens where they are broken."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import lzma
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simple_hierarchical_transformer import data
from simple_hierarchical_transformer.data import Download

TEXT = bytes(range(256)) * 40


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


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
        assert as_bytes(data.load_bytes(data.find_files(path), tmp_path / 'cache')) == TEXT
    assert (tmp_path / 'cache').exists() == bool(suffix)


def test_reads_folders_and_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / 'texts' / 'deep').mkdir(parents=True)
    (tmp_path / 'texts' / '.git').mkdir()
    (tmp_path / 'texts' / '.git' / 'config').write_bytes(b'hidden')
    (tmp_path / 'texts' / 'b.txt').write_bytes(b'second ')
    (tmp_path / 'texts' / 'a.txt').write_bytes(b'first ')
    (tmp_path / 'texts' / 'deep' / 'c.md').write_bytes(b'third')

    def read(source: str | Path) -> bytes:
        return as_bytes(data.load_bytes(data.find_files(source), tmp_path / 'cache'))

    assert read(tmp_path / 'texts') == b'first second third'
    assert read(str(tmp_path / 'texts' / '*.txt')) == b'first second '
    assert read(str(tmp_path / '**' / '*.md')) == b'third'


def test_a_changed_file_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / 'text.gz'
    for text in (b'one', b'another'):
        path.write_bytes(gzip.compress(text))
        assert as_bytes(data.load_bytes([path], tmp_path / 'cache')) == text


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
        data.load_bytes([path], tmp_path / 'cache')
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
        data.load_bytes([path], tmp_path / 'cache')


def test_missing_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is no file, no folder, and matches none as a glob'):
        data.find_files(tmp_path / 'nothing')
    with pytest.raises(ValueError, match='is a folder without files'):
        data.find_files(tmp_path)
    (tmp_path / 'empty').touch()
    with pytest.raises(ValueError, match='hold no byte'):
        data.load_bytes(data.find_files(tmp_path), tmp_path / 'cache')


def test_standard_library_is_at_hand() -> None:
    files = data.standard_library()
    assert sum(file.stat().st_size for file in files) > 5_000_000
    assert not any('site-packages' in file.parts for file in files)


# split and sample


def test_splits_are_90_5_5() -> None:
    assert data.split_bytes(100_000_000, seq_len=1024) == {
        'train': range(90_000_000),
        'valid': range(90_000_000, 95_000_000),
        'test': range(95_000_000, 100_000_000),
    }


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    data.split_bytes(2040, seq_len=101)
    with pytest.raises(ValueError, match='data has 2,040 bytes, of which the shortest split has 102'):
        data.split_bytes(2040, seq_len=102)


@given(st.integers(30, 200), st.integers(1, 12), st.integers(0, 9))
def test_samples_are_runs_of_the_split(size: int, seq_len: int, seed: int) -> None:
    corpus, span = torch.arange(size).to(torch.uint8), range(size // 4, size // 2 + 8)
    seq_len = min(seq_len, len(span) - 1)
    batch = data.sample_batch(
        corpus, span, batch_size=50, seq_len=seq_len, generator=torch.Generator().manual_seed(seed)
    )
    assert batch.shape == (50, seq_len + 1)
    assert batch.dtype == torch.int64
    assert (batch.diff() == 1).all()
    assert span.start <= batch.min()
    assert batch.max() < span.stop


def test_samples_reach_both_ends_of_the_split() -> None:
    batch = data.sample_batch(torch.arange(30).to(torch.uint8), range(10, 20), batch_size=500, seq_len=4)
    assert batch.min() == 10
    assert batch.max() == 19


@given(st.integers(2, 300), st.integers(0, 200), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_counts_every_byte_once(size: int, start: int, seq_len: int, batch_size: int) -> None:
    corpus = torch.arange(size)
    span = range(min(start, size - 2), size)
    labels = []
    for ids, targets in data.evaluation_batches(corpus, span, seq_len=seq_len, batch_size=batch_size):
        assert ids.shape == targets.shape
        assert ids.shape[0] <= batch_size
        assert ids.shape[1] <= seq_len
        assert torch.equal(ids + 1, targets)
        labels += targets.flatten().tolist()
    assert sorted(labels) == list(range(max(span.start, 1), span.stop))


@given(st.integers(12, 300), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))
def test_segments_read_each_stretch_in_order(size: int, batch_size: int, seq_len: int, segments: int) -> None:
    span = range(10, size)
    batches = data.segment_batches(
        torch.arange(size), span, batch_size=batch_size, seq_len=seq_len, segments=segments,
        generator=torch.Generator().manual_seed(size),
    )  # fmt: skip
    if len(span) <= seq_len:
        with pytest.raises(ValueError, match='too few for segments'):
            next(batches)
        return

    in_stretch, last = min(segments, (len(span) - 1) // seq_len), torch.empty(0)
    for turn in range(3 * in_stretch):
        ids, begins = next(batches)
        assert ids.shape == (batch_size, seq_len + 1)
        assert begins == (turn % in_stretch == 0)
        assert begins or torch.equal(ids[:, 0], last)
        assert (ids.diff() == 1).all()
        assert ids.min() >= span.start
        assert ids.max() < span.stop
        last = ids[:, -1]


def test_evaluation_of_a_part_is_fixed_and_spread() -> None:
    def labels(max_bytes: int) -> list[int]:
        batches = data.evaluation_batches(
            torch.arange(1000), range(500, 1000), seq_len=10, batch_size=3, max_bytes=max_bytes
        )
        return [label for _, targets in batches for label in targets.flatten().tolist()]

    part = labels(100)
    assert len(part) == len(set(part)) == 100
    assert part == labels(100)
    assert min(part) < 520
    assert max(part) > 940
    assert len(labels(5000)) == 500


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
