"""Corpora with names: downloaded once, and verified on every use."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .corpus import Corpus, load_corpus
from .files import CHUNK, file_digest


@dataclass(frozen=True)
class Download:
    """A file on the web, with the sizes and digests that verify it."""

    url: str
    size: int
    """Bytes of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal digits."""
    content: str = ''
    """Digest of the unpacked text, as `algorithm:hexadecimal digits`."""
    content_size: int = 0
    """Bytes of the unpacked text."""


DOWNLOADS = {
    # The first 10^8 bytes of the English Wikipedia dump of 2006-03-03.
    'enwik8': Download(
        url='http://mattmahoney.net/dc/enwik8.zip',
        size=36_445_475,
        sha256='547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc',
        content='sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8',
        content_size=100_000_000,
    ),
    # 10^8 letters and spaces of the same dump, without markup.
    'text8': Download(
        url='http://mattmahoney.net/dc/text8.zip',
        size=31_344_016,
        sha256='a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232',
        content='sha1:0dc3edebc970dcc96137e7deda4d9995af9d93de',
        content_size=100_000_000,
    ),
}


# No available library does all of this: torch.hub.download_url_to_file and fsspec cannot resume, and
# huggingface_hub's http_get does not connect in the hub's offline mode, which is meant for models.
def fetch(
    download: Download, path: Path, *, timeout: float = 5.0, progress: Callable[[int], object] | None = None
) -> Path:
    """Downloads a file to `path`, which appears only once its size and SHA-256 are verified.

    A broken transfer leaves `path`.part behind. The next call resumes it, or starts over if the server does not support
    ranges.

    Args:
        download: the file to fetch.
        path: where the file goes. Missing folders are created.
        timeout: seconds to wait for a connection, and for each piece of the file.
        progress: called with the number of bytes of each piece that arrives, and once with the number of bytes that an
            earlier call left.

    Returns:
        `path`.

    Raises:
        OSError: there is no connection within `timeout` seconds, it breaks without new bytes, or the file is not the
            expected one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.part')
    broken: Exception | None = None
    if progress and partial.exists():
        progress(partial.stat().st_size)

    # A broken transfer is resumed for as long as each attempt brings new bytes.
    while (size := partial.stat().st_size if partial.exists() else 0) < download.size:
        try:
            transfer(download, partial, size, timeout=timeout, progress=progress)
        except urllib.error.URLError as error:
            raise OSError(f'{download.url} could not be fetched: {error}') from error
        except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
            broken = error
        if not partial.exists() or partial.stat().st_size <= size:
            got = partial.stat().st_size if partial.exists() else 0
            raise OSError(
                f'{download.url} broke off after {got:,} of {download.size:,} bytes; fetch again to continue'
            ) from broken

    digest = file_digest(partial)
    if size != download.size or digest != download.sha256:
        # Removed, so that the next call starts over.
        partial.unlink()
        raise OSError(
            f'{download.url} is not the file it should be: {size:,} bytes with SHA-256 {digest}, '
            f'not {download.size:,} with {download.sha256}'
        )
    os.replace(partial, path)
    return path


def transfer(
    download: Download, partial: Path, start: int, *, timeout: float, progress: Callable[[int], object] | None
) -> None:
    """Appends the bytes from position `start` on to `partial`. Rewrites it if the server does not support ranges."""
    request = urllib.request.Request(download.url, headers={'Range': f'bytes={start}-'} if start else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        resumes = response.status == http.client.PARTIAL_CONTENT
        length = response.headers.get('Content-Length')
        expected = download.size - start if resumes else download.size
        if length is not None and int(length) != expected:
            # A login page, for example. Its bytes must not end up in the partial file.
            raise OSError(
                f'{download.url} offers {int(length):,} bytes, not {expected:,}: it is not the file it should be'
            )
        with open(partial, 'ab' if resumes else 'wb') as file:
            # One byte too many proves that the file is a different one, so the rest need not be read.
            while file.tell() <= download.size and (piece := response.read1(CHUNK)):
                file.write(piece)
                if progress:
                    progress(len(piece))


def load_download(
    name: str, folder: Path, cache_dir: Path, *, progress: Callable[[int], object] | None = None
) -> Corpus:
    """Loads a corpus of `DOWNLOADS`.

    Reads `name`, `name`.zip or `name`.gz in `folder` if one of them exists. Downloads `name`.zip into it otherwise.

    Args:
        name: a key of `DOWNLOADS`.
        folder: where the file is, or goes.
        cache_dir: the folder that `load_corpus` unpacks to.
        progress: see `fetch`.

    Raises:
        OSError: the file can be neither read nor downloaded.
        ValueError: the file in `folder` is not that corpus.
    """
    download = DOWNLOADS[name]
    places = [folder / f'{name}{suffix}' for suffix in ('', '.zip', '.gz')]
    path = next((place for place in places if place.is_file()), None)
    path = path or fetch(download, folder / f'{name}.zip', progress=progress)
    corpus = load_corpus(name, [path], cache_dir)

    algorithm, _, expected = download.content.partition(':')
    if len(corpus) != download.content_size:
        raise ValueError(
            f'data: {path} has {len(corpus):,} bytes; {name} has {download.content_size:,}, so it is damaged'
        )
    if (digest := file_digest(corpus.path, algorithm)) != expected:
        raise ValueError(f'data: {path} is not {name}: its {algorithm} is {digest}, not {expected}')
    return corpus
