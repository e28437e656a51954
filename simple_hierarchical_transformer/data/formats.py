"""What files hold: plain text, packed text, archives of files, and tables with one text a row.

The first bytes of a file decide what it is, and its suffix where they say nothing.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import itertools
import json
import lzma
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from ..terminal import printable

try:
    # of Python 3.14
    from compression import zstd
except ImportError:
    zstd = None

CHUNK = 1 << 16
HEAD = 512  # bytes that tell formats apart: one block of a tar
MAX_LAYERS = 8
MAX_ROW = 1 << 28
# a table of whose first rows none has the wanted column is not read to its end
ROWS_WITHOUT_COLUMN = 1000

MAGIC = {
    '.gz': rb'\x1f\x8b\x08',
    '.bz2': rb'BZh[1-9](?:1AY&SY|\x17rE8P\x90)',
    '.xz': rb'\xfd7zXZ\x00',
    '.lzma': rb'\x5d\x00\x00..(?:\xff{8}|.{5}\x00{3})',
    '.zst': rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18',
    '.lz4': rb'\x04\x22\x4d\x18',
    '.zip': rb'PK(?:\x03\x04|\x05\x06|\x07\x08)',
    '.parquet': rb'PAR1\x15',
    '.7z': rb'7z\xbc\xaf\x27\x1c',
    '.rar': rb'Rar!\x1a\x07',
    '.lz': rb'LZIP\x01',
    '.lzo': rb'\x89LZO\x00\r\n\x1a\n',
    '.z': rb'\x1f\x9d[\x89-\x90]',
    '.cab': rb'MSCF\x00{4}',
}
STREAMS = {'.gz', '.bz2', '.xz', '.lzma', '.zst', '.lz4'}
REFUSED = {'.7z', '.rar', '.lz', '.lzo', '.z', '.cab', '.br', '.arj', '.ace', '.lzh', '.zpaq'}
TARS = {'.tgz': '.gz', '.tbz': '.bz2', '.tbz2': '.bz2', '.txz': '.xz', '.tzst': '.zst'}
ALIASES = {**TARS, '.zstd': '.zst', '.ndjson': '.jsonl'}
KINDS = {*MAGIC, *REFUSED, '.tar', '.jsonl'}


class UnreadableError(ValueError):
    """A file that is broken, or of a format that is not read."""


def shown(name: str | PurePath) -> str:
    """A file's name as text that can be printed and stored: bytes of it that are not UTF-8 are written as escapes."""
    return printable(str(name))


def is_hidden(path: PurePath) -> bool:
    """Whether a path below a folder or in an archive is left out: hidden, or what macOS adds to archives."""
    return any(part == '__MACOSX' or (part.startswith('.') and part != '..') for part in path.parts)


def kind_of(head: bytes, name: str) -> str | None:
    """A file's format, a key of `MAGIC`, `.tar` or `.jsonl`, by its first `HEAD` bytes and its name. None: plain."""
    for kind, magic in MAGIC.items():
        if re.match(magic, head, re.DOTALL):
            return kind
    try:
        # a block with a sum that is right
        tarfile.TarInfo.frombuf(head, 'utf-8', 'surrogateescape')
        return '.tar'
    except tarfile.TarError:
        suffix = PurePath(name).suffix.lower()
        kind = ALIASES.get(suffix, suffix)
        return kind if kind in KINDS else None


def kind_of_file(path: Path) -> str | None:
    with open(path, 'rb') as file:
        return kind_of(file.read(HEAD), path.name)


def inner_name(name: str) -> str:
    """`a.jsonl.gz` holds `a.jsonl`, and `a.tgz` holds `a.tar`."""
    suffix = PurePath(name).suffix
    if suffix.lower() in TARS:
        return name.removesuffix(suffix) + '.tar'
    return name.removesuffix(suffix) if ALIASES.get(suffix.lower(), suffix.lower()) in STREAMS else name


