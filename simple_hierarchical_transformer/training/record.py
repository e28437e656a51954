"""Checks of the record of a run before it is used, because anyone may have edited it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .checkpoints import RUN_FILE
from .settings import BYTES, DEFAULTS, ELSEWHERE, LENGTH, PRESETS, TEXTS, build_parser, flag

MOST = 10**15


class RaisingParser(argparse.ArgumentParser):
    """Raises ValueError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Kind(NamedTuple):
    """A type and a range."""

    name: str
    holds: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and 0 <= value <= MOST)


def is_score(value: Any) -> bool:
    # NaN is the score of a model that diverged
    return is_number(value) or (isinstance(value, float) and math.isnan(value))


def list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(holds, value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, (int, float)) for each in value.values())


WHOLE = Kind('a whole number of at least 0', is_whole)
NUMBER = Kind('a number of at least 0', is_number)
SCORE = Kind('a number of at least 0, NaN or null', lambda value: value is None or is_score(value))

PROGRESS = dict(
    identity=Kind('8 hexadecimal digits', lambda value: is_text(value) and bool(re.fullmatch('[0-9a-f]{8}', value))),
    step=WHOLE,
    elapsed=NUMBER,
    skipped=WHOLE,
    in_a_row=WHOLE,
    position=WHOLE,
    updates=WHOLE,
    nats=NUMBER,
    scored=WHOLE,
    sums=Kind('numbers by name', is_numbers),
    scaler=Kind('the state of a gradient scaler', is_numbers),
    rows=Kind('a list of rows', lambda value: isinstance(value, list) and len(value) > 0),
)
# added after the first files were written
OPTIONAL = {'sums'}
ROW = dict(step=WHOLE, minutes=NUMBER, bytes=WHOLE, skipped=WHOLE, train_bits_per_byte=SCORE)
RECORD = dict(
    settings=Kind('settings by name', lambda value: isinstance(value, dict)),
    rows=Kind('a whole number above 0', lambda value: is_whole(value) and value > 0),
    data=Kind('a list of fingerprints', list_of(is_text)),
)


def check_record(record: dict[str, Any], file: Path) -> None:
    """Raises ValueError, which names the file, if a value is missing or has a wrong type or range."""
    check_kinds(record, RECORD, file, '')
    check_settings(record['settings'], file)
    step_rows = record['settings']['batch_size'] * record['settings']['grad_accum']
    if record['rows'] % step_rows:
        raise ValueError(f'{file}: rows must be batch_size x grad_accum x processes, got {record["rows"]}')
    if file.name == RUN_FILE:
        check_kinds(record, dict(identity=PROGRESS['identity']), file, '')
        return
    progress = record.get('progress')
    if not isinstance(progress, dict):
        raise ValueError(f'{file}: progress must be an object of named values, got {brief(progress)}')
    needed = {name: kind for name, kind in PROGRESS.items() if name in progress or name not in OPTIONAL}
    check_kinds(progress, needed, file, 'progress.')
    if unknown := sorted(set(progress) - set(PROGRESS)):
        raise ValueError(f'{file}: progress has entries unknown to this version: {", ".join(unknown)}')
    if progress['step'] != record['step']:
        raise ValueError(f'{file}: progress.step must be the step, {record["step"]}, got {progress["step"]}')
    check_rows(progress['rows'], file)


def check_kinds(held: dict[str, Any], kinds: dict[str, Kind], file: Path, where: str) -> None:
    for name, kind in kinds.items():
        if name not in held:
            raise ValueError(f'{file}: {where}{name} is missing')
        if not kind.holds(held[name]):
            raise ValueError(f'{file}: {where}{name} must be {kind.name}, got {brief(held[name])}')


def check_rows(rows: list[Any], file: Path) -> None:
    for i, row in enumerate(rows):
        where = f'progress.rows[{i}]'
        if not isinstance(row, dict):
            raise ValueError(f'{file}: {where} must be scores by name, got {brief(row)}')
        scores = {name: SCORE for name in row if name not in ROW}
        check_kinds(row, ROW | scores, file, f'{where}.')
        if set(row) - set(rows[0]):
            raise ValueError(f'{file}: {where} has a score that the first one lacks')
    if not is_score(rows[0].get('valid_bits_per_byte')):
        raise ValueError(f'{file}: progress.rows[0] must have a score of the validation split')


def check_settings(settings: dict[str, Any], file: Path) -> None:
    """Checks settings by the rules of the command line."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(f'{file}: settings: {message}')

    settings = {**DEFAULTS, **settings}
    needed = {*PRESETS['cpu'], *DEFAULTS} - {name for name, value in DEFAULTS.items() if value is None}
    needed |= {'preset', 'mixed_precision'}
    if unknown := sorted(set(settings) - {*needed, *DEFAULTS}):
        refuse(f'{", ".join(map(brief, unknown))} is unknown to this version')
    if missing := sorted(name for name in needed if settings.get(name) is None and name not in LENGTH):
        refuse(f'{", ".join(missing)} must be given')
    if sum(settings[name] is not None for name in LENGTH) != 1:
        refuse(f'exactly one of {" and ".join(LENGTH)} must be given')
    if not isinstance(settings['model'], dict) or set(settings['model']) & {*ELSEWHERE, *BYTES, *TEXTS}:
        refuse(f'model must be arguments of the model by name, got {brief(settings["model"])}')

    argv: list[str] = []
    asked = {name: settings[name] for name in sorted({*DEFAULTS, *needed} - {'model'}) if settings[name] is not None}
    for name, value in asked.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_number(value):
            refuse(f'{name} must be {NUMBER.name}, and at most {MOST}, got {brief(value)}')
        if isinstance(value, bool):
            argv.append(flag(name) if value else f'--no-{name.replace("_", "-")}')
        elif isinstance(value, list):
            # argparse would parse such a name as an option
            if not list_of(is_text)(value) or any(each.startswith('-') for each in value):
                refuse(f'{name} must be a list of names, got {brief(value)}')
            argv += [flag(name), *value]
        else:
            argv.append(f'{flag(name)}={value}')
    try:
        parsed = vars(build_parser(None, kind=RaisingParser).parse_args(argv))
    except ValueError as error:
        refuse(str(error))
    for name, value in asked.items():
        # 1 is accepted for 1.0, but '1' is not accepted for 1
        if parsed[name] != value or isinstance(value, bool) != isinstance(parsed[name], bool):
            refuse(f'{name} must be a value that {flag(name)} accepts, got {brief(value)}')


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f'{text[:80]}...'
