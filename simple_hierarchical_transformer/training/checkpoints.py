"""Checkpoints of a run: folders `checkpoint-<step>`, each written completely or not at all.

A checkpoint is a saved model, which `from_pretrained` loads, with two more files. training.safetensors holds the
tensors of the optimizer and other changing state. training.json holds the rest, with the size and SHA-256 of every
other file. Checkpoints do not depend on the number of processes that wrote them.

A checkpoint belongs to the run that its record names. A run overwrites and removes nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config_file import check_file
from ..data.files import file_digest
from ..weights import WEIGHTS_FILE, write_tensors
from ..weights import read_tensors as read_safetensors

RECORD_FILE = 'training.json'
TENSORS_FILE = 'training.safetensors'
RUN_FILE = 'run.json'
FINAL = 'final'
FORMAT = 1
WRITER = 'train.py of simple-hierarchical-transformer'


class DamagedCheckpoint(ValueError):
    """A folder is not a checkpoint, or has changed since it was written."""


class NewerFormat(ValueError):
    """A newer version wrote the checkpoint."""


def save(
    run: Path,
    step: int,
    write_model: Callable[[Path], object],
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    *,
    scratch: Path,
) -> Path:
    """Writes `checkpoint-<step>`. If this run already has a complete one, that one stays.

    Raises OSError if it cannot be written, or where a folder of that name belongs to another run. Older checkpoints
    stay as they are.
    """
    folder = run / f'checkpoint-{step}'
    record = dict(format=FORMAT, step=step, **record)
    damaged = False
    if folder.exists():
        refuse_foreign(folder, identity_of(record))
        try:
            read_record(folder)
            return folder
        except DamagedCheckpoint:
            damaged = True

    def write(partial: Path) -> None:
        write_model(partial)
        write_tensors(tensors, partial / TENSORS_FILE)
        write_record(partial, record)

    return write_folder(folder, write, scratch=scratch, instead=damaged)


def save_final(run: Path, step: int, write_model: Callable[[Path], object], *, identity: str, scratch: Path) -> Path:
    """Writes only the model, to `final`. Replaces that of this run from before it was trained longer.

    Raises OSError if it cannot be written, or where `final` belongs to another run.
    """
    folder = run / FINAL
    written = refuse_foreign(folder, identity) if folder.exists() else None
    if written and written['step'] == step:
        return folder
    if written:
        refuse_foreign(folder, identity, whole=True)

    def write(partial: Path) -> None:
        write_model(partial)
        write_record(partial, dict(format=FORMAT, step=step, progress=dict(identity=identity)))

    return write_folder(folder, write, scratch=scratch, instead=written is not None)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes training.json, with the size and digest of every file in the folder."""
    files = {file.name: [file.stat().st_size, file_digest(file)] for file in sorted(folder.iterdir())}
    (folder / RECORD_FILE).write_text(json.dumps(dict(**record, files=files), indent=1) + '\n', encoding='utf-8')


def write_folder(folder: Path, write: Callable[[Path], object], *, scratch: Path, instead: bool = False) -> Path:
    """Writes a folder in `scratch` and then moves it, so that it appears completely or not at all.

    An existing folder stays. With `instead`, it is replaced once the new one is written. `scratch` is removed before
    and after, because only this run uses its name.

    Raises OSError if that fails, and removes what it wrote.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    if folder.exists() and not instead:
        return folder
    partial = scratch / folder.name
    try:
        partial.mkdir(parents=True)
        write(partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists():
            os.replace(folder, scratch / 'old')
        os.replace(partial, folder)
        sync(folder.parent)
    except OSError as error:
        raise OSError(f'{folder} could not be written: {error}') from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def sync(path: Path) -> None:
    """Waits until the file or folder is on disk, so that it survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(file: Path) -> bytes:
    """Reads a regular file. Raises ValueError for anything else, since a pipe would block."""
    check_file(file)
    return file.read_bytes()


