"""Byte corpora: find, fetch, verify, split, sample.

A corpus is a memory-mapped uint8 tensor, a split a range of its positions.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import sysconfig
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

CHUNK = 1 << 20
OPENERS = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
SPLITS = ('train', 'valid', 'test')


@dataclass(frozen=True)
class Download:
    """A file on the web, with what proves that it arrived whole."""

    url: str
    size: int
    sha256: str


ENWIK8_BYTES = 100_000_000

# the first 10^8 bytes of the English Wikipedia dump of 2006-03-03
ENWIK8 = Download(
    url='http://mattmahoney.net/dc/enwik8.zip',
    size=36_445_475,
    sha256='547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc',
)


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


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


# read


def copy_bytes(path: Path, to: IO[bytes]) -> None:
    """Appends a file's bytes, unpacked, and of a .zip those of all its members.

    Raises ValueError where the file is torn.
    """
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


def load_bytes(files: Sequence[Path], cache_dir: Path) -> Tensor:
    """The bytes of all files, one after the other, as a memory-mapped uint8 tensor `(bytes,)`.

    A single plain file is mapped where it lies. Others are unpacked into one file in `cache_dir`, under a name
    that changes with them.

    Raises ValueError where they are torn or hold no byte.
    """
    path = files[0]
    if path.name == 'enwik8' and len(files) == 1 and path.stat().st_size != ENWIK8_BYTES:
        raise ValueError(f'data: {path} has {path.stat().st_size:,} bytes; enwik8 has {ENWIK8_BYTES:,}, so it is torn')

    if len(files) > 1 or path.suffix.lower() in (*OPENERS, '.zip'):
        stats = [(str(file.resolve()), file.stat()) for file in files]
        key = hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode())
        path = cache_dir / f'{key.hexdigest()[:16]}.bytes'

        if not path.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f'.{os.getpid()}.part')
            try:
                with open(partial, 'wb') as file:
                    for source in files:
                        copy_bytes(source, file)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    size = path.stat().st_size
    if size == 0:
        raise ValueError(f'data: {files[0]}{" and the files beside it" * (len(files) > 1)} hold no byte')
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


# split and sample


def split_bytes(size: int, *, seq_len: int) -> dict[str, range]:
    """The first 90 %, the next 5 % and the last 5 % of a corpus, as is the custom for enwik8.

    Raises ValueError where one of them is too short for a sequence of `seq_len` and the byte after it.
    """
    valid, test = size * 90 // 100, size * 95 // 100
    spans = dict(zip(SPLITS, (range(valid), range(valid, test), range(test, size)), strict=True))
    shortest = min(map(len, spans.values()))
    if shortest <= seq_len:
        raise ValueError(
            f'data has {size:,} bytes, of which the shortest split has {shortest:,}: '
            f'too few for one sequence of seq_len {seq_len:,} and the byte after it'
        )
    return spans


def sample_batch(
    data: Tensor, span: range, *, batch_size: int, seq_len: int, generator: torch.Generator | None = None
) -> Tensor:
    """Sequences that begin anywhere in `span`: ids `(batch, seq_len + 1)`, int64."""
    start = torch.randint(span.start, span.stop - seq_len, (batch_size, 1), generator=generator)
    return data[start + torch.arange(seq_len + 1)].long()


def segment_batches(
    data: Tensor,
    span: range,
    *,
    batch_size: int,
    seq_len: int,
    segments: int,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, bool]]:
    """Reads stretches of `span` segment by segment, for a model that carries its state along, endlessly.

    Ids `(batch, seq_len + 1)`, int64, and whether they begin a stretch. A stretch begins anywhere and has `segments`
    segments, or as many as the span has room for; the last id of one is the first of the next.

    Raises ValueError where the span has no room for a segment.
    """
    segments = min(segments, (len(span) - 1) // seq_len)
    if segments < 1:
        raise ValueError(f'data has {len(span):,} bytes to draw from, too few for segments of {seq_len:,}')
    while True:
        stretch = sample_batch(data, span, batch_size=batch_size, seq_len=segments * seq_len, generator=generator)
        for i in range(segments):
            yield stretch[:, i * seq_len : (i + 1) * seq_len + 1], i == 0


def evaluation_batches(
    data: Tensor, span: range, *, seq_len: int, batch_size: int, max_bytes: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Goes through `span` in windows that do not overlap: ids and labels, each `(batch, up to seq_len)`, int64.

    Every byte of the span is a label once: the first of a window is predicted from the byte before it alone.
    Only the very first byte of the corpus has none before it. With `max_bytes`, that many bytes are taken, in whole
    windows spread evenly, the same ones each time.
    """
    first = max(span.start, 1)
    starts = list(range(first, span.stop, seq_len))
    if max_bytes is not None and (count := max(max_bytes // seq_len, 1)) < len(starts):
        starts = [starts[i * len(starts) // count] for i in range(count)]

    whole = [start for start in starts if start + seq_len <= span.stop]
    batches = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    for batch in batches + [[start] for start in starts[len(whole) :]]:
        stop = min(seq_len, span.stop - batch[-1])
        window = torch.tensor(batch)[:, None] - 1 + torch.arange(stop + 1)
        ids = data[window].long()
        yield ids[:, :-1], ids[:, 1:]
