"""The cache of unpacked corpora: one folder each, with the bytes and the ends of the texts.

Several processes may use a cache at the same time. A process holds a shared lock on the bytes that it reads, and an
exclusive lock on those that it writes. No process removes a folder whose bytes are locked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from .formats import display_names
from .texts import TextWriter

BYTES, ENDS = 'bytes', 'ends'
CACHE_LIMIT = 32 << 30
SAMPLE = 1 << 12  # bytes at each end of a file that are part of its cache key
UNFINISHED = 'unpacking-'
ENTRY = re.compile('[0-9a-f]{16}')
# Names of files from earlier versions, which nothing reads any more.
OLD_ENTRY, OLD_UNFINISHED, DAY = re.compile(r'[0-9a-f]{16}\.(bytes|ends)'), re.compile('tmp.{8}'), 86400


def cache_key(files: Sequence[Path], text_key: str) -> str:
    """Returns the name of the cache folder for these files. It changes whenever one of them changes."""
    facts = [file_facts(file) for file in files]
    return hashlib.sha256(repr((facts, text_key)).encode()).hexdigest()[:16]


def file_facts(path: Path) -> tuple[object, ...]:
    """Returns facts that change if a file is written or replaced, even by one of the same size and time."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        stat = os.fstat(file.fileno())
        digest.update(file.read(SAMPLE))
        file.seek(max(stat.st_size - SAMPLE, 0))
        digest.update(file.read(SAMPLE))
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return os.path.realpath(path), stat.st_size, *times, stat.st_ino, digest.hexdigest()


def lock(file: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks an open file or folder until it is closed.

    Returns False if another process holds the lock, or if the system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, mode: int, *, wait: bool) -> Iterator[bool]:
    """Locks a file or folder for the duration of the context. Yields whether it succeeded."""
    try:
        file = os.open(path, mode)
    except OSError:
        # Some systems cannot open folders.
        yield False
        return
    try:
        yield lock(file, wait=wait)
    finally:
        os.close(file)


def is_complete(folder: Path) -> bool:
    """Returns whether a folder of the cache has bytes up to the end of its last text."""
    try:
        with open(folder / ENDS, 'rb') as ends:
            ends.seek(-8, os.SEEK_END)
            return int.from_bytes(ends.read(), sys.byteorder) == (folder / BYTES).stat().st_size
    except OSError:
        return False


def unpack(files: Sequence[Path], folder: Path, text_key: str) -> None:
    """Writes the texts of all files to `folder`, which appears only once it is complete.

    Raises:
        ValueError: a file cannot be read, or changes meanwhile, or all files are empty.
        OSError: the disk is full or broken.
    """
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f'{UNFINISHED}{uuid.uuid4().hex}'
    with contextlib.ExitStack() as stack:
        stack.callback(remove_folder, unfinished)
        # The lock on the cache keeps others from removing the new folder before its own lock is held.
        with locked(cache, os.O_RDONLY, wait=True) as exclusive:
            if exclusive:
                tidy(cache)
            unfinished.mkdir()
            output = stack.enter_context(open(unfinished / BYTES, 'wb'))
            lock(output.fileno())
        with open(unfinished / ENDS, 'wb') as ends:
            writer = TextWriter(output, ends, text_key)
            for file in files:
                writer.add_file(file)
            check_not_empty(files, output.tell())
            if cache_key(files, text_key) != folder.name:
                raise ValueError(f'data: {display_names(files)} changed during unpacking: try again')
            for written in (output, ends):
                written.flush()
                os.fsync(written.fileno())
        with locked(cache, os.O_RDONLY, wait=True):
            # Some systems cannot rename a folder of open files.
            output.close()
            if not is_complete(folder):
                remove_folder(folder)
                try:
                    os.rename(unfinished, folder)
                except OSError:
                    # Without locks, another process may have created it meanwhile.
                    if not is_complete(folder):
                        raise


def check_not_empty(files: Sequence[Path], size: int) -> None:
    """Raises ValueError if the texts of these files have no byte."""
    if not size:
        raise ValueError(f'data: {display_names(files)} hold no byte')


def remove_folder(folder: Path) -> None:
    """Removes a folder of the cache, unless it holds files that the cache did not write."""
    with contextlib.suppress(OSError):
        for name in (BYTES, ENDS):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def remove_unused(folder: Path) -> bool:
    """Removes a folder of the cache unless a process uses it. Returns whether no process uses it."""
    if not (folder / BYTES).exists():
        remove_folder(folder)
        return True
    # Some file systems grant an exclusive lock only on a file that is open for writing.
    with locked(folder / BYTES, os.O_RDWR, wait=False) as exclusive:
        if exclusive:
            remove_folder(folder)
        return exclusive


def tidy(cache: Path) -> None:
    """Removes folders that no process uses: all unfinished ones, and the least recently used of the others until at
    most `CACHE_LIMIT` bytes are left. The caller holds the lock on `cache`.
    """
    sizes, used = {}, {}
    for path in cache.iterdir():
        with contextlib.suppress(OSError):
            if OLD_ENTRY.fullmatch(path.name):
                path.unlink()
            elif OLD_UNFINISHED.fullmatch(path.name):
                # Earlier versions did not lock these. A recent write shows that one is in use.
                if (path / BYTES).stat().st_mtime < time.time() - DAY:
                    remove_unused(path)
            elif ENTRY.fullmatch(path.name) and is_complete(path):
                stats = [(path / name).stat() for name in (BYTES, ENDS)]
                sizes[path], used[path] = sum(stat.st_size for stat in stats), stats[0].st_mtime_ns
            elif ENTRY.fullmatch(path.name) or path.name.startswith(UNFINISHED):
                remove_unused(path)
    total = sum(sizes.values())
    for path in sorted(used, key=lambda path: used[path]):
        if total > CACHE_LIMIT and remove_unused(path):
            total -= sizes[path]
