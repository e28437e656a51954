"""The cache of unpacked corpora: what it keeps, what it removes, and what other processes use meanwhile."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from corpora import load, text_of, tree
from support.commands import ROOT

from simple_hierarchical_transformer.data import find_files, load_corpus
from simple_hierarchical_transformer.data.texts import TextWriter


def unpacked(tmp_path: Path, name: str, size: int = 1000) -> Path:
    path = tmp_path / f'{name}.gz'
    path.write_bytes(gzip.compress(name.encode() * size))
    return path


def held(cache: Path) -> set[str]:
    """Returns the first characters of the texts in the cache."""
    return {path.read_bytes()[:1].decode() for path in cache.glob('*/bytes')}


def test_a_changed_file_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / 'text.gz'
    for text in (b'one', b'another'):
        path.write_bytes(gzip.compress(text))
        assert text_of(load(path, cache=tmp_path / 'cache')) == text


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
            # The clock of a file system ticks some hundred times a second.
            while path.stat().st_ctime_ns == changed:
                os.utime(path, ns=(1, 1))
        assert text_of(load(path, end, cache=tmp_path / 'cache')) == text


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    cache = tmp_path / 'cache'
    # Unpacks a pipe that never ends.
    code = f"""
        import os, threading
        from pathlib import Path
        from simple_hierarchical_transformer.data.cache import unpack
        fifo = Path({str(tmp_path)!r}, str(os.getpid()))
        os.mkfifo(fifo)
        def write():
            with open(fifo, 'wb') as file:
                file.write(bytes(1 << 18))
                threading.Event().wait()
        threading.Thread(target=write, daemon=True).start()
        unpack([fifo], Path({str(cache)!r}, 16 * 'a'), 'text')
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
        # Left by earlier versions, which locked nothing.
        old = tree(cache, tmp12345678_bytes='x', tmp12345678_ends='x', tmpabcdefgh_bytes='x', tmpmine0000_mine='x')
        os.utime(old / 'tmp12345678' / 'bytes', (1, 1))
        (cache / f'{16 * "0"}.bytes').write_text('x')
        # Left by a process that was killed during a removal.
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
    monkeypatch.setattr('simple_hierarchical_transformer.data.cache.CACHE_LIMIT', 3000)
    first = load(unpacked(tmp_path, 'a'), cache=cache)
    for name in 'bcd':
        load(unpacked(tmp_path, name), cache=cache)
        for path in cache.glob('*/bytes'):
            # An age that the clock resolves.
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    # The limit is checked before a corpus is unpacked, so the newest one is in excess.
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
    whole = TextWriter.add_file

    def add_file(writer: TextWriter, path: Path) -> None:
        whole(writer, path)
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

    monkeypatch.setattr(TextWriter, 'add_file', add_file)
    message = 'No such file' if change == 'goes' else rf'^data: {source / "first"} .* changed during unpacking'
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus('source', find_files(source), tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


def test_a_full_disk_is_told_of_with_what_was_unpacked(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from simple_hierarchical_transformer.data import load_corpus
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
load_corpus('a', [Path(sys.argv[1])], Path(sys.argv[2]))
"""
    path, cache = unpacked(tmp_path, 'a', 1 << 18), tmp_path / 'cache'
    result = subprocess.run([sys.executable, '-c', code, path, cache], capture_output=True, text=True, cwd=ROOT)
    assert f'OSError: data: {path} could not be unpacked to {cache}: ' in result.stderr
    assert list(cache.iterdir()) == []


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / 'cache'
    monkeypatch.setattr('simple_hierarchical_transformer.data.cache.CACHE_LIMIT', 1)
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    for name in 'ab':
        assert text_of(load(unpacked(tmp_path, name), cache=cache)) == 1000 * name.encode()
    assert held(cache) == {'a', 'b'}