def read_record(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """Reads training.json and checks that every file it names is as it was written.

    Without `digests`, it compares only sizes.

    Raises DamagedCheckpoint if the folder is damaged or not a checkpoint, and NewerFormat if a newer version wrote it.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        what = f'there is no {RECORD_FILE} in it' if folder.is_dir() else 'there is no such folder'
        raise DamagedCheckpoint(f'{folder} is not a checkpoint of train.py: {what}')
    try:
        record = json.loads(read_file(file))
        step, written = int(record['step']), record['format']
        if not isinstance(written, int) or written > FORMAT:
            raise NewerFormat(f'{folder} has format {written!r}, by a newer version; this one reads up to {FORMAT}')
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in record['files'].items()]
    except NewerFormat:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpoint(
            f'{folder} is damaged, or not a checkpoint of train.py: {RECORD_FILE}: {error!r}'
        ) from error

    for name, size, digest in files:
        file = folder / name
        if not file.is_file():
            raise DamagedCheckpoint(f'{folder} is damaged: {name} is missing')
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f'{folder} is damaged: {name} has {file.stat().st_size:,} bytes, not {size:,}')
        if digests and file_digest(file) != digest:
            raise DamagedCheckpoint(f'{folder} is damaged: {name} is not what was written')
    return {**record, 'step': step}


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads the weights and the other tensors of a checkpoint, as `run_tensors.gather_all` returned them."""
    return read_safetensors(folder / WEIGHTS_FILE)[0], read_safetensors(folder / TENSORS_FILE)[0]


def identity_of(record: dict[str, Any]) -> object:
    """The identity of the run that a record belongs to. None if the record has none."""
    progress = record.get('progress')
    return progress.get('identity') if isinstance(progress, dict) else None


def refuse_foreign(folder: Path, identity: object, *, whole: bool = False) -> dict[str, Any]:
    """Reads the record of a folder that this run may overwrite.

    Raises OSError if the folder belongs to another run, if it holds a file that its record does not name, and with
    `whole` if a file has changed.
    """
    try:
        record = json.loads(read_file(folder / RECORD_FILE))
        names = {path.name for path in folder.iterdir()}
        if record['step'] >= 0 and identity_of(record) == identity and names <= {RECORD_FILE, *record['files']}:
            return read_record(folder) if whole else record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise OSError(f'{folder} is not as this run wrote it: move it away, or give another --out')


def check_own(run: Path, identity: str, step: int, *, trains: bool) -> None:
    """Checks everything that a run at `step` would overwrite.

    Raises OSError if a checkpoint of a later step, or `final`, belongs to another run. If the run `trains` on,
    `final` must also be unchanged.
    """
    for each, folder in steps_of(run).items():
        if each > step:
            refuse_foreign(folder, identity)
    if (run / FINAL).exists():
        refuse_foreign(run / FINAL, identity, whole=trains)


def steps_of(run: Path) -> dict[int, Path]:
    """The checkpoints in the folder of a run by step, in ascending order. They may be incomplete."""
    found = {}
    for folder in run.glob('checkpoint-*'):
        number = folder.name.partition('-')[2]
        if number.isascii() and number.isdigit() and folder.is_dir():
            found[int(number)] = folder
    return dict(sorted(found.items()))


def newest(run: Path, warn: Callable[[str], object], above: int = -1) -> tuple[Path, dict[str, Any]] | None:
    """Finds the newest complete checkpoint of a run after step `above`, and its record. Warns of damaged ones.

    Raises NewerFormat if a newer version of the library wrote a later one.
    """
    for step, folder in reversed(steps_of(run).items()):
        if step <= above:
            break
        try:
            return folder, read_record(folder)
        except DamagedCheckpoint as error:
            warn(f'{error}; looking for an older one')
    return None


def find(
    resume: str, out: Path | None, runs_folder: Path, warn: Callable[[str], object]
) -> tuple[Path, dict[str, Any]] | None:
    """Finds the folder that a run resumes from, and its record. None if the run in `out` has not begun.

    If a run ended before its first checkpoint, the record is its run.json, which has no progress.

    Args:
        resume: the folder of a run or one of its checkpoints. 'latest' is the run in `out`. Without `out`, it is the
            run in `runs_folder` that was active last.
        out: the folder of the resumed run, if it was given.
        runs_folder: the folder of all runs.
        warn: prints a warning.

    Raises:
        ValueError: there is no complete checkpoint, a newer one exists, or a finished run has lost its checkpoints.
    """
    out = out and out.resolve()
    if resume != 'latest':
        folder = Path(resume).resolve()
        of_checkpoint = folder.name.startswith('checkpoint-') and not steps_of(folder)
        if of_checkpoint or (folder / RECORD_FILE).exists():
            record = read_record(folder)
            if folder.name == FINAL:
                raise ValueError(f'{folder} holds only a model: --resume {folder.parent} continues its run')
            # only newer checkpoints have to be checked
            newer = newest(folder.parent, warn, above=record['step'])
            if newer and out in (None, folder.parent):
                raise ValueError(
                    f'{folder} is not the newest: --resume {folder.parent} continues from {newer[0].name}; '
                    'give --out to branch off'
                )
            return folder, record
        run = folder
    else:
        run = out or last_active_run(runs_folder)
        if not steps_of(run):
            mark = read_mark(run)
            if mark and (run / FINAL).exists():
                raise ValueError(f'--resume: {run} has a finished run, but none of its checkpoints: give another --out')
            return (run, mark) if mark else None
    found = newest(run, warn)
    if found is None:
        raise ValueError(f'--resume: there is no complete checkpoint in {run}')
    return found


def last_active_run(runs_folder: Path) -> Path:
    """The folder of the run that wrote last and can resume. Raises ValueError if there is none."""

    def can_resume(run: Path) -> bool:
        folders = steps_of(run).values()
        if not folders:
            return read_mark(run) is not None and not (run / FINAL).exists()
        return any((folder / RECORD_FILE).is_file() for folder in folders)

    runs = [run for run in runs_folder.glob('*') if can_resume(run)]
    if not runs:
        raise ValueError(f'--resume: there is no complete checkpoint in {runs_folder}')
    return max(runs, key=lambda run: run.stat().st_mtime)


def prune(run: Path, step: int, keep: int, best: int | None, *, scratch: Path) -> None:
    """Removes older checkpoints of this run, except the newest `keep` complete ones and that of step `best`."""
    identity = identity_of(read_record(run / f'checkpoint-{step}', digests=False))
    whole = []
    for each, folder in steps_of(run).items():
        try:
            read_record(folder, digests=False)
            refuse_foreign(folder, identity)
            whole.append(each)
        except (ValueError, OSError):
            # it does not belong to this run
            pass
    for each in [each for each in whole if each < step][: max(len(whole) - keep, 0)]:
        if each != best:
            # moved first, so that a partly removed folder does not look like a checkpoint
            scratch.mkdir(exist_ok=True)
            os.replace(run / f'checkpoint-{each}', scratch / f'{each}')
    shutil.rmtree(scratch, ignore_errors=True)


def read_mark(run: Path) -> dict[str, Any] | None:
    """Reads run.json, which a run writes when it begins: settings, identity and data. None if there is none."""
    try:
        return parse_mark(read_file(run / RUN_FILE))
    except (OSError, ValueError):
        return None


def parse_mark(text: bytes) -> dict[str, Any] | None:
    """Parses the contents of run.json. None if they are not those of a run."""
    try:
        mark = json.loads(text)
        return mark if mark['written_by'] == WRITER and isinstance(mark['identity'], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
