"""A run of one GPU benchmark, and its results."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import simple_hierarchical_transformer
from benchmarks.common.machine import ROOT, commit
from benchmarks.common.results import new_parser, write_json
from benchmarks.gpu.device import copy_rate, free, matmul_rate

GIGABYTE = 1e9

Found = TypeVar('Found')


@dataclass
class Left:
    """The time that a run has left."""

    minutes: float
    began: float

    @property
    def seconds(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.began)


class Bench:
    """A run of one script: its device, its time limit, and its results, which are written after each part.

    `found` holds the contents of the file. `about` describes the machine and the command, `left_out` names the parts
    that had no time, and `failed` holds the error of each part that failed.
    """

    def __init__(self, script: str, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.toy: bool = args.toy
        self.device = torch.device('cpu' if args.toy else 'cuda')
        self.left = Left(args.minutes, time.monotonic())
        self.folder = Path(os.environ.get('OUT') or ROOT / 'runs' / 'gpu')
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f'{script}.json'
        self.longest: dict[str, float] = {}
        self.found: dict[str, Any] = dict(
            about=dict(
                script=script, command=shlex.join(('python3', f'benchmarks/gpu/{script}.py', *argv)),
                card=card(self.device), date=time.strftime('%Y-%m-%d'), torch=torch.__version__,
                cuda=torch.version.cuda, python=platform.python_version(),
                package=getattr(simple_hierarchical_transformer, '__version__', None), commit=commit(), toy=self.toy,
            ),
            left_out=[], failed={},
        )  # fmt: skip

    def measure_card(self) -> None:
        """Measures the limits of the card: bf16 operations and copied bytes per second."""
        self.found['about'] |= dict(
            bf16_peak=matmul_rate(self.device, 256 if self.toy else 8192),
            copy_rate=copy_rate(self.device, 1 << (20 if self.toy else 30)),
        )
        self.save()

    @property
    def peak(self) -> float:
        return self.found['about']['bf16_peak']

    def save(self) -> None:
        self.found['about']['seconds'] = 60 * self.left.minutes - self.left.seconds
        write_json(self.path, self.found)

    def part(
        self, name: str, measure: Callable[[], Found], *, kind: str = '', expected: float = 0.0, reserve: float = 0.0
    ) -> Found | None:
        """Runs a part and returns its result, or None if it fails or there is no time for it.

        The file then says so, and the run continues. A part needs `reserve` seconds and the time of the longest part of
        its kind, or `expected` seconds if it is the first of its kind.
        """
        expected = 0.0 if self.toy else self.longest.get(kind, expected)
        if self.left.seconds < expected + reserve:
            self.found['left_out'].append(name)
            print(f'{name}: left out, no time', flush=True)
            return None
        start, found = time.monotonic(), None
        try:
            found = measure()
        except Exception as error:
            self.found['failed'][name] = f'{type(error).__name__}: {error}'[:1000]
            traceback.print_exc(limit=-8)
        took = time.monotonic() - start
        self.longest[kind] = max(self.longest.get(kind, 0.0), took)
        print(f'{name}: {took:.1f} s', flush=True)
        free(self.device)
        self.save()
        return found

    def close(self, *tables: str) -> None:
        """Writes the results, and prints the tables last."""
        about = self.found['about']
        self.save()
        print(f'\n{about["card"]}, torch {about["torch"]}, {about["date"]}, `{about["command"]}`\n')
        print('\n\n'.join(filter(None, tables)))
        if self.found['left_out']:
            print(f'\nleft out: {"; ".join(self.found["left_out"])}')
        for name, error in self.found['failed'].items():
            print(f'\nfailed: {name}: {error[:200]}')
        print(f'\nresults in {self.path}', flush=True)


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU {platform.machine()}'


def new_gpu_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all scripts."""
    parser = new_parser(description)
    parser.add_argument('--minutes', type=float, default=9.0, help='leave out parts that do not fit (default: 9)')
    parser.add_argument('--toy', action='store_true', help='tiny models on the CPU, to see that the script runs')
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command-line arguments."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(given)
    if not args.toy and not torch.cuda.is_available():
        parser.error('no CUDA device was found; --toy runs a tiny version on the CPU')
    return args, given
