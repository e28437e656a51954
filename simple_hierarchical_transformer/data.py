"""Byte corpora: find, fetch, verify, read.

A corpus lies on disk and is memory-mapped, so it may be larger than memory.
"""

from __future__ import annotations

import array
import bz2
import glob
import gzip
import hashlib
import http.client
import lzma
import mmap
import os
import shutil
import sysconfig
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

CHUNK = 1 << 20
FINGERPRINT = 1 << 28
OPENERS = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
# rows of text, read through the datasets package
TABLES = {'.jsonl': 'json', '.jsonl.gz': 'json', '.jsonl.bz2': 'json', '.jsonl.xz': 'json', '.parquet': 'parquet'}


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
    """The files that `source`, a file, a folder or a glob, stands for, sorted by path.

    A folder means every file below it whose path has no hidden part.

    Raises ValueError where there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (file for file in path.rglob('*') if file.is_file())
        files = [file for file in below if not any(part.startswith('.') for part in file.relative_to(path).parts)]
        kind = 'a folder without files'
    else:
        files = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
        kind = 'no file, no folder, and matches none as a glob'
    if not files:
        raise ValueError(f'data: {source} is {kind}')
    return sorted(files)


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


def copy_bytes(path: Path, to: IO[bytes]) -> None:
    """Appends a file's bytes, unpacked, and of a .zip those of all its members.

    Raises ValueError where the file is torn, or has rows of text that would be taken for text.
    """
    if path.name.lower().endswith('.jsonl.zip'):
        raise ValueError(f'data: {path} has to be unpacked first: tables are read plain, or as .gz, .bz2 or .xz')
    try:
        if path.suffix.lower() == '.zip':
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.namelist()):
                    with archive.open(member) as file:
                        shutil.copyfileobj(file, to, CHUNK)
        else:
            opener: Any = OPENERS.get(path.suffix.lower(), open)
            with opener(path, 'rb') as file:
                shutil.copyfileobj(file, to, CHUNK)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f'data: {path} is torn, or not a {path.suffix} file: {error}') from error
    except (RuntimeError, NotImplementedError) as error:
        # what zipfile says of passwords and of methods that it does not know
        raise ValueError(f'data: {path} cannot be unpacked: {error}') from error
    except OSError as error:
        # what bz2 raises for bytes that are not its own has no errno, unlike a full disk
        if error.errno is None:
            raise ValueError(f'data: {path} is torn, or not a {path.suffix} file: {error}') from error
        raise


def table_kind(path: Path) -> str | None:
    """How the datasets package calls a file of rows, or None where it is none."""
    return next((kind for suffix, kind in TABLES.items() if path.name.lower().endswith(suffix)), None)


def table_texts(path: Path, text_key: str) -> Iterator[bytes]:
    """The texts of a table's rows, in order; rows without one are left out.

    Raises ValueError where the datasets package is missing, the file broken, or the column not there.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f'data: {path} is read through the datasets package: pip install datasets') from error
    try:
        # streamed: no second copy in that package's own cache
        for row in load_dataset(table_kind(path), data_files=str(path), split='train', streaming=True):
            if text_key not in row:
                raise KeyError(f'there is no column {text_key!r}, only {", ".join(row)}')
            text = row[text_key]
            if text is not None and not isinstance(text, (str, bytes)):
                raise TypeError(f'column {text_key!r} holds {type(text).__name__}, not text')
            if text:
                yield text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass')
    except Exception as error:
        # whatever that package and those below it raise for broken files
        raise ValueError(f'data: {path} cannot be read: {error}') from error


def map_file(path: Path, dtype: torch.dtype) -> Tensor:
    """A file as a tensor that pages of it are read into as they are needed. Writing to it ends the process."""
    with open(path, 'rb') as file:
        # not torch.from_file: a map that could be written to needs as much memory as the file is long
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The given buffer is not writable')
        return torch.frombuffer(mapped, dtype=dtype)


class Corpus:
    """The bytes of one or several files, memory-mapped, and where the texts in them end.

    Pickled, for the workers of a data loader, it is its path alone.
    """

    def __init__(self, name: str, path: Path, ends_path: Path | None = None) -> None:
        self.name, self.path, self.ends_path = name, path, ends_path
        self.data = map_file(path, torch.uint8)
        """`(bytes,)`, uint8, to be read only."""
        self.ends = torch.tensor([len(self.data)]) if ends_path is None else map_file(ends_path, torch.int64)
        """`(texts,)`, int64, rising: the position after the last byte of each text."""

    def __reduce__(self) -> Any:
        return Corpus, (self.name, self.path, self.ends_path)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: Tensor, stop: Tensor, length: int, *, pad: int) -> Tensor:
        """What stands in `length` bytes from each start `(rows,)` on: int64 `(rows, length)`, `pad` from stop on."""
        index = start[:, None] + torch.arange(length)
        outside = index >= stop[:, None]
        return self.data[index.clamp(max=len(self) - 1)].long().masked_fill(outside, pad)

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

    A single plain file is mapped where it lies. Others are unpacked into one file in `cache_dir`, under a name that
    changes with them. A text is a file, or a row's column `text_key` in a .jsonl or .parquet.

    Raises ValueError where they are torn or hold no byte.
    """
    path, ends_path = files[0], None
    if len(files) > 1 or path.suffix.lower() in (*OPENERS, '.zip') or table_kind(path):
        stats = [(str(file.resolve()), file.stat()) for file in files]
        facts = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
        key = hashlib.sha256(repr((facts, text_key if any(map(table_kind, files)) else None)).encode()).hexdigest()
        path, ends_path = cache_dir / f'{key[:16]}.bytes', cache_dir / f'{key[:16]}.ends'
        if not path.exists():
            unpack(files, path, ends_path, text_key)

    if path.stat().st_size == 0:
        raise ValueError(f'data: {files[0]}{" and the files beside it" * (len(files) > 1)} hold no byte')
    return Corpus(name, path, ends_path)


def unpack(files: Sequence[Path], path: Path, ends_path: Path, text_key: str) -> None:
    """Writes the bytes of all texts to `path`, which appears last and whole, and their ends to `ends_path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        ends = array.array('q')
        with open(Path(folder, 'bytes'), 'wb') as file:
            for source in files:
                if table_kind(source):
                    for text in table_texts(source, text_key):
                        file.write(text)
                        ends.append(file.tell())
                else:
                    copy_bytes(source, file)
                    ends.append(file.tell())
        Path(folder, 'ends').write_bytes(ends)
        os.replace(Path(folder, 'ends'), ends_path)
        os.replace(Path(folder, 'bytes'), path)


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
