"""Paths of the files that a source stands for, and digests of files."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from pathlib import Path

from .formats import display_name, is_hidden

CHUNK = 1 << 20


def find_files(source: str | Path) -> list[Path]:
    """Returns the files that `source` stands for, without duplicates, sorted by path.

    A source is a file, a folder or a glob. An existing file or folder is never read as a glob, whatever characters its
    name has. A folder stands for every file below it whose path has no hidden part. Links are followed.

    Raises:
        ValueError: `source` is empty, matches no file, or has a broken link below it.
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
        kind = 'not a file or folder, and matches no file as a glob'
    # Prefer the real path of a file over links to it.
    unique: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (file.is_symlink(), file)):
        unique.setdefault(os.path.realpath(file), file)
    if not unique:
        raise ValueError(f'data: {display_name(source)} is {kind}')
    return sorted(unique.values())


def folders_below(folder: Path) -> list[Path]:
    """Returns `folder` and every visible folder below it, without duplicates. Own paths are preferred over links."""
    found: dict[str, Path] = {}
    folders, links = [folder], list[Path]()
    while folders or links:
        path = folders.pop(0) if folders else links.pop(0)
        if found.setdefault(os.path.realpath(path), path) is path:
            # Sorted, so that every machine reaches a folder through the same link.
            below = sorted(entry for entry in path.iterdir() if not is_hidden(Path(entry.name)) and entry.is_dir())
            folders += [entry for entry in below if not entry.is_symlink()]
            links += [entry for entry in below if entry.is_symlink()]
    return list(found.values())


def files_in(folder: Path) -> list[Path]:
    """Returns the visible files in `folder`, not those in folders below. Raises ValueError for a broken link."""
    entries = [entry for entry in folder.iterdir() if not is_hidden(Path(entry.name))]
    for entry in entries:
        if not entry.exists():
            raise ValueError(f'data: {display_name(entry)} is a link to a file or folder that is not there')
    return [entry for entry in entries if entry.is_file()]


def expand_glob(pattern: Path) -> list[str]:
    """Returns the paths that match a glob.

    Unlike `glob.glob`, the leading folders of the pattern that exist are taken literally, and `**` visits each folder
    once even if links form a cycle.
    """
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
    """Returns the source files of this Python's standard library, a text that every machine has."""
    root = Path(sysconfig.get_path('stdlib'))
    installed = {'site-packages', 'dist-packages'}
    return sorted(file for file in root.rglob('*.py') if not installed & set(file.relative_to(root).parts))


def file_digest(path: Path, algorithm: str = 'sha256') -> str:
    """Returns the hexadecimal digest of a file's contents. `algorithm` is a name that `hashlib.new` knows."""
    digest = hashlib.new(algorithm)
    with open(path, 'rb') as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
