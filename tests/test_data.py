"""Corpora: found, fetched, verified and read, and what happens where they are broken."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader

from simple_hierarchical_transformer.data import corpus as data
from simple_hierarchical_transformer.data import formats
from simple_hierarchical_transformer.data.batches import Batches
from simple_hierarchical_transformer.data.corpus import Download
from simple_hierarchical_transformer.training import sources

TEXT = bytes(range(256)) * 40


def text_of(corpus: data.Corpus) -> bytes:
    [ids] = corpus.read(torch.tensor([0]), torch.tensor([len(corpus)]), len(corpus), pad=0)
    return bytes(ids.tolist())


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
        assert text_of(load(*data.find_files(path), cache=tmp_path / 'cache')) == TEXT
    assert (tmp_path / 'cache').exists() == bool(suffix)


def test_slices_of_a_corpus_are_its_bytes(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(TEXT)
    corpus = load(tmp_path / 'a', cache=tmp_path)
    for span in (slice(None), slice(3, 7), slice(-5, None), slice(7, 3), slice(9, 10**9), slice(None, None, 3)):
        assert corpus[span].dtype == torch.uint8
        assert bytes(corpus[span].tolist()) == TEXT[span]


def test_reads_folders_and_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / 'texts' / 'deep').mkdir(parents=True)
    (tmp_path / 'texts' / '.git').mkdir()
    (tmp_path / 'texts' / '.git' / 'config').write_bytes(b'hidden')
    (tmp_path / 'texts' / 'b.txt').write_bytes(b'second ')
    (tmp_path / 'texts' / 'a.txt').write_bytes(b'first ')
    (tmp_path / 'texts' / 'deep' / 'c.md').write_bytes(b'third')

    def read(source: str | Path) -> bytes:
        return text_of(load(*data.find_files(source), cache=tmp_path / 'cache'))

    assert read(tmp_path / 'texts') == b'first second third'
    assert read(str(tmp_path / 'texts' / '*.txt')) == b'first second '
    assert read(str(tmp_path / '**' / '*.md')) == b'third'


def test_a_changed_file_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / 'text.gz'
    for text in (b'one', b'another'):
        path.write_bytes(gzip.compress(text))
        assert text_of(load(path, cache=tmp_path / 'cache')) == text


def test_missing_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is no file, no folder, and matches none as a glob'):
        data.find_files(tmp_path / 'nothing')
    with pytest.raises(ValueError, match='is a folder without files'):
        data.find_files(tmp_path)
    (tmp_path / 'empty').touch()
    with pytest.raises(ValueError, match='hold no byte'):
        load(*data.find_files(tmp_path), cache=tmp_path / 'cache')


def tree(folder: Path, **files: str) -> Path:
    """A folder with files; an underscore in a name stands for a slash."""
    for name, text in files.items():
        path = folder / name.replace('_', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_folder_is_read_through_links_and_each_file_once(tmp_path: Path) -> None:
    inside, outside = tree(tmp_path / 'in', b_c='1 ', d='2 '), tree(tmp_path / 'out', e_f='3 ', g='4 ', h='5 ')
    (inside / 'a').symlink_to(inside / 'b')
    (inside / 'b' / 'loop').symlink_to(inside)
    (inside / 'b' / 'link').symlink_to(inside / 'd')
    (inside / 'out').symlink_to(outside)
    (inside / 'again').symlink_to(outside / 'e')
    (outside / 'e' / 'back').symlink_to(outside)
    (inside / 'z').symlink_to(outside / 'h')
    files = data.find_files(inside)
    # folders and files under their own names, or by the shortest way through links
    assert [str(file.relative_to(inside)) for file in files] == ['again/f', 'b/c', 'd', 'out/g', 'out/h']
    assert text_of(load(*files, cache=tmp_path / 'cache')) == b'3 1 2 4 5 '


def test_globs_of_many_folders_read_each_file_once(tmp_path: Path) -> None:
    folder = tree(tmp_path / 'in', a_b_c='1', a_d='2', e='3')
    for number in range(3):
        # glob.glob takes them 40 deep, in all orders
        (folder / 'a' / f'loop{number}').symlink_to(folder)
    for pattern, names in (
        ('**', ['a/b/c', 'a/d', 'e']),
        ('**/*', ['a/b/c', 'a/d', 'e']),
        ('**/**/[cd]', ['a/b/c', 'a/d']),
        ('a/**/c', ['a/b/c']),
        ('*/**/b/*', ['a/b/c']),
        ('a/*', ['a/d']),
    ):
        assert [str(file.relative_to(folder)) for file in data.find_files(folder / pattern)] == names


def test_what_exists_is_no_glob(tmp_path: Path) -> None:
    def read(source: Path) -> str:
        return text_of(load(*data.find_files(source), cache=tmp_path / 'cache')).decode()

    rows = tmp_path / 'rows'
    for name in ('a*.jsonl', 'a1.jsonl', 'a2.jsonl', 'a[2].jsonl'):
        tree(rows, **{name: json.dumps({'text': f'{name} '})})
    assert [read(rows / name) for name in ('a*.jsonl', 'a[2].jsonl')] == ['a*.jsonl ', 'a[2].jsonl ']
    assert read(rows) == 'a*.jsonl a1.jsonl a2.jsonl a[2].jsonl '
    assert read(rows / 'a[12].jsonl') == 'a1.jsonl a2.jsonl '

    tree(tmp_path / 'x[2024]', b='', c_d='')
    tree(tmp_path / 'x2', b='')
    for pattern, names in (('x[2024]', ['b', 'c/d']), ('x[2024]/*', ['b']), ('x[2024]/**/*', ['b', 'c/d'])):
        found = data.find_files(tmp_path / pattern)
        assert [str(file.relative_to(tmp_path / 'x[2024]')) for file in found] == names


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    folder = tree(tmp_path / 'in', a='1')
    (folder / 'b').symlink_to(tmp_path / 'nothing')
    with pytest.raises(ValueError, match=r'in/b is a link to a file or folder that is not there'):
        data.find_files(folder)


def test_no_name_is_not_this_folder() -> None:
    for source in ('', '=2'):
        with pytest.raises(ValueError, match="a source must be a file, a folder or a glob, got ''"):
            sources.load_sources([source], Path('nowhere'), text_key='text', say=print)
    # of a user that there is not
    with pytest.raises(ValueError, match='is no file, no folder'):
        data.find_files('~nobody-of-this-name/a')


def test_names_that_are_no_text_can_be_shown(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.txt')
    try:
        Path(path).write_bytes(TEXT)
    except OSError:
        # a disk that takes no such names has no such fault
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
        with pytest.raises(ValueError, match='--data takes a weight above 0 for every source, or for none'):
            sources.load_sources(mixed, tmp_path / 'data', text_key='text', say=print)


# what was read changes


def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Of a process of its own: where the file is mapped, the system ends it."""
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


