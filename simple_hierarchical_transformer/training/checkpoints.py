"""What a run has come to, as folders `checkpoint-<step>` beside each other: written whole or not at all.

Each is a saved model, as `from_pretrained` takes it, with two files more: training.safetensors, the tensors of the
optimizer and what else changes, and training.json, the rest, with the size and SHA-256 of every other file. Nothing in
them hangs on how many processes wrote them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .. import pretrained
from ..data import file_digest
from ..model import HierarchicalTransformer
from ..pretrained import WEIGHTS_FILE, shared_names, write_tensors
from ..state import State
from .optim import WeightAverage
from .sharded import fill, full, reshard, shard_like

RECORD_FILE = 'training.json'
TENSORS_FILE = 'training.safetensors'
FORMAT = 1

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
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition('.')
        held[owner][key] = tensor

    on_device = {p for g in optimizer.param_groups if g.get('fused') or g.get('capturable') for p in g['params']}
    for name, p in model.named_parameters():
        for key, tensor in held[f'{OPTIMIZER}.{name}'].items():
            if tensor.shape[:1] == p.shape[:1]:
                # one number for each weight, or for each row
                optimizer.state[p][key] = shard_like(tensor, p).clone()
            else:
                # a count of steps
                optimizer.state[p][key] = tensor.to(p.device if p in on_device else 'cpu', copy=True)


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
) -> Path:
    """Writes `checkpoint-<step>`; one that is there already, and whole, stays.

    Raises OSError where it cannot be written. Older checkpoints are not touched.
    """
    folder = run / f'checkpoint-{step}'
    for left in run.glob('.checkpoint-*'):
        shutil.rmtree(left, ignore_errors=True)
    torn = False
    if folder.exists():
        try:
            read_record(folder)
            return folder
        except Torn:
            torn = True

    def write(partial: Path) -> None:
        write_model(partial)
        write_tensors(tensors, partial / TENSORS_FILE)
        files = {file.name: [file.stat().st_size, file_digest(file)] for file in sorted(partial.iterdir())}
        text = json.dumps(dict(format=FORMAT, step=step, **record, files=files), indent=1)
        (partial / RECORD_FILE).write_text(text + '\n')

    return write_folder(folder, write, instead=torn)


def write_folder(folder: Path, write: Callable[[Path], object], *, instead: bool = False) -> Path:
    """Has a folder written under another name, so that it appears whole or not at all.

    One that is there stays, or, with `instead`, goes once the new one is written.

    Raises OSError where that fails, and removes what was written.
    """
    partial, old = (folder.with_name(f'.{folder.name}.{kind}') for kind in ('partial', 'old'))
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists() and not instead:
        return folder
    try:
        partial.mkdir(parents=True)
        write(partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f'{folder} could not be written: {error}') from error
    return folder


def sync(path: Path) -> None:
    """Until it is on the disk, so that a power cut after this does not undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_record(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """What stands in training.json, once every file it names is seen to be as it was written.

    Without `digests`, their sizes are looked at alone.

    Raises Torn where it is no checkpoint or a torn one, another ValueError where it is of a newer format.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        step, written = int(record['step']), record['format']
        if not isinstance(written, int) or written > FORMAT:
            raise NewerFormat(f'{folder} has format {written!r}, by a newer version; this one reads up to {FORMAT}')
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in record['files'].items()]
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f'there is no {RECORD_FILE} in it' if folder.is_dir() else 'there is no such folder'
        raise Torn(f'{folder} is no checkpoint of train.py: {what}') from error
    except NewerFormat:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    return pretrained.read_tensors(folder / WEIGHTS_FILE)[0], pretrained.read_tensors(folder / TENSORS_FILE)[0]


def steps_of(run: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder, whole or not, by their step."""
    found = {}
    for folder in run.glob('checkpoint-*'):
        number = folder.name.partition('-')[2]
        if number.isdigit() and folder.is_dir():
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
    `runs_folder` that was at work last.

    Raises ValueError where nothing whole is there, or something newer.
    """
    out = out and out.resolve()
    if resume != 'latest':
        folder = Path(resume).resolve()
        if folder.name.startswith('checkpoint-') or (folder / RECORD_FILE).exists():
            record = read_record(folder)
            # what is not newer has no need to be read through again
            newer = newest(folder.parent, warn, above=record['step'])
            if newer and out in (None, folder.parent):
                raise ValueError(
                    f'{folder} is not the newest: --resume {folder.parent} goes on from {newer[0].name}; '
                    'give --out for a branch of its own'
                )
            return folder, record
        runs = [folder]
    elif out:
        if not steps_of(out):
            return None
        runs = [out]
    else:
        runs = sorted((run for run in runs_folder.glob('*') if steps_of(run)), key=lambda run: run.stat().st_mtime)
    found = newest(runs[-1], warn) if runs else None
    if found is None:
        raise ValueError(f'--resume: there is no whole checkpoint in {runs[-1] if runs else runs_folder}')
    return found


def prune(run: Path, step: int, keep: int, best: int | None) -> None:
    """After `step` was written, removes all but the newest `keep` that are whole, and that of step `best`."""
    whole = []
    for each, folder in steps_of(run).items():
        try:
            read_record(folder, digests=False)
            whole.append(each)
        except ValueError:
            # whatever it is, it is not this run's to remove
            pass
    for each in [each for each in whole if each < step][: max(len(whole) - keep, 0)]:
        if each != best:
            # renamed first, so that what is half removed is not taken for a checkpoint
            gone = run / f'.checkpoint-{each}.removed'
            os.replace(run / f'checkpoint-{each}', gone)
            shutil.rmtree(gone, ignore_errors=True)


def lock(run: Path) -> IO[str] | None:
    """Keeps a run's folder for this process, for as long as the returned file is held.

    Raises OSError where another process has it. Where the system or the disk knows no locks, there is none.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(run / '.lock', 'w')  # noqa: SIM115
    try:
        # unlike flock's, not handed on to forked workers, which may outlive a process that was killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OSError(f'{run}: another run is at work in this folder') from error
    except OSError:
        return None
    return file
