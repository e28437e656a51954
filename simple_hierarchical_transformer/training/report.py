"""Files of a run for people to read: metrics.csv, loss.png, report.md, and the training section of the model card."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..data.corpus import Corpus
from ..terminal import printable

# A row of metrics: step, minutes and bytes so far, and scores in bits per byte. A score is None before its first
# value. Rows between two validations have no scores of the validation split.
Row = dict[str, Any]
DOTS = 100
# metrics with the mean length of the pieces of a level: this and the level's name
PIECES = 'bytes_per_piece/'


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file. The new one is first written under another name.

    Raises OSError if it cannot be written. The old file then stays.
    """
    partial = path.with_name(f'.{path.name}.partial')
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f'{path} could not be written: {error}') from error


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, whatever the locale."""
    replace_file(path, lambda partial: partial.write_bytes(printable(text).encode()))


def validations(rows: Sequence[Row]) -> list[Row]:
    """The rows with scores of the validation split."""
    return [row for row in rows if row.get('valid_bits_per_byte') is not None]


def train_score(rows: Sequence[Row]) -> float | None:
    """Mean training score in bits per byte over all steps since the validation before the last."""
    *_, begin = [0, *(row['step'] for row in validations(rows)[:-1])]
    spans = [
        (row['step'] - before['step'], row['train_bits_per_byte'])
        for before, row in pairwise(rows)
        if row['step'] > begin and row['train_bits_per_byte'] is not None
    ]
    steps = sum(count for count, _ in spans)
    return sum(count * score for count, score in spans) / steps if steps else None


def write_metrics(rows: Sequence[Row], path: Path) -> None:
    """Writes a line for each row. The first row is a validation, so it has all columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Draws the training and validation scores by step. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for name, label in (('train_bits_per_byte', 'training'), ('valid_bits_per_byte', 'validation')):
        points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
        # many markers would hide the curve
        axes.plot(*zip(*points, strict=True), label=label, marker='.' if len(points) < DOTS else None)
    axes.set(xlabel='step', ylabel='bits per byte')
    axes.grid(alpha=0.3)
    axes.legend()
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def machine(device: torch.device, processes: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    threads = f', {torch.get_num_threads()} threads' if device.type == 'cpu' else ''
    return f'{processes} x {device.type} ({name}{threads}), torch {torch.__version__}'


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f'{hours}:{rest // 60:02}:{rest % 60:02}'


def fenced(text: str) -> str:
    """Text as a code block in markdown, with a fence that the text does not contain."""
    fence = '`' * 3
    while fence in text:
        fence += '`'
    return f'{fence}text\n{text}\n{fence}'


def account(
    settings: dict[str, Any],
    rows: Sequence[Row],
    data: Sequence[str],
    where: str,
    *,
    steps: int,
    size: int,
    seconds: float,
) -> str:
    """The training section of the model card, in markdown. `size` is the number of bytes read."""
    first, last = rows[0], dict(validations(rows)[-1], train_bits_per_byte=train_score(rows))
    # file names only: folder names may be private
    names = ', '.join(printable(Path(name).name) for name in data)
    lines = [
        '## Training',
        '',
        f'{steps:,} steps of {settings["optimizer"]}, {size:,} bytes read in {duration(seconds)} on {where}, '
        f'from {names}.',
        '',
        f'| bits per byte | at first | at step {last["step"]:,} |',
        '|---|---|---|',
    ]
    for name, value in last.items():
        if name.endswith('bits_per_byte') and value is not None:
            title = name.removesuffix('_bits_per_byte').replace('_', ' ', 1)
            before = '' if first[name] is None else f'{first[name]:.3f}'
            lines.append(f'| {title} | {before} | {value:.3f} |')
    lengths = [
        f'{value:.2f} at level {name.removeprefix(PIECES)}'
        for name, value in last.items()
        if name.startswith(PIECES) and value is not None
    ]
    if lengths:
        lines += ['', f'Mean bytes in a piece of training text at the end: {", ".join(lengths)}.']
    return '\n'.join(lines)


def report(
    settings: dict[str, Any],
    rows: Sequence[Row],
    account: str,
    *,
    facts: dict[str, str],
    commands: dict[str, str],
    picture: str | None,
    sample: str,
    pieces: str = '',
) -> str:
    """The text of report.md: the scores of a run, the commands to use it, and its settings.

    `pieces` is a section on placed levels.
    """
    scored = validations(rows)
    last = scored[-1]
    best = min((row for row in scored if not math.isnan(valid_score(row))), key=valid_score, default=last)
    lines = [
        f'# {valid_score(last):.3f} bits per byte',
        '',
        f'On the validation split, at step {last["step"]:,}; '
        f'the best was {valid_score(best):.3f} at step {best["step"]:,}.',
        '',
        account,
        '',
        *([f'![training and validation score by step]({picture})', ''] if picture else []),
        '| | |',
        '|---|---|',
        *(f'| {name} | {value} |' for name, value in facts.items()),
        '',
        '## Sample',
        '',
        'The first bytes of the validation split, and after `>>>` the continuation of the model.',
        '',
        fenced(sample),
        '',
        *([pieces, ''] if pieces else []),
        '## Commands',
        '',
    ]
    for purpose, command in commands.items():
        lines += [f'{purpose}:', '', '```bash', command, '```', '']
    lines += ['## Settings', '', '| | |', '|---|---|']
    given = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items() if value is not None}
    lines += [f'| {name} | `{value}` |' for name, value in given.items()]
    return '\n'.join(lines) + '\n'


