"""Files of results, and the folders that hold them: `results/<benchmark>/<date>-<machine>/`."""

from __future__ import annotations

import json
import platform
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.machine import ROOT, threads

RESULTS = ROOT / 'benchmarks' / 'results'


def new_parser(description: str | None) -> ArgumentParser:
    """A parser that prints the description as it is written."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


def new_folder(benchmark: str) -> Path:
    """The folder for a run of today on this machine. It does not have to exist."""
    name = f'{time.strftime("%Y-%m-%d")}-{platform.machine()}-{threads().replace(" ", "-")}'
    return RESULTS / benchmark / name


def latest_folder(benchmark: str) -> Path:
    """The folder of the latest run, or `new_folder` if there is no run."""
    return max((RESULTS / benchmark).glob('*-*'), default=new_folder(benchmark))


def read_json(path: Path) -> dict[str, Any] | None:
    """The contents of a file, or None if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that an interrupted run leaves the old one."""
    # this function alone needs the package, which another version may replace in a worker
    from simple_hierarchical_transformer.training.report import write_text as replace_text

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def write_json(path: Path, held: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(held, indent=1) + '\n')


def write_lines(path: Path, lines: list[str]) -> None:
    write_text(path, '\n'.join(lines) + '\n')


def check_terms(path: Path, held: Mapping[str, Any], asked: Mapping[str, Any], advice: str) -> None:
    """Exits if the file at `path` was made with other settings than those that are asked for."""
    made = {name: held.get(name) for name in asked}
    if made != asked:
        sys.exit(f'{path} was made with {made}, but this run has {asked}: {advice}')
