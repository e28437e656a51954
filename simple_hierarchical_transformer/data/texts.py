"""The texts of a file: the whole file, or one for each member of an archive and each row of a table."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO

from .formats import (
    CHUNK,
    HEAD,
    REFUSED,
    STREAMS,
    NamedStream,
    Tar,
    UnreadableError,
    decompress,
    display_name,
    import_pyarrow,
    inner_name,
    is_hidden,
    kind_of,
    named_errors,
)

MAX_LAYERS = 8
MAX_ROW = 1 << 28
# A table is refused if none of this many first rows has the wanted column.
ROWS_WITHOUT_COLUMN = 1000


def jsonl_rows(file: IO[bytes], name: str, key: str) -> Iterator[tuple[object, list[str]]]:
    """Yields each row's value in the column `key`, None if it has none, and the names of its columns."""
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


def parquet_rows(file: IO[bytes], name: str, key: str) -> Iterator[tuple[object, list[str]]]:
    """Yields each row's value in the column `key`, and the names of the columns."""
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
        # pyarrow raises many kinds of errors for damaged files.
        raise UnreadableError(f'data: {name} cannot be read: {error}') from error


def table_texts(rows: Iterator[tuple[object, list[str]]], name: str, key: str) -> Iterator[bytes]:
    """Yields the texts of a table's rows, in order. Rows without a text are skipped."""
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
        there = display_name(', '.join(columns))
        raise UnreadableError(f'data: {name} cannot be read: there is no column {key!r}, only {there:.200}')


@dataclass
class TextWriter:
    """Writes the texts of files, one after the other.

    A plain file, a plain member of an archive and a row of a table are one text each.
    """

    output: IO[bytes]
    """The file on the disk that receives the bytes."""
    ends: IO[bytes]
    """Receives the position after each text, int64 in native byte order."""
    text_key: str
    """The column of a table that holds the text."""

    def add_file(self, path: Path) -> None:
        """Appends the texts of a file. Raises ValueError if it is damaged, or has an unsupported format."""
        with open(path, 'rb') as file:
            name = display_name(path)
            self.add(NamedStream(file, name, 'plain'), name, path.name, 0, file)

    def end_text(self) -> None:
        self.ends.write(self.output.tell().to_bytes(8, sys.byteorder))

    def add(self, stream: NamedStream, name: str, base: str, layers: int, file: IO[bytes] | None = None) -> None:
        """Appends the texts of a stream.

        Args:
            stream: the stream to read.
            name: its name in messages.
            base: the name whose suffix may tell its format.
            layers: the number of compressed files and archives around it.
            file: the seekable file that `stream` reads, if there is one.
        """
        if layers > MAX_LAYERS:
            raise UnreadableError(f'data: {name} is packed in more than {MAX_LAYERS} layers')
        source = io.BufferedReader(stream, CHUNK)
        head = source.peek(HEAD)[:HEAD]
        kind = kind_of(head, base)
        if kind in REFUSED:
            raise UnreadableError(f'data: {name} is packed as {kind}, which is not supported: unpack it first')
        if kind is None:
            shutil.copyfileobj(source, self.output, CHUNK)
            self.end_text()
        elif kind == '.jsonl':
            self.add_rows(jsonl_rows(source, name, self.text_key), name)
        elif not head:
            raise UnreadableError(f'data: {name} is damaged, or not a {kind} file: it is empty')
        elif kind == '.tar':
            self.add_tar(source, name, layers)
        elif kind in STREAMS:
            self.add(NamedStream(decompress(source, name, kind), name, kind), name, inner_name(base), layers + 1)
        else:
            # The directory of .zip and .parquet is at the end of the file.
            with self.seekable(source, file) as whole:
                if kind == '.zip':
                    self.add_zip(whole, name, layers)
                else:
                    self.add_rows(parquet_rows(whole, name, self.text_key), name)

    @contextmanager
    def seekable(self, source: IO[bytes], file: IO[bytes] | None) -> Iterator[IO[bytes]]:
        """Yields `file` from its start, or a temporary copy of `source` if there is no file."""
        if file is not None:
            file.seek(0)
            yield file
            return
        with tempfile.TemporaryFile(dir=Path(self.output.name).parent) as whole:
            shutil.copyfileobj(source, whole, CHUNK)
            whole.seek(0)
            yield whole

    def add_rows(self, rows: Iterator[tuple[object, list[str]]], name: str) -> None:
        for text in table_texts(rows, name, self.text_key):
            self.output.write(text)
            self.end_text()

    def add_zip(self, file: IO[bytes], name: str, layers: int) -> None:
        """Appends the members in the order of their names. Members of the same name keep the order of the archive."""
        with named_errors(name, '.zip'), zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if not member.is_dir() and not is_hidden(path := PurePath(member.filename)):
                    with archive.open(member) as packed:
                        self.add_member(packed, path, name, '.zip', layers)

    def add_tar(self, file: IO[bytes], name: str, layers: int) -> None:
        """Appends the members in the order of the archive."""
        with named_errors(name, '.tar'), Tar.open(fileobj=file, mode='r|') as archive:
            for member in archive:
                packed = archive.extractfile(member) if member.isreg() else None
                if packed is not None and not is_hidden(path := PurePath(member.name)):
                    self.add_member(packed, path, name, '.tar', layers)

    def add_member(self, packed: IO[bytes], path: PurePath, archive: str, kind: str, layers: int) -> None:
        stream = NamedStream(packed, archive, kind)
        self.add(stream, f'{archive}/{display_name(path)}', path.name, layers + 1)
