"""Byte corpora: find, fetch, verify, read.

A corpus lies on disk and is read as it is needed, so it may be larger than memory.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import mmap
import os
import re
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .formats import Texts, is_hidden, kind_of_file, shown

CHUNK = 1 << 20
FINGERPRINT = 1 << 28
SAMPLE = 1 << 12  # bytes of a file's beginning and end that the cache knows it by
CACHE_LIMIT = 32 << 30
UNFINISHED = 'unpacking-'
ENTRY = re.compile('[0-9a-f]{16}')
SEEKING = threading.Lock()  # where the system does not read and seek at once
# those of earlier versions, which nothing reads any more
OLD_ENTRY, OLD_UNFINISHED, DAY = re.compile(r'[0-9a-f]{16}\.(bytes|ends)'), re.compile('tmp.{8}'), 86400


@dataclass(frozen=True)
class Download:
    """A file on the web, with what proves that it arrived whole."""

    url: str
    size: int
    sha256: str
    content: str = ''
    """The digest of what is in it, `algorithm:hexadecimal digits`."""
    content_size: int = 0


DOWNLOADS = {
    # the first 10^8 bytes of the English Wikipedia dump of 2006-03-03
    'enwik8': Download(
        url='http://mattmahoney.net/dc/enwik8.zip',
        size=36_445_475,
        sha256='547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc',
        content='sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8',
        content_size=100_000_000,
    ),
    # 10^8 letters and spaces of the same dump, without markup
    'text8': Download(
        url='http://mattmahoney.net/dc/text8.zip',
        size=31_344_016,
        sha256='a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232',
        content='sha1:0dc3edebc970dcc96137e7deda4d9995af9d93de',
        content_size=100_000_000,
    ),
}


# find


def find_files(source: str | Path) -> list[Path]:
    """The files that `source`, a file, a folder or a glob, stands for, each once, sorted by path.

    What exists is a file or a folder, whatever is in its name. A folder means every file below it whose path has no
    hidden part, through links too.

    Raises ValueError where there is none.
    """
    if not str(source):
        raise ValueError("data: a source must be a file, a folder or a glob, got ''")
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return [path]
    if path.is_dir():
        files, kind = [file for folder in folders_below(path) for file in files_in(folder)], 'a folder without files'
    else:
        files = [file for file in map(Path, expand_glob(path)) if file.is_file()]
        kind = 'no file, no folder, and matches none as a glob'
    # a file before links to it
    once: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (file.is_symlink(), file)):
        once.setdefault(os.path.realpath(file), file)
    if not once:
        raise ValueError(f'data: {shown(source)} is {kind}')
    return sorted(once.values())


def folders_below(folder: Path) -> list[Path]:
    """The folder and all below it that are not hidden, each once, and under its own name before that of a link."""
    found: dict[str, Path] = {}
    folders, links = [folder], list[Path]()
    while folders or links:
        path = folders.pop(0) if folders else links.pop(0)
        if found.setdefault(os.path.realpath(path), path) is path:
            # in one order, so that every machine comes to a folder through the same link
            below = sorted(entry for entry in path.iterdir() if not is_hidden(Path(entry.name)) and entry.is_dir())
            folders += [entry for entry in below if not entry.is_symlink()]
            links += [entry for entry in below if entry.is_symlink()]
    return list(found.values())


def files_in(folder: Path) -> list[Path]:
    entries = [entry for entry in folder.iterdir() if not is_hidden(Path(entry.name))]
    for entry in entries:
        if not entry.exists():
            raise ValueError(f'data: {shown(entry)} is a link to a file or folder that is not there')
    return [entry for entry in entries if entry.is_file()]


def expand_glob(pattern: Path) -> list[str]:
    """What a glob matches, in which a folder that exists stands for itself, and `**` for each folder once."""
    anchor = next((parent for parent in pattern.parents if parent.is_dir()), Path())
    parts = pattern.parts[len(anchor.parts) :]
    places = [str(anchor)]
    while '**' in parts:
        before, parts = parts[: parts.index('**')], parts[parts.index('**') + 1 :]
        tops = [Path(top) for place in places for top in glob.glob(os.path.join(glob.escape(place), *before))]
        places = [str(folder) for top in tops if top.is_dir() for folder in folders_below(top)]
        parts = parts or ('*',)
    return [match for place in places for match in glob.glob(os.path.join(glob.escape(place), *parts))]


def standard_library() -> list[Path]:
    """The source files of this Python's standard library: text that every machine has."""
    root = Path(sysconfig.get_path('stdlib'))
    installed = {'site-packages', 'dist-packages'}
    return sorted(file for file in root.rglob('*.py') if not installed & set(file.relative_to(root).parts))


# fetch