def valid_score(row: Row) -> float:
    return row['valid_bits_per_byte']


def estimate(
    *,
    parameters: dict[int | None, int],
    compressions: Sequence[int],
    flops: float,
    spacing: dict[int, float],
    counted: Collection[int],
    memory: dict[str, int],
    data: Sequence[tuple[Corpus, dict[str, range]]],
    seconds: float | None,
    step_bytes: int,
    peak: float,
    steps: int | None,
    minutes: float | None,
) -> Iterator[str]:
    """The cost of a run, line by line.

    Args:
        parameters: the number of parameters of each level, by its index. None holds those of several levels.
        compressions: the compression of each level.
        flops: operations per byte.
        spacing: the mean number of bytes in a piece of each placed level, by its index.
        counted: the indices of those of them that were counted. The others are intended.
        memory: bytes by purpose. Empty if they are unknown.
        data: each corpus with its splits.
        seconds: the time of a step. None if it was not timed.
        step_bytes: bytes per step.
        peak: operations per second that the machine reaches.
        steps: the length of the run in steps, if `minutes` is None.
        minutes: the length of the run in minutes, if `steps` is None.
    """
    yield f'parameters: {sum(parameters.values()):,}'
    for i, count in parameters.items():
        of = 'embeddings, merges, logits' if i is None else f'level {compressions[i]}x'
        yield f'  {of:30}{count:>14,}'
    for i, length in spacing.items():
        how = 'counted in a sample of the data' if i in counted else 'as intended, since its rule must first learn'
        yield f'bytes in a piece of level {compressions[i]}x: {length:.2f}, {how}'
    yield f'operations per byte, forward and backward: {flops:,.0f}'
    if memory:
        yield f'memory of a run on one device, at the peak of a step: {sum(memory.values()) / 1e9:.3f} GB'
    for name, size in memory.items():
        yield f'  {name:30}{size / 1e9:>14.3f} GB'
    yield 'data:'
    for corpus, spans in data:
        yield f'  {corpus.name}: {len(corpus):,} bytes in {len(corpus.ends):,} texts'
        yield f'    {", ".join(f"{name} {len(span):,}" for name, span in spans.items())}'
    if seconds is None:
        return
    yield f'a step: {seconds:.3f} s for {step_bytes:,} bytes, {step_bytes / seconds:,.0f} bytes per second'
    share = step_bytes * flops / seconds / peak
    yield f'  {share:.0%} of the {peak / 1e9:,.0f} GFLOP/s that a large matrix product reaches'
    total = steps * seconds if steps else 60 * (minutes or 0)
    steps = steps or round(total / seconds)
    yield f'the run: {steps:,} steps, {steps * step_bytes:,} bytes, {duration(total)} plus the time of validation'