@contextmanager
def named_errors(name: str, kind: str) -> Iterator[None]:
    """Raises `UnreadableError` in place of what the readers of a format raise for broken files."""
    try:
        yield
    except (UnreadableError, MemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        # what zipfile says of passwords and of methods that it does not know
        raise UnreadableError(f'data: {name} cannot be unpacked: {error}') from error
    except Exception as error:
        # an error with a number is of the disk, not of the format; but that of a place before the file's beginning
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UnreadableError(f'data: {name} is torn, or not a {kind} file: {error}') from error


class Source(io.RawIOBase):
    """A stream whose errors name the file. Every read is filled up, so a buffer of it shows the whole head."""

    def __init__(self, file: Any, name: str, kind: str) -> None:
        self.file, self.name, self.kind = file, name, kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        with named_errors(self.name, self.kind):
            while filled < len(buffer) and (piece := self.file.read(len(buffer) - filled)):
                buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
        return filled


class Decompressed:
    """What compressed streams, one after the other, hold.

    Raises for whatever follows a stream and is none, which `bz2.open` and `lzma.open` drop without a word.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], Any]) -> None:
        self.file, self.make, self.stream = file, make, make()

    def read(self, size: int) -> bytes:
        while True:
            if self.stream.eof:
                rest = self.stream.unused_data.lstrip(b'\0')
                while not rest:
                    if not (rest := self.file.read(CHUNK)):
                        return b''
                    rest = rest.lstrip(b'\0')
                self.stream = self.make()
            else:
                rest = self.file.read(CHUNK) if self.stream.needs_input else b''
                if self.stream.needs_input and not rest:
                    raise EOFError('it ends before its end')
            if piece := self.stream.decompress(rest, size):
                return piece


class Member(tarfile.TarInfo):
    """One that is broken ends the reading of a tar with an error, where tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(str(error)) from error


def import_pyarrow(name: str, kind: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UnreadableError(f'data: {name} is a {kind} file, which pyarrow reads: pip install pyarrow') from error
    return pyarrow


def decompress(file: IO[bytes], name: str, kind: str) -> Any:
    """A stream of what a compressed stream holds."""
    if kind == '.gz':
        return gzip.GzipFile(fileobj=file)
    if kind == '.bz2':
        return Decompressed(file, bz2.BZ2Decompressor)
    if kind in ('.xz', '.lzma'):
        return Decompressed(file, lzma.LZMADecompressor)
    if kind == '.zst' and zstd is not None:
        return Decompressed(file, zstd.ZstdDecompressor)
    pyarrow = import_pyarrow(name, kind)
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode='r'), {'.zst': 'zstd', '.lz4': 'lz4'}[kind])


def jsonl_rows(file: IO[bytes], name: str, key: str) -> Iterator[tuple[Any, list[str]]]:
    """Of each row what it has in the column, None without one, and the names of its columns."""
    for number in itertools.count(1):
        if not (line := file.readline(MAX_ROW)):
            return
        try:
            if len(line) == MAX_ROW:
                raise ValueError(f'it is longer than {MAX_ROW:,} bytes')
            text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            if not text.strip():
                continue
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f'it is a {type(row).__name__}, not an object')
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f'data: {name} cannot be read: row {number:,}: {error}') from error
        yield row.get(key), list(row)


def parquet_rows(file: IO[bytes], name: str, key: str) -> Iterator[tuple[Any, list[str]]]:
    pyarrow = import_pyarrow(name, '.parquet')
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=CHUNK)
        columns = table.schema_arrow.names
        if key not in columns:
            yield None, columns
            return
        for batch in table.iter_batches(batch_size=256, columns=[key]):
            for text in batch.column(key).to_pylist():
                yield text, columns
    except Exception as error:
        # whatever pyarrow raises for broken files
        raise UnreadableError(f'data: {name} cannot be read: {error}') from error


