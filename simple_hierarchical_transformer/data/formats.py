"""File formats: detection, and streams of the contents of compressed files and tars.

The first bytes of a file decide its format. The suffix decides if they match no format.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import ModuleType
from typing import IO, TYPE_CHECKING, Protocol

from ..terminal import printable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

try:
    # Python 3.14 or newer.
    from compression import zstd
except ImportError:
    zstd = None

CHUNK = 1 << 16
HEAD = 512  # bytes that identify a format: one block of a tar

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
    """A file is damaged, or has an unsupported format."""


class Readable(Protocol):
    """A binary stream that can be read from."""

    def read(self, size: int, /) -> bytes: ...


class Decompressor(Protocol):
    """The interface that the decompressors of bz2, lzma and zstd share."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def display_name(name: str | PurePath) -> str:
    """Returns a file's name as text that can be printed and stored. Bytes that are not UTF-8 become escapes."""
    return printable(str(name))


def display_names(files: Sequence[Path]) -> str:
    """Returns a short text for all of these files, for use in messages."""
    return display_name(files[0]) + (' and the files beside it' if len(files) > 1 else '')


def is_hidden(path: PurePath) -> bool:
    """Returns whether a path in a folder or an archive is hidden, or is an entry that macOS adds to archives."""
    return any(part == '__MACOSX' or (part.startswith('.') and part != '..') for part in path.parts)


def kind_of(head: bytes, name: str) -> str | None:
    """Returns a file's format from its first `HEAD` bytes and its name.

    The format is an element of `KINDS`, or None for plain text.
    """
    for kind, magic in MAGIC.items():
        if re.match(magic, head, re.DOTALL):
            return kind
    try:
        # Succeeds if the checksum of the header is right.
        tarfile.TarInfo.frombuf(head, 'utf-8', 'surrogateescape')
        return '.tar'
    except tarfile.TarError:
        suffix = PurePath(name).suffix.lower()
        kind = ALIASES.get(suffix, suffix)
        return kind if kind in KINDS else None


def kind_of_file(path: Path) -> str | None:
    """Returns the format of a file on the disk, as `kind_of` does."""
    with open(path, 'rb') as file:
        return kind_of(file.read(HEAD), path.name)


def inner_name(name: str) -> str:
    """Returns the name of the contents of a compressed file: `a.jsonl` for `a.jsonl.gz`, `a.tar` for `a.tgz`."""
    suffix = PurePath(name).suffix
    if suffix.lower() in TARS:
        return name.removesuffix(suffix) + '.tar'
    return name.removesuffix(suffix) if ALIASES.get(suffix.lower(), suffix.lower()) in STREAMS else name


@contextmanager
def named_errors(name: str, kind: str) -> Iterator[None]:
    """Converts the errors that a format's reader raises for damaged files to `UnreadableError`."""
    try:
        yield
    except (UnreadableError, MemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        # zipfile raises these for passwords and for unknown compression methods.
        raise UnreadableError(f'data: {name} cannot be unpacked: {error}') from error
    except Exception as error:
        # An errno means that the disk failed, not the format. The exception is EINVAL: a damaged file can make its
        # reader seek to a negative position.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UnreadableError(f'data: {name} is damaged, or not a {kind} file: {error}') from error


class NamedStream(io.RawIOBase):
    """A stream whose errors name the file. A read returns fewer bytes than asked for only at the end of the stream."""

    def __init__(self, file: Readable, name: str, kind: str) -> None:
        self.file, self.name, self.kind = file, name, kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        filled = 0
        with named_errors(self.name, self.kind):
            while filled < len(view) and (piece := self.file.read(len(view) - filled)):
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
        return filled


class Decompressed:
    """The contents of concatenated compressed streams.

    Reading raises an error if anything but another stream follows a stream. `bz2.open` and `lzma.open` ignore that.
    """

    def __init__(self, file: Readable, make: Callable[[], Decompressor]) -> None:
        self.file, self.make, self.stream = file, make, make()

    def read(self, size: int, /) -> bytes:
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
    """A member of a tar. Raises ReadError for a damaged header, which tarfile takes for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(str(error)) from error


class Tar(tarfile.TarFile):
    """A tar that is read as a stream."""

    tarinfo = Member
    members: list[tarfile.TarInfo]

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while member := self.next():
            yield member
            # TarFile keeps all members that it has read.
            self.members.clear()


def import_pyarrow(name: str, kind: str) -> ModuleType:
    """Returns the module pyarrow. If it is missing, raises `UnreadableError`, which names the file that needs it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UnreadableError(f'data: {name} is a {kind} file, which pyarrow reads: pip install pyarrow') from error
    return pyarrow


def decompress(file: IO[bytes], name: str, kind: str) -> Readable:
    """Returns a stream of the decompressed contents of `file`, whose format is one of `STREAMS`."""
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