def fetch(
    download: Download, path: Path, *, timeout: float = 5.0, progress: Callable[[int], object] | None = None
) -> Path:
    """Downloads to `path`, which appears only once size and SHA-256 are right.

    What a broken transfer left behind in `path`.part is gone on from, or begun anew where the server cannot.
    `progress` is called with the number of bytes of each piece that arrives, and of what was there before.

    Raises OSError where there is no connection within `timeout` seconds, where it breaks, or where what arrived is
    not what was asked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.part')
    broken: Exception | None = None
    if progress and partial.exists():
        progress(partial.stat().st_size)

    # as long as each attempt brings bytes, a broken transfer is worth going on with
    while (have := partial.stat().st_size if partial.exists() else 0) < download.size:
        try:
            transfer(download, partial, have, timeout=timeout, progress=progress)
        except urllib.error.URLError as error:
            raise OSError(f'{download.url} could not be fetched: {error}') from error
        except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
            broken = error
        if not partial.exists() or partial.stat().st_size <= have:
            got = partial.stat().st_size if partial.exists() else 0
            raise OSError(
                f'{download.url} broke off after {got:,} of {download.size:,} bytes; fetch again to go on'
            ) from broken

    digest = file_digest(partial)
    if have != download.size or digest != download.sha256:
        # thrown away, so that the next try begins anew
        partial.unlink()
        raise OSError(
            f'{download.url} is not the file it should be: {have:,} bytes with SHA-256 {digest}, '
            f'not {download.size:,} with {download.sha256}'
        )
    os.replace(partial, path)
    return path


def transfer(
    download: Download, partial: Path, have: int, *, timeout: float, progress: Callable[[int], object] | None
) -> None:
    """Appends to the `have` bytes of `partial`, or begins anew where the server knows no ranges."""
    request = urllib.request.Request(download.url, headers={'Range': f'bytes={have}-'} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        resumes = response.status == http.client.PARTIAL_CONTENT
        length = response.headers.get('Content-Length')
        expected = download.size - have if resumes else download.size
        if length is not None and int(length) != expected:
            # a login page, say: better nothing than a beginning that is not the file's
            raise OSError(
                f'{download.url} offers {int(length):,} bytes, not {expected:,}: it is not the file it should be'
            )
        with open(partial, 'ab' if resumes else 'wb') as file:
            # one byte too many is enough to know that it is not the file
            while file.tell() <= download.size and (piece := response.read1(CHUNK)):
                file.write(piece)
                if progress:
                    progress(len(piece))


def file_digest(path: Path, algorithm: str = 'sha256') -> str:
    digest = hashlib.new(algorithm)
    with open(path, 'rb') as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


# read


def map_file(path: Path, dtype: torch.dtype) -> Tensor:
    """A file as a tensor whose pages are read as they are needed. Writing to it ends the process."""
    with open(path, 'rb') as file:
        # not torch.from_file: a map that could be written to needs as much memory as the file is long
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The given buffer is not writable')
        return torch.frombuffer(mapped, dtype=dtype)


class TruncatedError(ValueError):
    """A file that no longer has the bytes that it had."""

    def __str__(self) -> str:
        # what a data loader's worker hands on is its traceback, which ends with the message
        last = super().__str__().strip().splitlines()[-1]
        return last[max(last.find('data: '), 0) :]


def read_at(file: int, size: int, start: int) -> bytes:
    if hasattr(os, 'pread'):
        return os.pread(file, size, start)
    with SEEKING:
        os.lseek(file, start, os.SEEK_SET)
        return os.read(file, size)


class Corpus:
    """The bytes of one or several files, and where the texts in them end. `corpus[start:stop]` is uint8.

    The bytes are read from the disk as they are needed. They are not mapped: where a mapped file is truncated, the
    system ends the process. Pickled, for the workers of a data loader, a corpus is its path alone.

    Args:
        name: what it is called. Bytes of it that are not UTF-8 are written as escapes.
        path: the file with the bytes.
        ends_path: a file of int64 with the position after the last byte of each text. Without one, all is one text.
    """

    def __init__(self, name: str, path: Path, ends_path: Path | None = None) -> None:
        self.name, self.path, self.ends_path = shown(name), path, ends_path
        self.file = os.open(path, os.O_RDONLY | getattr(os, 'O_BINARY', 0))
        weakref.finalize(self, os.close, self.file)
        if ends_path is not None:
            # so that nobody removes it from the cache
            lock(self.file, shared=True)
        self.size = os.fstat(self.file).st_size
        self.ends = torch.tensor([self.size]) if ends_path is None else map_file(ends_path, torch.int64)
        """`(texts,)`, int64, rising: the position after the last byte of each text."""

    def __reduce__(self) -> Any:
        return Corpus, (self.name, self.path, self.ends_path)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, step = span.indices(self.size)
        buffer = bytearray(max(stop - start, 0))
        self.read_into(memoryview(buffer), start)
        return (torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8))[::step]

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fills `buffer` with the bytes from `start` on. Raises ValueError where the file no longer has them."""
        filled = 0
        while filled < len(buffer):
            piece = read_at(self.file, len(buffer) - filled, start + filled)
            if not piece:
                size = os.fstat(self.file).st_size
                raise TruncatedError(
                    f'data: {shown(self.path)} was truncated while it was read: '
                    f'it had {self.size:,} bytes, and has {size:,}'
                )
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)

    def read(self, start: Tensor, stop: Tensor, length: int, *, pad: int) -> Tensor:
        """The `length` bytes from each start `(rows,)` on: int64 `(rows, length)`, `pad` from each stop `(rows,)` on.

        Raises ValueError where the file no longer has them.
        """
        buffer = bytearray(len(start) * length)
        rows = memoryview(buffer)
        for row, (begin, count) in enumerate(zip(start.tolist(), (stop - start).tolist(), strict=True)):
            self.read_into(rows[row * length : row * length + max(min(count, length), 0)], begin)
        ids = torch.frombuffer(buffer, dtype=torch.uint8).view(len(start), length).long()
        return ids.masked_fill_(torch.arange(length) >= (stop - start)[:, None], pad)

    def fingerprint(self) -> str:
        """What tells it from another corpus: its size, and a digest of it and of where its texts end.

        Of more than `FINGERPRINT` bytes, samples from all over are digested.
        """
        digest = hashlib.sha256()
        for path in filter(None, (self.path, self.ends_path)):
            size = path.stat().st_size
            step = CHUNK if size <= FINGERPRINT else size * CHUNK // FINGERPRINT
            with open(path, 'rb') as file:
                for begin in range(0, size, step):
                    file.seek(begin)
                    digest.update(file.read(CHUNK))
        return f'{len(self)}:{digest.hexdigest()[:32]}'