@pytest.mark.parametrize('replace', ['written', 'renamed', 'in the middle'])
def test_another_file_of_the_same_size_and_time_is_unpacked_anew(tmp_path: Path, replace: str) -> None:
    path, other, end = tmp_path / 'a.txt', tmp_path / 'other', tree(tmp_path, end='') / 'end'
    for text in (b'a' * 20_000, b'a' * 9_999 + b'b' + b'a' * 10_000):
        text = text if replace == 'in the middle' else text[-10_001:]
        if replace == 'renamed':
            other.write_bytes(text)
            os.utime(other, ns=(1, 1))
            os.replace(other, path)
        else:
            changed = path.stat().st_ctime_ns if path.exists() else 0
            path.write_bytes(text)
            os.utime(path, ns=(1, 1))
            # the clock of a disk ticks some hundred times a second
            while path.stat().st_ctime_ns == changed:
                os.utime(path, ns=(1, 1))
        assert text_of(load(path, end, cache=tmp_path / 'cache')) == text


# the cache


def unpacked(tmp_path: Path, name: str, size: int = 1000) -> Path:
    path = tmp_path / f'{name}.gz'
    path.write_bytes(gzip.compress(name.encode() * size))
    return path


def held(cache: Path) -> set[str]:
    """What the cache has the text of."""
    return {path.read_bytes()[:1].decode() for path in cache.glob('*/bytes')}


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    cache = tmp_path / 'cache'
    # unpacks a pipe that never ends
    code = f"""
        import os, threading
        from pathlib import Path
        from simple_hierarchical_transformer.data import corpus as data
        fifo = Path({str(tmp_path)!r}, str(os.getpid()))
        os.mkfifo(fifo)
        def write():
            with open(fifo, 'wb') as file:
                file.write(bytes(1 << 18))
                threading.Event().wait()
        threading.Thread(target=write, daemon=True).start()
        data.unpack([fifo], Path({str(cache)!r}, 16 * 'a'), 'text')
        """
    dead, live = (
        subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.PIPE)
        for _ in range(2)
    )
    try:
        while len(started := list(cache.glob('*/bytes'))) < 2:
            assert dead.poll() is live.poll() is None
            time.sleep(0.01)
        dead.kill()
        dead.wait()
        # of another version, which locked nothing
        old = tree(cache, tmp12345678_bytes='x', tmp12345678_ends='x', tmpabcdefgh_bytes='x', tmpmine0000_mine='x')
        os.utime(old / 'tmp12345678' / 'bytes', (1, 1))
        (cache / f'{16 * "0"}.bytes').write_text('x')
        # of one that was killed while it removed them
        tree(cache / (16 * 'b'), ends='x')
        (cache / (16 * 'c')).mkdir()
        load(unpacked(tmp_path, 'a'), cache=cache)
        names = {path.name for path in cache.iterdir()}
        assert len(names & {path.parent.name for path in started}) == 1
        assert {name for name in names if not name.startswith('unpacking-')} - {'tmpabcdefgh', 'tmpmine0000'} == {
            next(path.parent.name for path in cache.glob('*/bytes') if path.read_bytes()[:1] == b'a')
        }
        assert len(names) == 4
    finally:
        for process in (dead, live):
            process.kill()
            process.communicate()
    load(unpacked(tmp_path, 'b'), cache=cache)
    assert not list(cache.glob('unpacking-*'))