def table_texts(rows: Iterator[tuple[Any, list[str]]], name: str, key: str) -> Iterator[bytes]:
    """The texts of a table's rows, in order; rows without one are left out."""
    found = False
    columns: list[str] | None = None
    for number, (text, names) in enumerate(rows):
        found = found or key in names
        columns = columns or names
        if not found and number >= ROWS_WITHOUT_COLUMN:
            break
        if text is not None and not isinstance(text, (str, bytes)):
            raise UnreadableError(f'data: {name} cannot be read: column {key!r} holds {type(text).__name__}, not text')
        if text:
            yield text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass')
    if columns is not None and not found:
        there = shown(', '.join(columns))
        raise UnreadableError(f'data: {name} cannot be read: there is no column {key!r}, only {there:.200}')


@dataclass
class Texts:
    """Writes the texts of files one after the other: a plain file, a member of an archive and a table's row are one."""

    to: IO[bytes]
    """Takes the bytes. A file on a disk."""
    ends: IO[bytes]
    """Takes the position after each text, int64."""
    text_key: str

    def add_file(self, path: Path) -> None:
        """Raises ValueError where the file is broken, or of a format that is not read."""
        with open(path, 'rb') as file:
            name = shown(path)
            self.add(Source(file, name, 'plain'), name, path.name, 0)

    def end(self) -> None:
        self.ends.write(self.to.tell().to_bytes(8, sys.byteorder))

    def add(self, stream: Source, name: str, base: str, layers: int) -> None:
        """Appends the texts of a stream that was packed in that many layers.

        `name` is for messages, `base` for the suffix.
        """
        if layers > MAX_LAYERS:
            raise UnreadableError(f'data: {name} is packed in more than {MAX_LAYERS} layers')
        source = io.BufferedReader(stream, CHUNK)
        head = source.peek(HEAD)[:HEAD]
        kind = kind_of(head, base)
        if kind in REFUSED:
            raise UnreadableError(f'data: {name} is packed as {kind}, which is not read here: unpack it first')
        if kind is None:
            shutil.copyfileobj(source, self.to, CHUNK)
            self.end()
        elif kind == '.jsonl':
            self.add_rows(jsonl_rows(source, name, self.text_key), name)
        elif not head:
            raise UnreadableError(f'data: {name} is torn, or not a {kind} file: it is empty')
        elif kind == '.tar':
            self.add_tar(source, name, layers)
        elif kind in STREAMS:
            self.add(Source(decompress(source, name, kind), name, kind), name, inner_name(base), layers + 1)
        else:
            # these are read from their ends
            with self.seekable(stream, source, layers) as whole:
                if kind == '.zip':
                    self.add_zip(whole, name, layers)
                else:
                    self.add_rows(parquet_rows(whole, name, self.text_key), name)

    @contextmanager
    def seekable(self, stream: Source, source: IO[bytes], layers: int) -> Iterator[IO[bytes]]:
        if not layers:
            stream.file.seek(0)
            yield stream.file
            return
        with tempfile.TemporaryFile(dir=Path(self.to.name).parent) as whole:
            shutil.copyfileobj(source, whole, CHUNK)
            whole.seek(0)
            yield whole

    def add_rows(self, rows: Iterator[tuple[Any, list[str]]], name: str) -> None:
        for text in table_texts(rows, name, self.text_key):
            self.to.write(text)
            self.end()

    def add_zip(self, file: IO[bytes], name: str, layers: int) -> None:
        """Members in the order of their names; of one name, in that of the archive."""
        with named_errors(name, '.zip'), zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                path = PurePath(member.filename)
                if not member.is_dir() and not is_hidden(path):
                    with archive.open(member) as packed:
                        self.add(Source(packed, name, '.zip'), f'{name}/{shown(path)}', path.name, layers + 1)

    def add_tar(self, file: IO[bytes], name: str, layers: int) -> None:
        """Members in the order of the archive."""
        with named_errors(name, '.tar'), tarfile.open(fileobj=file, mode='r|', tarinfo=Member) as archive:
            while member := archive.next():
                path = PurePath(member.name)
                if member.isreg() and not is_hidden(path):
                    packed = Source(archive.extractfile(member), name, '.tar')
                    self.add(packed, f'{name}/{shown(path)}', path.name, layers + 1)
                # which would keep all of them
                archive.members.clear()  # type: ignore[attr-defined]
