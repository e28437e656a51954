"""The folder of a run: its mark, its lock, and the record of the run that trained a model.

The mark is run.json. A run writes it before anything else in its folder.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import IO, Any

from .checkpoints import FORMAT, RECORD_FILE, RUN_FILE, WRITER, parse_mark, read_file, read_mark, steps_of


def claim(run: Path, mark: dict[str, Any], *, resumes: bool, found: bool) -> IO[bytes]:
    """Creates or claims the folder of a run, and locks it for as long as the returned file is open.

    Args:
        run: a folder that is new, empty, or already belongs to this run.
        mark: the contents of run.json: settings, identity and data of the run.
        resumes: whether the run may continue in a folder that has its mark.
        found: whether it resumes from a checkpoint in this folder.

    Raises:
        OSError: the folder holds anything else, or another process has locked it.
        ValueError: safetensors cannot read from a folder of this name.
    """
    try:
        os.fsencode(run.absolute()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'--out: {run} must have a name in UTF-8, or its checkpoints could not be read') from error
    run.mkdir(parents=True, exist_ok=True)
    file = run / RUN_FILE
    # locked before it is read, because another process may be writing it. The lock does not change the file
    held = lock(file) if file.is_file() else None
    text = held.read() if held else b''
    known = parse_mark(text)
    names = {path.name for path in run.iterdir()}
    if not text and (held or RUN_FILE not in names):
        # earlier versions wrote no mark: a checkpoint then shows which run the folder belongs to
        allowed = found or not names - {RUN_FILE}
    else:
        allowed = known is not None and resumes and known['identity'] == mark['identity']
    if not allowed:
        if held:
            held.close()
        raise OSError(f'--out: {run} is not empty{", and of another run" if known is not None and resumes else ""}')
    held = held or lock(file)
    if known is None:
        text = (json.dumps(dict(format=FORMAT, written_by=WRITER, **mark), indent=1) + '\n').encode()
        # written in place, because a new file would not be locked. If writing fails, the file is emptied
        try:
            if os.write(held.fileno(), text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(held.fileno())
        except OSError as error:
            held.truncate(0)
            held.close()
            raise OSError(f'{file} could not be written: {error}') from error
    return held


def lock(file: Path) -> IO[bytes]:
    """Opens a file for reading and appending, and locks it for this process until the returned file is closed.

    If this process opens the file again and closes it, the lock ends. So read a locked file only through the returned
    file.

    Raises OSError if another process holds the lock. Systems and disks without locks never refuse.
    """
    held = open(file, 'a+b')  # noqa: SIM115
    held.seek(0)
    try:
        import fcntl

        # forked workers inherit locks of flock, but not this one: they may outlive a killed process
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        held.close()
        raise OSError(f'{file.parent}: another run is active in this folder') from error
    except (ImportError, OSError):
        pass
    return held


def run_of(model: Path) -> tuple[dict[str, Any], Path] | None:
    """The record of the run that trained a saved model, and the file of the record, in its folder or the one above."""
    places = [model / RECORD_FILE, model.parent / RUN_FILE]
    places += [folder / RECORD_FILE for folder in reversed(steps_of(model.parent).values())]
    for file in places:
        try:
            record = json.loads(read_file(file))
            if 'settings' in record and (file.name == RECORD_FILE or read_mark(model.parent)):
                return record, file
        except (OSError, ValueError, TypeError, RecursionError):
            # no record, or a damaged one
            pass
    return None
