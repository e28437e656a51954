"""Does the placement of coarse tokens pay? Flat, strided and placed models on text that no run reads twice.

    python benchmarks/quality/boundaries.py race --data wikipedia-a.txt.xz wikipedia-b.txt.xz
    python benchmarks/quality/boundaries.py scaling --data wikipedia-a.txt.xz wikipedia-b.txt.xz
    python benchmarks/quality/boundaries.py report

`race` gives each run the same processor time. `scaling` gives each run of a size the same operations, and models grow
with them. In both, the learning rate of a contestant is the best of a few in short runs of one seed. A run has one
thread, and its scores do not count, so several may run side by side (`--jobs`). `report` makes the tables and figures.

Each run is a process of its own and leaves a file in the folder of the results. The benchmark continues where it
stopped. `--for MINUTES` starts no run that would end later, and `--plan` lists the runs that are left.

The files are one text. Its end is held out: a part that chooses learning rates, and a part that is reported. Both are
scored in streams. Runs of one seed read the same text in the same order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.common.machine import CPU, ROOT
from benchmarks.common.models import one_level
from benchmarks.common.results import check_terms, latest_folder, new_folder, new_parser, read_json, write_json
from benchmarks.common.training import DATA
from benchmarks.quality import race
from benchmarks.quality.boundaries_run import load_text, split
from benchmarks.quality.scaling import LOOKUPS
from simple_hierarchical_transformer.training.settings import DEFAULTS, PRESETS, as_json

PRESET = PRESETS['cpu']
WINDOW = 64
# fine positions per coarse token: of strides, and about that of English words, which rules that learn aim at
STRIDE, WORD = 4, 6
RATES = (0.5, 1.0, 2.0)  # of those of the preset
BUDGETS = (1e12, 3e12, 1e13, 3e13, 1e14)
# operations a second of one thread, before any run has shown its own
PACE = 3e10
AROUND = 60  # seconds of a run for starting and scoring
WITH_TABLES = ' + tables'
# shares of the budget after which a part of the held-out text is scored
MOMENTS = (0.1, 0.25, 0.5, 0.75)


class Size(NamedTuple):
    """The flat model of a size. Other models are made of it by `layered`."""

    dim: int
    depth: int
    heads: int


# the flat twin of the preset
RACE_SIZE = Size(96, 3, 2)
# by the operations of training from which on a size is used. Parameters grow about as the root of them
SIZES = {
    0.0: Size(48, 3, 2), 2e12: Size(64, 3, 2), 5e12: Size(96, 3, 2), 2e13: Size(128, 4, 2), 5e13: Size(160, 5, 4),
    2e14: Size(192, 6, 4), 5e14: Size(256, 8, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """What all runs of a folder share."""

    length: int = PRESET['seq_len']
    batch: int = PRESET['batch_size']
    held_out: int = 1 << 20
    """Bytes of each of the two splits that no run reads."""
    streams: int = 16
    stream_bytes: int = 1 << 14
    toy: bool = False


TOY = Terms(length=64, batch=2, held_out=2048, streams=2, stream_bytes=256, toy=True)


@dataclass(frozen=True)
class Contestant:
    name: str
    model: dict[str, Any] | None = None
    """Options of a layered model. None for one level, and for peers."""
    window: int | None = None
    """Of a flat model."""
    spacing: int = STRIDE
    """Bytes from one coarse token to the next, or their intended mean. It says how many coarse layers cost as much as a
    fine one."""
    tables: bool = False
    rate_of: str | None = None
    """The contestant whose learning rate it takes."""

    def settings(self, size: Size, terms: Terms) -> dict[str, Any]:
        """Arguments of the model."""
        shared: dict[str, Any] = {**PRESET['model'], 'dim_head': size.dim // size.heads, 'ff_mult': 4}
        if not self.tables:
            shared |= LOOKUPS
        elif terms.toy:
            shared['ngram_rows'] = 64
        if self.model is not None:
            return layered(shared, size, self.spacing, terms.length) | self.model
        window = terms.length if self.window is None else self.window
        return one_level(shared | dict(dim=size.dim, heads=size.heads), size.depth, window)


def layered(shared: Mapping[str, Any], size: Size, spacing: int, length: int) -> dict[str, Any]:
    """A model of about the operations of the flat model of a size, with a coarse level inside.

    About three quarters of the flat layers stay fine, half of them before and half after the coarse ones. With half of
    the flat layers, short runs were worse. A coarse layer has twice the width, so one token of it costs four fine ones,
    and it reads one token in `spacing`.
    """
    fine = size.depth - max(round(size.depth / 4), 1)
    coarse = max(round((size.depth - fine) * spacing / 4), 1)
    return dict(
        shared,
        dim=(size.dim, 2 * size.dim),
        heads=(size.heads, 2 * size.heads),
        depth=(fine, coarse),
        hierarchies=(1, spacing),
        hierarchical_stride=(1, 1),
        # the coarse level reaches as far as the context of training, also in long streams
        window_sizes=(min(WINDOW, length), length // spacing),
    )


def placed(rule: str, **options: Any) -> dict[str, Any]:
    return dict(boundaries=(None, rule), **options)


FLAT, FULL, WORDS = 'flat, window of 64', 'flat, full attention', 'words'
# what a merge gets of the coarse tokens: as in SpaceByte, and as in H-Net
AT_BOUNDARY, SMOOTH = dict(upsample='boundary'), dict(upsample='smooth')
SHAPES = (
    Contestant(FLAT, window=WINDOW),
    Contestant(FULL),
    Contestant('stride 4', dict(hierarchical_stride=(1, STRIDE))),
    Contestant('stride 4, placed', placed('every', **AT_BOUNDARY), rate_of='stride 4'),
    Contestant(WORDS, placed('words', **AT_BOUNDARY), spacing=WORD),
    Contestant('learned', placed('learned', **SMOOTH), spacing=WORD),
    Contestant('surprise', placed('surprise', **AT_BOUNDARY), spacing=WORD),
    Contestant('rise', placed('rise', **AT_BOUNDARY), spacing=WORD, rate_of='surprise'),
)
VARIANTS = (
    *(
        Contestant(f'words, upsample {kind}', placed('words', upsample=kind), spacing=WORD, rate_of=WORDS)
        for kind in ('repeat', 'offset')
    ),
    Contestant(
        'words, downsample attention', placed('words', downsample='attention', **AT_BOUNDARY), spacing=WORD,
        rate_of=WORDS,
    ),
    Contestant('words, merge concat', placed('words', merge='concat', **AT_BOUNDARY), spacing=WORD, rate_of=WORDS),
    *(
        Contestant(f'learned, {name}', placed('learned', **options), spacing=WORD, rate_of='learned')
        for name, options in {
            'merge skip': SMOOTH | dict(merge='skip'),
            'upsample repeat': {},
            'ratio 0.05': SMOOTH | dict(ratio_loss_weight=0.05),
        }.items()
    ),
)  # fmt: skip


def with_tables(each: Contestant) -> Contestant:
    rate_of = each.rate_of and each.rate_of + WITH_TABLES
    return Contestant(each.name + WITH_TABLES, each.model, each.window, each.spacing, True, rate_of)


# models that do not grow, for the race
ONE_SIZE = (
    # as it is, but for a window that covers the context of training
    Contestant(
        'cpu preset',
        {**PRESET['model'], 'window_sizes': (PRESET['model']['window_sizes'][0], PRESET['seq_len'] // STRIDE)},
        tables=True,
    ),
    # six coarse layers of the fine width cost as much as one fine layer
    Contestant(
        'words, coarse width as fine', placed('words', dim=RACE_SIZE.dim, heads=RACE_SIZE.heads, depth=(2, WORD)),
        spacing=WORD, rate_of=WORDS,
    ),
)  # fmt: skip
OURS = {each.name: each for each in (*SHAPES, *map(with_tables, SHAPES), *VARIANTS, *ONE_SIZE)}
# packages of others in environments of their own
PEERS = {each.name: each for each in race.PEERS if each.name in ('MEGABYTE', 'published, 1/2')}
# contestants of each kind of comparison, unless `--only` names others
DEFAULT = {
    'race': [*OURS, *PEERS],
    'scaling': [FLAT, 'stride 4', WORDS, 'learned', 'surprise'],
}


@dataclass(frozen=True)
class Run:
    kind: str
    contestant: str
    budget: float
    """Seconds of processor time in a race, operations in a scaling."""
    rate: float
    """The learning rate relative to the preset. Of a peer, the learning rate itself."""
    seed: int
    tuning: bool = False

    @property
    def key(self) -> str:
        name = ''.join(c if c.isalnum() else '-' for c in self.contestant.replace(', ', '-').replace(' + ', '-'))
        return f'{self.kind}-{name}-{self.budget:g}-rate{self.rate:g}-seed{self.seed}{"-tuning" * self.tuning}'

    @property
    def size(self) -> Size:
        return RACE_SIZE if self.kind == 'race' else SIZES[max(each for each in SIZES if each <= self.budget)]

    @property
    def split(self) -> str:
        """The held-out text that is scored."""
        return 'valid' if self.tuning else 'test'

    @property
    def unit(self) -> str:
        return 'seconds' if self.kind == 'race' else 'operations'

    def settings(self, terms: Terms) -> dict[str, Any]:
        """Settings of train.py."""
        size = Size(16, 3, 1) if terms.toy else self.size
        # the rules of the `gpu` preset: they keep the size of steps in the spectral norm
        narrow = RACE_SIZE.dim / size.dim
        changes = dict(
            model=OURS[self.contestant].settings(size, terms), seq_len=terms.length, batch_size=terms.batch,
            lr=PRESET['lr'] * self.rate * narrow**0.5, table_lr=PRESET['table_lr'] * self.rate * narrow,
            seed=self.seed, mixed_precision='no', steps=None, minutes=1.0,
        )  # fmt: skip
        return as_json({**DEFAULTS, **PRESET, **changes})


class Results:
    """One file for each finished run."""

    def __init__(self, folder: Path, terms: dict[str, Any]) -> None:
        self.folder, self.terms = folder, terms

    def path(self, run: Run) -> Path:
        return self.folder / f'{run.key}.json'

    def get(self, run: Run) -> dict[str, Any] | None:
        """The result of a run. Exits if it was made with other terms or settings."""
        path = self.path(run)
        if found := read_json(path):
            asked = dict(settings=run.settings(Terms(**self.terms['terms']))) if run.contestant in OURS else {}
            check_terms(path, found, self.terms | asked, 'give another --out')
        return found


def stages(results: Results, args: argparse.Namespace) -> Iterator[list[Run]]:
    """Runs that choose learning rates, then the runs of all contestants whose rate is chosen."""
    names = args.only or DEFAULT[args.kind]

    def rates(name: str) -> Sequence[float]:
        return race.RATES if name in PEERS else args.rates

    def tuned(name: str) -> list[Run]:
        count = len(rates(name))
        return [Run(args.kind, name, args.tune, rate, 0, tuning=True) for rate in rates(name)] if count > 1 else []

    sources = {name: (OURS[name].rate_of if name in OURS else None) or name for name in names}
    yield [run for name in dict.fromkeys(sources.values()) for run in tuned(name)]

    best: dict[str, float] = {}
    for name in sources.values():
        runs = tuned(name)
        found = {run.rate: held['bits'] for run in runs if (held := results.get(run))}
        if len(found) == len(runs):
            best[name] = min(found, key=found.__getitem__, default=rates(name)[0])
    yield [
        Run(args.kind, name, budget, best[source], seed)
        for budget in args.budgets for seed in range(args.seeds)
        for name, source in sources.items() if source in best
    ]  # fmt: skip


class Bench:
    """Makes the runs."""

    def __init__(self, args: argparse.Namespace, terms: Terms, results: Results) -> None:
        self.args, self.terms, self.results = args, terms, results
        self.began, self.lock = time.monotonic(), threading.Lock()
        self.pace = PACE
        self.corpus = load_text(args.data)
        self.spans = split(len(self.corpus), terms.held_out)

    def expected(self, run: Run) -> float:
        """Seconds."""
        seconds = run.budget if run.unit == 'seconds' else run.budget / self.pace
        return (1.1 * seconds + AROUND) * (not self.terms.toy)

    def begin(self, run: Run) -> bool:
        """Makes a run, if there is time. Returns whether it is done."""
        limit = self.args.time
        if limit is not None and time.monotonic() - self.began + self.expected(run) > 60 * limit:
            print(f'no time for {run.key}', flush=True)
            return False
        try:
            found = self.ours(run) if run.contestant in OURS else self.peer(run)
        except (SystemExit, subprocess.CalledProcessError) as error:
            # other contestants go on
            print(f'{run.key}: {error}', file=sys.stderr, flush=True)
            return False
        if run.unit == 'operations':
            self.pace = min(self.pace, found['operations'] / found['wall_seconds'])
        write_json(self.results.path(run), dict(asdict(run), unit=run.unit, **self.results.terms, **found))
        print(f'{run.key}: {found["bits"]:.4f} bits per byte, {found["steps"]:,} steps', flush=True)
        return True

    def ours(self, run: Run) -> dict[str, Any]:
        asked = dict(
            settings=run.settings(self.terms), terms=asdict(self.terms), data=self.args.data, budget=run.budget,
            unit=run.unit, split=run.split, moments=() if run.tuning else MOMENTS,
        )  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name('boundaries_run.py'))]
        printed, memory = race.call(command, json.dumps(asked), **CPU, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
        return dict(json.loads(printed.splitlines()[-1]), settings=asked['settings'], peak_bytes=memory)

    def peer(self, run: Run) -> dict[str, Any]:
        """A run of another package, on the same text and by the same clock."""
        peer, terms, span = PEERS[run.contestant], self.terms, self.spans[run.split]
        starts = [span.start + i * (len(span) // terms.streams) for i in range(terms.streams)]
        model = dict(peer.model, **(dict(seq_len=terms.length) if peer.builder == 'published' else {}))
        asked = dict(
            builder=peer.builder, model=model, batch=race.BATCH, threads=1, clock='process', seconds=run.budget,
            lr=run.rate, seed=run.seed, seq_len=terms.length, data=str(self.corpus.path),
            streams=[(start, start + terms.stream_bytes + 1) for start in starts], package=peer.package.split('==')[0],
            **{name: (span.start, span.stop) for name, span in self.spans.items()},
        )  # fmt: skip
        with self.lock:
            python = race.python_of(peer, self.args.environments)
        command = [python, str(Path(race.__file__).with_name('contestants.py'))]
        printed, memory = race.call(command, json.dumps(asked), PYTHONPATH=race.PEER_PATH, OMP_NUM_THREADS='1')
        found = json.loads(printed.splitlines()[-1])
        return dict(
            found, bits=found['streaming_bits'], seconds=found['train_seconds'], piece=[], tables=0, curve=[],
            readings=found['bytes'] / len(self.spans['train']), settings=dict(model=model), peak_bytes=memory,
        )  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('kind', choices=('race', 'scaling', 'report'))
    parser.add_argument('--data', nargs='+', metavar='FILE', help='files, folders or globs, read as one text')
    parser.add_argument(
        '--seconds', type=float, nargs='+', default=[600.0], help='processor time of each run of the race'
    )
    parser.add_argument(
        '--operations', type=float, nargs='+', default=list(BUDGETS), help='of each size of the scaling'
    )
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--rates', type=float, nargs='+', default=list(RATES), help='to choose from. One needs no runs')
    parser.add_argument('--tune', type=float, help='budget of runs that choose (default: 120 seconds, 1e12 operations)')
    parser.add_argument(
        '--only', nargs='+', choices=[*OURS, *PEERS], metavar='NAME', help=f'of: {"; ".join((*OURS, *PEERS))}'
    )
    parser.add_argument('--jobs', type=int, default=1, help='runs side by side, each on one core')
    parser.add_argument('--for', type=float, dest='time', metavar='MINUTES', help='start no run that would end later')
    parser.add_argument('--plan', action='store_true', help='list the runs that are left, and run nothing')
    parser.add_argument('--toy', action='store_true', help='tiny models and budgets, for tests')
    parser.add_argument(
        '--out', type=Path, help='folder (default: one of today in benchmarks/results; of a report, the latest)'
    )
    parser.add_argument('--environments', type=Path, default=DATA / 'race', help='folder of the peers')
    args = parser.parse_args(argv)
    if args.kind == 'report':
        return args
    if not args.data:
        parser.error('--data: give the text to read')
    if args.kind == 'scaling' and (others := {*PEERS, *(each.name for each in ONE_SIZE)}.intersection(args.only or ())):
        parser.error(f'--only: {", ".join(sorted(others))} has one size, and is for the race')
    if args.toy:
        args.seconds, args.operations = [0.3], [1e8, 2e8, 4e8]
    args.budgets = args.seconds if args.kind == 'race' else args.operations
    default = 120.0 if args.kind == 'race' else min(args.operations)
    args.tune = args.tune or (min(args.budgets) / 2 if args.toy else default)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # in the name of the folder
    torch.set_num_threads(1)
    if args.kind == 'report':
        from benchmarks.quality.boundaries_report import write_report

        write_report(args.out or latest_folder('boundaries'))
        return
    terms = TOY if args.toy else Terms()
    results = Results(
        args.out or new_folder('boundaries'), dict(data=[Path(each).name for each in args.data], terms=asdict(terms))
    )
    bench = None
    for stage in stages(results, args):
        left = [run for run in stage if results.get(run) is None]
        if args.plan:
            for run in left:
                print(run.key)
        elif left:
            try:
                bench = bench or Bench(args, terms, results)
            except (ValueError, OSError) as error:
                sys.exit(f'error: {error}')
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(bench.begin, left))


if __name__ == '__main__':
    main()