def load_corpus(name: str, files: Sequence[Path], cache_dir: Path, *, text_key: str = 'text') -> Corpus:
    """The texts of all files, one after the other.

    A single plain file is read where it lies. Others are unpacked once, into a folder of `cache_dir` whose name changes
    with them. A text is a file, a member of an archive, or a row's column `text_key` in a .jsonl or .parquet.

    Raises ValueError where a file is broken, changes while it is unpacked or is of a format that is not read, or where
    all hold no byte.
    """
    if len(files) == 1 and kind_of_file(files[0]) is None:
        check_bytes(files, os.path.getsize(files[0]))
        return Corpus(name, files[0])
    folder = cache_dir / cache_key(files, text_key)
    try:
        return open_unpacked(name, files, folder, text_key)
    except OSError as error:
        if error.filename is not None:
            raise
        # a disk that is full or broken, of which the system names no file
        raise OSError(f'data: {all_shown(files)} could not be unpacked to {cache_dir}: {error}') from error


def check_bytes(files: Sequence[Path], size: int) -> None:
    if not size:
        raise ValueError(f'data: {all_shown(files)} hold no byte')


def all_shown(files: Sequence[Path]) -> str:
    return shown(files[0]) + (' and the files beside it' if len(files) > 1 else '')


def cache_key(files: Sequence[Path], text_key: str) -> str:
    """The name of the folder that these files are unpacked to. It changes with each of them."""
    facts = [file_facts(file) for file in files]
    return hashlib.sha256(repr((facts, text_key)).encode()).hexdigest()[:16]


def file_facts(path: Path) -> tuple[object, ...]:
    """What changes when a file is written or replaced, even by one of the same size and time."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        stat = os.fstat(file.fileno())
        digest.update(file.read(SAMPLE))
        file.seek(max(stat.st_size - SAMPLE, 0))
        digest.update(file.read(SAMPLE))
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return os.path.realpath(path), stat.st_size, *times, stat.st_ino, digest.hexdigest()


# the cache: a folder for each unpacked corpus, with its bytes and the ends of its texts


def lock(file: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks an open file or folder until it is closed. False where another process has it, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, mode: int, *, wait: bool) -> Iterator[bool]:
    """Whether a file or folder is locked, for as long as the context lasts."""
    try:
        file = os.open(path, mode)
    except OSError:
        # not every system opens folders
        yield False
        return
    try:
        yield lock(file, wait=wait)
    finally:
        os.close(file)


def open_unpacked(name: str, files: Sequence[Path], folder: Path, text_key: str) -> Corpus:
    """The corpus in that folder of the cache, which is unpacked where it is not there."""
    while True:
        if not is_whole(folder):
            unpack(files, folder, text_key)
        try:
            corpus = Corpus(name, folder / 'bytes', folder / 'ends')
        except FileNotFoundError:
            # another process removed it before it was held
            continue
        with contextlib.suppress(OSError):
            # what was used last stays longest
            os.utime(corpus.path)
        return corpus


def is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has bytes up to the end of its last text."""
    try:
        with open(folder / 'ends', 'rb') as ends:
            ends.seek(-8, os.SEEK_END)
            return int.from_bytes(ends.read(), sys.byteorder) == (folder / 'bytes').stat().st_size
    except OSError:
        return False