def test_copies_used_longest_ago_go_and_none_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / 'cache'
    monkeypatch.setattr(data, 'CACHE_LIMIT', 3000)
    first = load(unpacked(tmp_path, 'a'), cache=cache)
    for name in 'bcd':
        load(unpacked(tmp_path, name), cache=cache)
        for path in cache.glob('*/bytes'):
            # an age that a clock shows
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    # what is unpacked last comes on top
    assert held(cache) == {'a', 'c', 'd'}
    load(tmp_path / 'c.gz', cache=cache)
    load(unpacked(tmp_path, 'e'), cache=cache)
    assert held(cache) == {'a', 'c', 'e'}
    assert text_of(pickle.loads(pickle.dumps(first))) == 1000 * b'a'
    del first
    load(unpacked(tmp_path, 'f'), cache=cache)
    assert held(cache) == {'c', 'e', 'f'}


def test_a_copy_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    path, cache = unpacked(tmp_path, 'a'), tmp_path / 'cache'
    for damage in ('bytes', 'ends', 'short'):
        load(path, cache=cache)
        [folder] = cache.iterdir()
        if damage == 'short':
            os.truncate(folder / 'bytes', 10)
        else:
            (folder / damage).unlink()
        assert text_of(load(path, cache=cache)) == 1000 * b'a'


@pytest.mark.parametrize('change', ['grows', 'is replaced', 'shrinks', 'goes'])
def test_a_file_that_changes_while_it_is_unpacked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tree(tmp_path / 'source', first='a' * 1000, second='b' * 1000)
    whole = formats.Texts.add_file

    def add_file(texts: formats.Texts, path: Path) -> None:
        whole(texts, path)
        if path.name == 'second':
            if change == 'grows':
                with open(source / 'first', 'a') as file:
                    file.write('more')
            elif change == 'is replaced':
                (source / 'new').write_text('c' * 1000)
                os.replace(source / 'new', source / 'first')
            elif change == 'shrinks':
                os.truncate(source / 'first', 10)
            else:
                (source / 'first').unlink()

    monkeypatch.setattr(formats.Texts, 'add_file', add_file)
    message = 'No such file' if change == 'goes' else rf'^data: {source / "first"} .* changed during unpacking'
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load_corpus('source', data.find_files(source), tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


def test_a_full_disk_is_told_of_with_what_was_unpacked(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from simple_hierarchical_transformer.data import corpus as data
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
data.load_corpus('a', [Path(sys.argv[1])], Path(sys.argv[2]))
"""
    path, cache = unpacked(tmp_path, 'a', 1 << 18), tmp_path / 'cache'
    result = subprocess.run([sys.executable, '-c', code, path, cache], capture_output=True, text=True, cwd=ROOT)
    assert f'OSError: data: {path} could not be unpacked to {cache}: ' in result.stderr
    assert list(cache.iterdir()) == []


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / 'cache'
    monkeypatch.setattr(data, 'CACHE_LIMIT', 1)
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    for name in 'ab':
        assert text_of(load(unpacked(tmp_path, name), cache=cache)) == 1000 * name.encode()
    assert held(cache) == {'a', 'b'}


def test_standard_library_is_at_hand() -> None:
    files = data.standard_library()
    assert sum(file.stat().st_size for file in files) > 5_000_000
    assert not any('site-packages' in file.parts for file in files)


# corpora


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
    assert text_of(data.load_download('text8', folder, cache)) == content
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
