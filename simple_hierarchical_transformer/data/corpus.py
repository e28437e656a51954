"""Byte corpora that are read from disk on demand, so that they may be larger than memory."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .cache import BYTES, ENDS, cache_key, check_not_empty, is_complete, lock, unpack
from .files import CHUNK
from .formats import display_name, display_names, kind_of_file

FINGERPRINT = 1 << 28
# Guards a seek and a read if the system cannot do both in one call.
SEEK_LOCK = threading.Lock()


def map_file(path: Path, dtype: torch.dtype) -> Tensor:
    """Returns a file as a 1-D tensor of `dtype` whose pages are read on demand. Writing to it ends the process."""
    with open(path, 'rb') as file:
        # Not torch.from_file: its writable map needs as much memory as the file has bytes.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The given buffer is not writable')
        return torch.frombuffer(mapped, dtype=dtype)


class TruncatedError(ValueError):
    """A file is shorter than when it was opened."""

    def __str__(self) -> str:
        # A data loader's worker passes on its whole traceback, which ends with the message.
        last = super().__str__().strip().splitlines()[-1]
        return last[max(last.find('data: '), 0) :]


def read_at(file: int, size: int, start: int) -> bytes:
    if hasattr(os, 'pread'):
        return os.pread(file, size, start)
    with SEEK_LOCK:
        os.lseek(file, start, os.SEEK_SET)
        return os.read(file, size)


class Corpus:
    """The bytes of one or several texts. `corpus[start:stop]` is a 1-D uint8 tensor.

    The bytes are read on demand. They are not memory-mapped, since the system ends a process whose mapped file is
    truncated. A pickled corpus, as a data loader's worker receives it, holds only paths.

    Args:
        name: the name in messages. Bytes of it that are not UTF-8 become escapes.
        path: the file with the bytes.
        ends_path: a file of int64 in native byte order, with the position after the last byte of each text. Without
            it, the whole corpus is one text.
    """

    def __init__(self, name: str, path: Path, ends_path: Path | None = None) -> None:
        self.name, self.path, self.ends_path = display_name(name), path, ends_path
        self.file = os.open(path, os.O_RDONLY | getattr(os, 'O_BINARY', 0))
        weakref.finalize(self, os.close, self.file)
        if ends_path is not None:
            # The corpus is in the cache, where other processes remove what is not locked.
            lock(self.file, shared=True)
        self.size = os.fstat(self.file).st_size
        self.ends = torch.tensor([self.size]) if ends_path is None else map_file(ends_path, torch.int64)
        """`(texts,)`, int64, ascending: the position after the last byte of each text."""

    def __reduce__(self) -> tuple[type[Corpus], tuple[str, Path, Path | None]]:
        return Corpus, (self.name, self.path, self.ends_path)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, step = span.indices(self.size)
        buffer = bytearray(max(stop - start, 0))
        self.read_into(memoryview(buffer), start)
        return (torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8))[::step]

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fills `buffer` with the bytes from position `start` on. Raises ValueError if the file was truncated."""
        filled = 0
        while filled < len(buffer):
            piece = read_at(self.file, len(buffer) - filled, start + filled)
            if not piece:
                size = os.fstat(self.file).st_size
                raise TruncatedError(
                    f'data: {display_name(self.path)} was truncated while it was read: '
                    f'it had {self.size:,} bytes, and has {size:,}'
                )
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)

    def read(self, start: Tensor, stop: Tensor, length: int, *, pad: int) -> Tensor:
        """Reads several spans of bytes.

        Args:
            start: `(rows,)`, the position of each row's first byte.
            stop: `(rows,)`, the position after each row's last byte.
            length: length of the rows returned. Longer spans are cut.
            pad: the id that follows a span shorter than `length`.

        Returns:
            Ids, int64 `(rows, length)`.

        Raises:
            ValueError: the file was truncated.
        """
        buffer = bytearray(len(start) * length)
        rows = memoryview(buffer)
        for row, (begin, count) in enumerate(zip(start.tolist(), (stop - start).tolist(), strict=True)):
            self.read_into(rows[row * length : row * length + max(min(count, length), 0)], begin)
        ids = torch.frombuffer(buffer, dtype=torch.uint8).view(len(start), length).long()
        return ids.masked_fill_(torch.arange(length) >= (stop - start)[:, None], pad)

    def fingerprint(self) -> str:
        """Returns a text that identifies the corpus: its size, and a digest of its bytes and of the ends of its texts.

        If it has more than `FINGERPRINT` bytes, evenly spaced samples are digested.
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
    """Loads the texts of all files, one after the other.

    A single plain file is read in place. Other files are unpacked once, into a folder of `cache_dir` whose name changes
    with them. A text is a plain file, a member of an archive, or the column `text_key` of a row of .jsonl or .parquet.

    Args:
        name: the name of the corpus in messages.
        files: the files to read, as `find_files` returns them.
        cache_dir: the folder for unpacked corpora.
        text_key: the column of a table that holds the text.

    Raises:
        ValueError: a file is damaged, changes while it is unpacked, or has an unsupported format; or all are empty.
        OSError: a file cannot be read, or the disk of `cache_dir` is full or broken.
    """
    if len(files) == 1 and kind_of_file(files[0]) is None:
        check_not_empty(files, os.path.getsize(files[0]))
        return Corpus(name, files[0])
    folder = cache_dir / cache_key(files, text_key)
    try:
        return open_unpacked(name, files, folder, text_key)
    except OSError as error:
        if error.filename is not None:
            raise
        # Errors of a full or broken disk do not name the file.
        raise OSError(f'data: {display_names(files)} could not be unpacked to {cache_dir}: {error}') from error


def open_unpacked(name: str, files: Sequence[Path], folder: Path, text_key: str) -> Corpus:
    """Opens the corpus in a folder of the cache. Unpacks it first if the folder is missing or incomplete."""
    while True:
        if not is_complete(folder):
            unpack(files, folder, text_key)
        try:
            corpus = Corpus(name, folder / BYTES, folder / ENDS)
        except FileNotFoundError:
            # Another process removed it before it was locked.
            continue
        with contextlib.suppress(OSError):
            # The cache keeps recently used corpora longest.
            os.utime(corpus.path)
        return corpus