def unpack(files: Sequence[Path], folder: Path, text_key: str) -> None:
    """Writes the texts of all files to `folder`, which appears whole."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f'{UNFINISHED}{uuid.uuid4().hex}'
    with contextlib.ExitStack() as stack:
        stack.callback(remove_folder, unfinished)
        # nobody tidies between the making of the folder and its own lock
        with locked(cache, os.O_RDONLY, wait=True) as alone:
            if alone:
                tidy(cache)
            unfinished.mkdir()
            to = stack.enter_context(open(unfinished / 'bytes', 'wb'))
            lock(to.fileno())
        with open(unfinished / 'ends', 'wb') as ends:
            texts = Texts(to, ends, text_key)
            for source in files:
                texts.add_file(source)
            check_bytes(files, to.tell())
            if cache_key(files, text_key) != folder.name:
                raise ValueError(f'data: {all_shown(files)} changed during unpacking: try again')
            for file in (to, ends):
                file.flush()
                os.fsync(file.fileno())
        with locked(cache, os.O_RDONLY, wait=True):
            # not every system renames folders of open files
            to.close()
            if not is_whole(folder):
                remove_folder(folder)
                try:
                    os.rename(unfinished, folder)
                except OSError:
                    # without locks, another process may be quicker
                    if not is_whole(folder):
                        raise


def remove_folder(folder: Path) -> None:
    """Removes a folder of the cache, and nothing that the cache did not put there."""
    with contextlib.suppress(OSError):
        for name in ('bytes', 'ends'):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def remove_unused(folder: Path) -> bool:
    """Removes a folder of the cache unless a process holds it. Returns whether it did."""
    if not (folder / 'bytes').exists():
        remove_folder(folder)
        return True
    # some disks lock for one process alone only what it may write
    with locked(folder / 'bytes', os.O_RDWR, wait=False) as alone:
        if alone:
            remove_folder(folder)
        return alone


def tidy(cache: Path) -> None:
    """Removes what no process holds: what was left unfinished, and of the rest those used longest ago, until
    `CACHE_LIMIT` bytes or less are left. The caller has locked `cache`.
    """
    sizes, used = {}, {}
    for path in cache.iterdir():
        with contextlib.suppress(OSError):
            if OLD_ENTRY.fullmatch(path.name):
                path.unlink()
            elif OLD_UNFINISHED.fullmatch(path.name):
                # these were not locked, but written to all the time
                if (path / 'bytes').stat().st_mtime < time.time() - DAY:
                    remove_unused(path)
            elif ENTRY.fullmatch(path.name) and is_whole(path):
                stats = [(path / name).stat() for name in ('bytes', 'ends')]
                sizes[path], used[path] = sum(stat.st_size for stat in stats), stats[0].st_mtime_ns
            elif ENTRY.fullmatch(path.name) or path.name.startswith(UNFINISHED):
                remove_unused(path)
    total = sum(sizes.values())
    for path in sorted(used, key=lambda path: used[path]):
        if total > CACHE_LIMIT and remove_unused(path):
            total -= sizes[path]


def load_download(
    name: str, folder: Path, cache_dir: Path, *, progress: Callable[[int], object] | None = None
) -> Corpus:
    """One of `DOWNLOADS`, from `folder` where it lies there as it is or as .zip or .gz, else fetched into it.

    Raises OSError where it cannot be had, ValueError where what lies there is another file.
    """
    download = DOWNLOADS[name]
    places = [folder / f'{name}{suffix}' for suffix in ('', '.zip', '.gz')]
    path = next((place for place in places if place.is_file()), None)
    path = path or fetch(download, folder / f'{name}.zip', progress=progress)
    corpus = load_corpus(name, [path], cache_dir)

    algorithm, _, expected = download.content.partition(':')
    if len(corpus) != download.content_size:
        raise ValueError(f'data: {path} has {len(corpus):,} bytes; {name} has {download.content_size:,}, so it is torn')
    if (digest := file_digest(corpus.path, algorithm)) != expected:
        raise ValueError(f'data: {path} is not {name}: its {algorithm} is {digest}, not {expected}')
    return corpus
