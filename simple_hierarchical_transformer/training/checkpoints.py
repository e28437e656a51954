"""What a run has come to, as folders `checkpoint-<step>` beside each other: written whole or not at all.

Each is a saved model, as `from_pretrained` takes it, with two files more: training.safetensors, the tensors of the
optimizer and what else changes, and training.json, the rest, with the size and SHA-256 of every other file. They do not
depend on how many processes wrote them.

A run marks its folder as its own by run.json, before it writes anything else there. What is in the folder belongs to
the run where its record says so. Nothing else is overwritten or removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..config_file import check_file
from ..data.files import file_digest
from ..memory import State
from ..model import HierarchicalTransformer
from ..weights import WEIGHTS_FILE, shared_names, write_tensors
from ..weights import read_tensors as read_safetensors
from .optim import WeightAverage, state_shapes
from .sharded import fill, full, reshard, shard_like

RECORD_FILE = 'training.json'
TENSORS_FILE = 'training.safetensors'
RUN_FILE = 'run.json'
FINAL = 'final'
FORMAT = 1
WRITER = 'train.py of simple-hierarchical-transformer'

OPTIMIZER, WEIGHTS, SEGMENTS = 'optimizer', 'weights', 'segments'


class Torn(ValueError):
    """A checkpoint that is not as it was written, or none."""


class NewerFormat(ValueError):
    """A checkpoint that a newer version wrote."""


# what changes in a run, as named tensors, full and on the CPU; every process has to call what gathers them


def gather(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Full tensors, where they are kept; elsewhere none, but they are gathered one by one all the same."""
    held = {}
    for name, tensor in named:
        whole = full(tensor.detach())
        if keep:
            held[name] = whole.cpu()
    return held


