"""Downloads are verified, resumed after a break, and never left half done."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpora import TEXT, text_of

from simple_hierarchical_transformer import data
from simple_hierarchical_transformer.data import DOWNLOADS, Download, load_download

# a busy machine must not fail a test
fetch = functools.partial(data.fetch, timeout=60.0)


class Server(http.server.ThreadingHTTPServer):
    body = TEXT
    status = 200
    ranges = True
    # Number of bytes that the next responses send before they break off.
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
    monkeypatch.setitem(DOWNLOADS, 'text8', download)
    folder, cache = tmp_path / 'data', tmp_path / 'cache'
    assert text_of(load_download('text8', folder, cache)) == content
    assert (folder / 'text8.zip').is_file()

    (folder / 'text8').write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r'has 10,239 bytes; text8 has 10,240, so it is damaged'):
        load_download('text8', folder, cache)
    (folder / 'text8').write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r'is not text8: its sha1 is [0-9a-f]{40}, not'):
        load_download('text8', folder, cache)


def test_fetches_and_verifies(server: Server, tmp_path: Path) -> None:
    pieces: list[int] = []
    path = fetch(wanted(server), tmp_path / 'new' / 'text', progress=pieces.append)
    assert path.read_bytes() == TEXT
    assert sum(pieces) == len(TEXT)
    assert [file.name for file in path.parent.iterdir()] == ['text']


def test_goes_on_where_a_transfer_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = [3000, 2000]
    assert fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT
    assert server.requests == [None, 'bytes=3000-', 'bytes=5000-']


def test_goes_on_with_what_an_earlier_run_left(server: Server, tmp_path: Path) -> None:
    (tmp_path / 'text.part').write_bytes(TEXT[:7000])
    assert fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT
    assert server.requests == ['bytes=7000-']


def test_begins_anew_where_the_server_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [3000]
    assert fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT
    assert server.requests == [None, 'bytes=3000-']


def test_a_transfer_that_brings_nothing_ends_with_a_clear_error(server: Server, tmp_path: Path) -> None:
    server.breaks = [3000, 0]
    with pytest.raises(OSError, match=r'broke off after 3,000 of 10,240 bytes; fetch again to continue'):
        fetch(wanted(server), tmp_path / 'text')
    assert not (tmp_path / 'text').exists()
    assert fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT


@pytest.mark.parametrize('body', [TEXT[:-1] + b'?', TEXT + b'more', b'<html>please log in</html>'])
def test_a_file_that_is_another_is_thrown_away(server: Server, tmp_path: Path, body: bytes) -> None:
    server.body = body
    with pytest.raises(OSError, match='is not the file it should be'):
        fetch(wanted(server), tmp_path / 'text')
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_partial_file_does_not_poison_the_next_try(server: Server, tmp_path: Path) -> None:
    (tmp_path / 'text.part').write_bytes(b'?' * 4000)
    with pytest.raises(OSError, match='is not the file it should be'):
        fetch(wanted(server), tmp_path / 'text')
    assert fetch(wanted(server), tmp_path / 'text').read_bytes() == TEXT


def test_a_server_that_says_no_is_named(server: Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(OSError, match='could not be fetched: HTTP Error 503'):
        fetch(wanted(server), tmp_path / 'text')
    assert list(tmp_path.iterdir()) == []


def test_gives_up_within_seconds_where_nothing_answers(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen()
        nowhere = Download(f'http://127.0.0.1:{silent.getsockname()[1]}/text', 1, '')
        start = time.monotonic()
        with pytest.raises(OSError, match=r'could not be fetched|broke off'):
            fetch(nowhere, tmp_path / 'text', timeout=0.5)
        assert time.monotonic() - start < 10