def gather_weights(model: nn.Module, average: WeightAverage | None = None, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict, of a model that may be sharded; that of its average, where there is one.

    What has several names is there under the first of them.
    """
    reshard(model)
    shared = shared_names(model)

    def held() -> dict[str, Tensor]:
        return gather(((name, each) for name, each in model.state_dict().items() if name not in shared), keep)

    if average is None:
        return held()
    with average.applied():
        # copies, since the model's own tensors change back
        return {name: tensor.clone() for name, tensor in held().items()}


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's tensors, under the names of the parameters that they belong to."""
    reshard(model)
    named = dict(model.named_parameters())
    if optimizer.state and (missing := [name for name, p in named.items() if p not in optimizer.state]):
        raise RuntimeError(f'the optimizer has no state for {", ".join(missing)}, which it had for others')
    return gather(
        (
            (f'{OPTIMIZER}.{name}.{key}', value)
            for name, p in named.items()
            for key, value in optimizer.state.get(p, {}).items()
        ),
        keep,
    )


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `gather_optimizer` returned. Raises ValueError where it is not of this optimizer."""
    held = {name: tensor for name, tensor in tensors.items() if name.startswith(f'{OPTIMIZER}.')}
    if not held:
        # it had taken no step
        return
    shapes = state_shapes(optimizer)
    named = {
        f'{OPTIMIZER}.{name}.{key}': (p, key, shape)
        for name, p in model.named_parameters()
        for key, shape in shapes[p].items()
    }
    if unlike := sorted(held.keys() ^ named.keys()):
        raise ValueError(f'the optimizer of this run has other tensors: {", ".join(unlike[:3])}')
    on_device = {p for g in optimizer.param_groups if g.get('fused') or g.get('capturable') for p in g['params']}
    for name, (p, key, shape) in named.items():
        if held[name].shape != shape:
            raise ValueError(f'{name} must have the shape {shape}, got {tuple(held[name].shape)}')
        if key == 'step':
            optimizer.state[p][key] = held[name].to(p.device if p in on_device else 'cpu', copy=True)
        else:
            # one number for each weight, or for each row
            optimizer.state[p][key] = shard_like(held[name], p).clone()


def gather_segments(states: Sequence[State], gather_rows: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The rows of several states, one after the other, then those of the next process, as `gather_rows` joins them."""
    joined = map(torch.cat, zip(*map(rows_first, states), strict=True))
    return {f'{SEGMENTS}.{i}': gather_rows(each.contiguous()).cpu() for i, each in enumerate(joined)}


def restore_segments(
    model: HierarchicalTransformer, tensors: dict[str, Tensor], position: int, *, count: int, part: tuple[int, int]
) -> list[State]:
    """`count` states out of the part `(i, n)`, one process's, of all rows."""
    held = [tensors[f'{SEGMENTS}.{i}'] for i in range(sum(key.startswith(SEGMENTS) for key in tensors))]
    index, parts = part
    size = len(held[0]) // parts // count
    states = []
    for i in range(index * count, (index + 1) * count):
        rows = iter([each[i * size : (i + 1) * size] for each in held])

        def take(old: Tensor, rows: Any = rows) -> Tensor:
            return next(rows).to(old.device, old.dtype, copy=True)

        def take_by_phase(old: Tensor, rows: Any = rows) -> Tensor:
            return next(rows).transpose(0, 1).to(old.device, old.dtype, copy=True).contiguous()

        states.append(replace(model.initial_state(size).map(take, take_by_phase), position=position))
    return states


def rows_first(state: State) -> list[Tensor]:
    """All tensors of a state, `(batch, ...)` each, in the order in which `State.map` goes through them."""
    return list(state.map(lambda tensor: tensor, lambda tensor: tensor.transpose(0, 1)).tensors())


def gather_all(
    model: HierarchicalTransformer,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    states: Sequence[State],
    gather_rows: Callable[[Tensor], Tensor],
    *,
    keep: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights to use, averaged where there is an average, and all that a run needs besides to go on.

    Every process calls it; those that do not `keep` what comes of it get nothing.
    """
    tensors = gather_optimizer(model, optimizer, keep=keep)
    if states:
        tensors |= gather_segments(states, gather_rows)
    if average is not None:
        tensors |= {f'{WEIGHTS}.{name}': tensor for name, tensor in gather_weights(model, keep=keep).items()}
    return gather_weights(model, average, keep=keep), tensors


def restore_all(
    model: HierarchicalTransformer,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Puts back what `gather_all` returned, states aside."""

    shared = shared_names(model)
    reshard(model)

    def put(held: dict[str, Tensor]) -> None:
        for name, target in model.state_dict().items():
            # of what has several names, one was written
            fill(target, held[shared.get(name, name)])

    put(weights)
    if average is not None:
        # they are in the model now, where the average takes its place
        average.swap()
        put({key[len(WEIGHTS) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f'{WEIGHTS}.')})
    restore_optimizer(model, optimizer, tensors)


# folders


def save(
    run: Path,
    step: int,
    write_model: Callable[[Path], object],
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    *,
    scratch: Path,
) -> Path:
    """Writes `checkpoint-<step>`; one of this run that is there already, and whole, stays.

    Raises OSError where it cannot be written, or where a folder of that name is not of this run. Older checkpoints are
    not touched.
    """
    folder = run / f'checkpoint-{step}'
    record = dict(format=FORMAT, step=step, **record)
    torn = False
    if folder.exists():
        refuse_foreign(folder, identity_of(record))
        try:
            read_record(folder)
            return folder
        except Torn:
            torn = True

    def write(partial: Path) -> None:
        write_model(partial)
        write_tensors(tensors, partial / TENSORS_FILE)
        write_record(partial, record)

    return write_folder(folder, write, scratch=scratch, instead=torn)


def save_final(run: Path, step: int, write_model: Callable[[Path], object], *, identity: str, scratch: Path) -> Path:
    """Writes the model by itself to `final`, in place of one that this run wrote before it was trained longer.

    Raises OSError where it cannot be written, or where what is there is not of this run.
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
    """training.json, with size and digest of what is in the folder."""
    files = {file.name: [file.stat().st_size, file_digest(file)] for file in sorted(folder.iterdir())}
    (folder / RECORD_FILE).write_text(json.dumps(dict(**record, files=files), indent=1) + '\n', encoding='utf-8')


def write_folder(folder: Path, write: Callable[[Path], object], *, scratch: Path, instead: bool = False) -> Path:
    """Has a folder written in `scratch`, so that it appears whole or not at all.

    One that is there stays, or, with `instead`, goes once the new one is written. `scratch` is emptied before and
    removed after: its name belongs to the run alone.

    Raises OSError where that fails, and removes what was written.
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
    """Until it is on the disk, so that a power cut after this does not undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(file: Path) -> bytes:
    """Raises ValueError where it is no regular file: a pipe would block."""
    check_file(file)
    return file.read_bytes()


def read_record(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """What stands in training.json, once every file it names is seen to be as it was written.

    Without `digests`, their sizes are looked at alone.

    Raises Torn where it is no checkpoint or a torn one, another ValueError where it is of a newer format.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        what = f'there is no {RECORD_FILE} in it' if folder.is_dir() else 'there is no such folder'
        raise Torn(f'{folder} is no checkpoint of train.py: {what}')
    try:
        record = json.loads(read_file(file))
        step, written = int(record['step']), record['format']
        if not isinstance(written, int) or written > FORMAT:
            raise NewerFormat(f'{folder} has format {written!r}, by a newer version; this one reads up to {FORMAT}')
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in record['files'].items()]
    except NewerFormat:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Torn(f'{folder} is torn, or no checkpoint of train.py: {RECORD_FILE}: {error!r}') from error

    for name, size, digest in files:
        file = folder / name
        if not file.is_file():
            raise Torn(f'{folder} is torn: {name} is missing')
        if file.stat().st_size != size:
            raise Torn(f'{folder} is torn: {name} has {file.stat().st_size:,} bytes, not {size:,}')
        if digests and file_digest(file) != digest:
            raise Torn(f'{folder} is torn: {name} is not what was written')
    return {**record, 'step': step}


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `gather_all` returned."""
    return read_safetensors(folder / WEIGHTS_FILE)[0], read_safetensors(folder / TENSORS_FILE)[0]


def identity_of(record: dict[str, Any]) -> object:
    """Whose it is; None where nothing says so."""
    progress = record.get('progress')
    return progress.get('identity') if isinstance(progress, dict) else None


def refuse_foreign(folder: Path, identity: object, *, whole: bool = False) -> dict[str, Any]:
    """The record of a folder that this run may write over.

    Raises OSError where its record, or the lack of one, says that it is not this run's, where it holds a file that its
    record does not name, and, with `whole`, where a file was changed since.
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
    """Looks through what a run that stands at `step` would write over.

    Raises OSError where something of it is not the run's own: a checkpoint of a later step, or, where the run `trains`
    on, `final`.
    """
    for each, folder in steps_of(run).items():
        if each > step:
            refuse_foreign(folder, identity)
    if (run / FINAL).exists():
        refuse_foreign(run / FINAL, identity, whole=trains)


def steps_of(run: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder, whole or not, by their step."""
    found = {}
    for folder in run.glob('checkpoint-*'):
        number = folder.name.partition('-')[2]
        if number.isascii() and number.isdigit() and folder.is_dir():
            found[int(number)] = folder
    return dict(sorted(found.items()))


def newest(run: Path, warn: Callable[[str], object], above: int = -1) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run after step `above`, and its record; torn ones are warned of and passed over.

    Raises ValueError where one of a newer format comes before it.
    """
    for step, folder in reversed(steps_of(run).items()):
        if step <= above:
            break
        try:
            return folder, read_record(folder)
        except Torn as error:
            warn(f'{error}; looking for an older one')
    return None


def find(
    resume: str, out: Path | None, runs_folder: Path, warn: Callable[[str], object]
) -> tuple[Path, dict[str, Any]] | None:
    """Where a run goes on from, and the record there; None where the run in `out` has yet to begin.

    `resume` is a run's folder, one of its checkpoints, or 'latest': the run in `out`, or else the one below
    `runs_folder` that was at work last. Such a run that was ended before its first checkpoint goes on from its mark,
    which has no progress.

    Raises ValueError where nothing whole is there, or something newer, or where checkpoints of a finished run are gone.
    """
    out = out and out.resolve()
    if resume != 'latest':
        folder = Path(resume).resolve()
        of_checkpoint = folder.name.startswith('checkpoint-') and not steps_of(folder)
        if of_checkpoint or (folder / RECORD_FILE).exists():
            record = read_record(folder)
            if folder.name == FINAL:
                raise ValueError(f'{folder} is a model alone: --resume {folder.parent} goes on with its run')
            # what is not newer has no need to be read through again
            newer = newest(folder.parent, warn, above=record['step'])
            if newer and out in (None, folder.parent):
                raise ValueError(
                    f'{folder} is not the newest: --resume {folder.parent} goes on from {newer[0].name}; '
                    'give --out for a branch of its own'
                )
            return folder, record
        run = folder
    else:
        run = out or run_at_work_last(runs_folder)
        if not steps_of(run):
            mark = read_mark(run)
            if mark and (run / FINAL).exists():
                raise ValueError(f'--resume: {run} has a finished run, but none of its checkpoints: give another --out')
            return (run, mark) if mark else None
    found = newest(run, warn)
    if found is None:
        raise ValueError(f'--resume: there is no whole checkpoint in {run}')
    return found


def run_at_work_last(runs_folder: Path) -> Path:
    """The folder of the run that wrote last and can go on. Raises ValueError where there is none."""

    def can_go_on(run: Path) -> bool:
        folders = steps_of(run).values()
        if not folders:
            return read_mark(run) is not None and not (run / FINAL).exists()
        return any((folder / RECORD_FILE).is_file() for folder in folders)

    runs = [run for run in runs_folder.glob('*') if can_go_on(run)]
    if not runs:
        raise ValueError(f'--resume: there is no whole checkpoint in {runs_folder}')
    return max(runs, key=lambda run: run.stat().st_mtime)


def prune(run: Path, step: int, keep: int, best: int | None, *, scratch: Path) -> None:
    """After `step` was written, removes all of this run's but the newest `keep` that are whole, and that of `best`."""
    identity = identity_of(read_record(run / f'checkpoint-{step}', digests=False))
    whole = []
    for each, folder in steps_of(run).items():
        try:
            read_record(folder, digests=False)
            refuse_foreign(folder, identity)
            whole.append(each)
        except (ValueError, OSError):
            # whatever it is, it is not this run's to remove
            pass
    for each in [each for each in whole if each < step][: max(len(whole) - keep, 0)]:
        if each != best:
            # moved first, so that what is half removed is not taken for a checkpoint
            scratch.mkdir(exist_ok=True)
            os.replace(run / f'checkpoint-{each}', scratch / f'{each}')
    shutil.rmtree(scratch, ignore_errors=True)


# the folder of a run


def read_mark(run: Path) -> dict[str, Any] | None:
    """What a run wrote into its folder when it began: settings, identity, data. None where none did."""
    try:
        return parse_mark(read_file(run / RUN_FILE))
    except (OSError, ValueError):
        return None


def parse_mark(text: bytes) -> dict[str, Any] | None:
    try:
        mark = json.loads(text)
        return mark if mark['written_by'] == WRITER and isinstance(mark['identity'], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def claim(run: Path, mark: dict[str, Any], *, resumes: bool, found: bool) -> IO[bytes]:
    """Makes the folder `run` this run's own, for as long as the returned file is held.

    The folder is new, empty, or this run's already. `resumes` is whether the run may go on in a folder that is marked
    as its own, `found` whether a checkpoint of it was read from there.

    Raises OSError where the folder holds anything else, or another process has it, ValueError where safetensors could
    not read in it.
    """
    try:
        os.fsencode(run.absolute()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'--out: {run} must have a name in UTF-8, or its checkpoints could not be read') from error
    run.mkdir(parents=True, exist_ok=True)
    file = run / RUN_FILE
    # locked before it is looked at, since who has it may be writing; nothing that is there is changed by it
    held = lock(file) if file.is_file() else None
    text = held.read() if held else b''
    known = parse_mark(text)
    names = {path.name for path in run.iterdir()}
    if not text and (held or RUN_FILE not in names):
        # in a folder of an earlier version, a checkpoint is what shows whose it is
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
        # not replaced by another file, which would not be locked; all of it or none
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
    """Opens a file to read and to append to, and keeps it for this process for as long as the returned file is held.

    The lock ends as soon as this process closes the file, also where it opened it a second time. So a file that is
    held is read through the returned one alone.

    Raises OSError where another process has it. Where the system or the disk knows no locks, all may.
    """
    held = open(file, 'a+b')  # noqa: SIM115
    held.seek(0)
    try:
        import fcntl

        # unlike flock's, not handed on to forked workers, which may outlive a process that was killed
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        held.close()
        raise OSError(f'{file.parent}: another run is at work in this folder') from error
    except (ImportError, OSError):
        pass
    return held


def run_of(model: Path) -> tuple[dict[str, Any], Path] | None:
    """The record of the run that a saved model comes from, and its file: its own, or one in the folder it lies in."""
    places = [model / RECORD_FILE, model.parent / RUN_FILE]
    places += [folder / RECORD_FILE for folder in reversed(steps_of(model.parent).values())]
    for file in places:
        try:
            record = json.loads(read_file(file))
            if 'settings' in record and (file.name == RECORD_FILE or read_mark(model.parent)):
                return record, file
        except (OSError, ValueError, TypeError, RecursionError):
            # no record, or one that is torn
            pass
    return None
