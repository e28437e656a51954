"""A race: bits per byte of several models after the same wall-clock time, on the same cores, one after the other.

    python benchmarks/quality/race.py --data enwiki-articles.xml.bz2

Each run is a process of its own. A peer also has a virtual environment of its own. Each run leaves a file in the folder
of the results, and a race continues where it stopped. The files do not record the settings of a contestant: if you
change them, start again with another `--results`. `--for MINUTES` starts no run that would end later, and `--plan`
lists the runs that are left. Models train on the first 90 % of the corpus. The next 5 % chooses, and the last 5 % is
reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from benchmarks.common.machine import CPU, ROOT, commit, machine
from benchmarks.common.results import check_terms, new_folder, new_parser, read_json, write_json
from benchmarks.common.training import (
    DATA,
    NEVER,
    load_corpus,
    load_final,
    model_options,
    read_metrics,
    train_command,
)
from benchmarks.quality.contestants import matmul_pace, read_bytes, windowed_bits
from benchmarks.quality.resolutions import flat
from simple_hierarchical_transformer import HierarchicalTransformer

LENGTH, BATCH = 1024, 4
RATES = (1e-3, 3e-3)
# bytes of the last 5 % that are scored as a stream. A peer reads each byte in two windows
STREAMING_BYTES = 1 << 17
# bytes of the prompt of a sample, from the beginning of the last 5 %, and of its continuation
PROMPT, WRITTEN = 256, 768
# PYTHONPATH of peers: empty, because the published package has the name of this one
PEER_PATH = ''
# starts a run and writes its peak memory. A child process inherits the peak of its parent, so the parent is small
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], 'w') as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
# minutes of setting up and scoring, to decide whether a run still fits
AROUND = 2.0


@dataclass(frozen=True)
class Contestant:
    """A model of another package, or options of our train.py."""

    name: str
    package: str = ''
    builder: str = ''
    model: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return not self.package


@dataclass(frozen=True)
class Run:
    contestant: str
    minutes: float
    seed: int
    lr: float | None
    """None stands for the rate of the preset of train.py."""
    seq_len: int

    @property
    def key(self) -> str:
        name = self.contestant.replace(', ', '-').replace(' ', '-').replace('/', '-')
        rate = '' if self.lr is None else f'-lr{self.lr:g}'
        return f'{name}-{self.seq_len}-{self.minutes:g}m{rate}-seed{self.seed}'


PUBLISHED = 'simple-hierarchical-transformer==0.4.0'
# smaller versions of the shapes in their documentation: 3.5 to 9.5 M parameters
PEERS = [
    Contestant('published, flat', PUBLISHED, 'published', dict(dim=256, depth=4, heads=4)),
    Contestant('published, 1/2', PUBLISHED, 'published', dict(dim=256, depth=4, heads=4, hierarchies=(1, 2))),
    Contestant(
        'published, 1/4 stride 4', PUBLISHED, 'published',
        dict(dim=(128, 256), depth=4, heads=(2, 4), hierarchies=(1, 4), hierarchical_stride=(1, 4)),
    ),
    Contestant(
        'MEGABYTE', 'MEGABYTE-pytorch==0.3.6', 'megabyte',
        dict(dim=(256, 128), depth=(4, 2), heads=4, max_seq_len=(LENGTH // 4, 4), flash_attn=True),
    ),
    Contestant(
        'hourglass', 'hourglass-transformer-pytorch==0.0.6', 'hourglass',
        dict(dim=256, depth=(2, 4, 2), heads=4, shorten_factor=4, max_seq_len=LENGTH),
    ),
    Contestant(
        'x-transformers', 'x-transformers==2.31.10', 'x_transformers',
        dict(
            dim=256, depth=4, heads=4, max_seq_len=LENGTH,
            rotary_pos_emb=True, attn_flash=True, ff_swish=True, ff_glu=True,
        ),
    ),
]  # fmt: skip


def one_level(window: int | None) -> tuple[str, ...]:
    """Options of train.py for our flat model: the recipe of the preset, and layers of the same cost in one level."""
    return tuple(model_options({name: value for name, value in flat(window).items() if name != 'train'}))


PRESET = Contestant('ours, cpu preset')
FLAT = Contestant('ours, flat', options=one_level(None))
WINDOWED = Contestant('ours, flat, window of 64', options=one_level(64))
OURS = [FLAT, WINDOWED, PRESET]
LENGTHS: dict[int, tuple[str, ...]] = {
    LENGTH: (),
    4096: ('--seq-len', '4096', '--batch-size', '1'),
    16384: ('--seq-len', '16384', '--batch-size', '1'),
}
CONTESTANTS = {each.name: each for each in (*PEERS, *OURS)}


class Results:
    """One file for each finished run. `get` exits if a run was made with other settings than `terms`."""

    def __init__(self, folder: Path, terms: Mapping[str, Any] | None = None) -> None:
        self.folder, self.terms = folder, terms or {}

    def path(self, run: Run) -> Path:
        return self.folder / f'{run.key}.json'

    def get(self, run: Run) -> dict[str, Any] | None:
        path = self.path(run)
        if found := read_json(path):
            check_terms(path, found, self.terms, 'give another --results')
        return found

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob('*.json'))]


def stages(results: Results, minutes: Sequence[float], seeds: int) -> Iterator[list[Run]]:
    """The runs of the race, in order. A stage depends on the results of the stages before it.

    Args:
        results: of the runs so far.
        minutes: the short, the middle and the long budget.
        seeds: of each contestant.
    """
    short, middle, long = minutes

    def score(run: Run) -> float:
        found = results.get(run)
        assert found is not None
        return found['valid_bits']

    peers = [peer.name for peer in PEERS]
    ours = [each.name for each in OURS]
    yield [Run(name, short, 0, lr, LENGTH) for name in peers for lr in RATES]
    best_rate = {name: min(RATES, key=lambda lr, name=name: score(Run(name, short, 0, lr, LENGTH))) for name in peers}

    def of(names: Sequence[str], budget: float, count: int, seq_len: int | None = None) -> list[Run]:
        return [
            Run(name, budget, seed, best_rate.get(name), seq_len or LENGTH) for seed in range(count) for name in names
        ]

    yield of([*peers, *ours], short, seeds)
    ranked = sorted(peers, key=lambda name: statistics.mean(score(run) for run in of([name], short, seeds)))
    yield of([*ranked[:3], *ours], middle, seeds)
    best = min(ranked[:3], key=lambda name: statistics.mean(score(run) for run in of([name], middle, seeds)))
    lengths = list(LENGTHS)[1:]
    yield [
        # how early the preset reaches the score of the best peer
        *of([PRESET.name], 0.8 * short, seeds),
        *of([best, FLAT.name, PRESET.name], long, 1),
        *(run for seq_len in lengths for run in of(ours, middle, 1, seq_len)),
        *(run for seq_len in lengths for run in of([FLAT.name, PRESET.name], long, 1, seq_len)),
    ]


def python_of(contestant: Contestant, folder: Path) -> str:
    """The interpreter of a virtual environment with the package of the contestant. Creates a missing environment."""
    if contestant.ours:
        return sys.executable
    place = folder / contestant.package.replace('==', '-')
    python = place / 'bin' / 'python'
    if not (place / 'ready').exists():
        print(f'installing {contestant.package}', flush=True)
        subprocess.run([sys.executable, '-m', 'venv', str(place)], check=True)
        pinned = f'torch=={torch.__version__.split("+")[0]}'
        subprocess.run([str(python), '-m', 'pip', 'install', '-q', pinned, 'numpy', contestant.package], check=True)
        (place / 'ready').touch()
    return str(python)


def call(command: list[str], given: str = '', **environment: str) -> tuple[str, int]:
    """The standard output of a process, and its peak memory in bytes. Exits if the process fails."""
    with (
        tempfile.TemporaryFile('w+') as stdin,
        tempfile.TemporaryFile('w+') as stdout,
        tempfile.TemporaryFile('w+') as err,
        tempfile.NamedTemporaryFile('r') as peak,
    ):
        stdin.write(given)
        stdin.seek(0)
        launched = [sys.executable, '-S', '-c', LAUNCHER, peak.name, *command]
        code = subprocess.call(launched, stdin=stdin, stdout=stdout, stderr=err, env={**os.environ, **environment})
        for each in (stdout, err):
            each.seek(0)
        if code:
            sys.exit(f'{" ".join(command)} ended with {code}: {err.read()[-3000:]}')
        return stdout.read(), int(peak.read()) * 1024


class Race:
    """Makes the runs, on one corpus."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        corpus, self.spans = load_corpus(args.data, max(LENGTHS))
        self.data = args.data
        for name in ('valid', 'test'):
            self.spans[name] = self.spans[name][: args.score_bytes]
        environments = args.environments
        self.plain = environments / 'corpus'
        environments.mkdir(parents=True, exist_ok=True)
        self.plain.write_bytes(corpus[:].numpy().tobytes())
        self.results, self.environments = results, environments
        self.threads, self.streaming_bytes = args.threads, args.streaming_bytes

    def begin(self, run: Run) -> None:
        contestant = CONTESTANTS[run.contestant]
        result = self.ours(contestant, run) if contestant.ours else self.peer(contestant, run)
        held = dict(asdict(run), **self.results.terms, machine=machine(), **result)
        write_json(self.results.path(run), held)
        print(
            f'{run.key}: {result["bits"]:.3f} bits per byte, {result["streaming_bits"]:.3f} streaming, '
            f'{result["steps"]:,} steps, {result["parameters"] / 1e6:.2f} M',
            flush=True,
        )

    def peer(self, contestant: Contestant, run: Run) -> dict[str, Any]:
        model = dict(contestant.model)
        if contestant.builder == 'published':
            model['seq_len'] = run.seq_len
        asked = dict(
            asdict(run), builder=contestant.builder, model=model, batch=BATCH, threads=self.threads,
            seconds=60 * run.minutes, data=str(self.plain), streaming_bytes=self.streaming_bytes,
            package=contestant.package.split('==')[0],
            **{name: [span.start, span.stop] for name, span in self.spans.items()},
        )  # fmt: skip
        python = python_of(contestant, self.environments)
        command = [python, str(Path(__file__).with_name('contestants.py'))]
        printed, memory = call(command, json.dumps(asked), PYTHONPATH=PEER_PATH, OMP_NUM_THREADS=str(self.threads))
        return dict(json.loads(printed.splitlines()[-1]), peak_bytes=memory)

    def ours(self, contestant: Contestant, run: Run) -> dict[str, Any]:
        """A run of train.py, as a user starts it."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / 'run'
            command = train_command(
                'cpu', self.data, out, '--minutes', str(run.minutes), '--seed', str(run.seed), '--every', NEVER,
                '--valid-bytes', str(1 << 14), *LENGTHS[run.seq_len], *contestant.options,
            )  # fmt: skip
            before = matmul_pace()
            _, memory = call(command, **CPU, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(self.threads))
            pace = [before, matmul_pace()]
            last, model = read_metrics(out)[-1], load_final(out)
        valid, test = (
            read_bytes(str(self.plain), [self.spans[name].start - 1, self.spans[name].stop])
            for name in ('valid', 'test')
        )
        return dict(
            steps=int(last['step']),
            bytes=int(last['bytes']),
            train_seconds=60 * float(last['minutes']),
            pace=pace,
            parameters=sum(p.numel() for p in model.parameters()),
            valid_bits=windowed_bits(model, valid, run.seq_len),
            bits=windowed_bits(model, test, run.seq_len),
            streaming_bits=model.score(test[: self.streaming_bytes + 1].long()),
            sample=self.sample(model, test),
            version=commit(),
            torch=torch.__version__,
            peak_bytes=memory,
        )

    def sample(self, model: HierarchicalTransformer, text: Tensor) -> dict[str, str]:
        """The beginning of text that the model has never seen, and its continuation by the model."""
        prompt = text[:PROMPT].long()
        new = model.generate(prompt[None], WRITTEN, temperature=0.8, generator=torch.Generator().manual_seed(0))
        return {
            name: bytes(ids.tolist()).decode(errors='replace') for name, ids in (('prompt', prompt), ('text', new[0]))
        }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument('--data', default='enwik8', help='a value of train.py --data')
    parser.add_argument('--minutes', type=float, nargs=3, default=(5.0, 10.0, 30.0), metavar='MINUTES', help='budgets')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--only', nargs='+', choices=CONTESTANTS, help='run only these, and leave the others for later')
    parser.add_argument('--for', type=float, dest='time', metavar='MINUTES', help='start no run that would end later')
    parser.add_argument('--results', type=Path, help='folder (default: one of today in benchmarks/results)')
    parser.add_argument('--environments', type=Path, default=DATA / 'race', help='folder of the peers')
    parser.add_argument('--score-bytes', type=int, help='score less than the whole of each split')
    parser.add_argument('--streaming-bytes', type=int, default=STREAMING_BYTES)
    parser.add_argument(
        '--plan', action='store_true', help='list the runs that are left of this stage, and run nothing'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # our models are scored in this process
    torch.set_num_threads(args.threads)
    terms = dict(
        data=Path(args.data).name, threads=args.threads,
        score_bytes=args.score_bytes, streaming_bytes=args.streaming_bytes,
    )  # fmt: skip
    began, results = time.monotonic(), Results(args.results or new_folder('race'), terms)
    race = None
    for stage in stages(results, args.minutes, args.seeds):
        left = [run for run in stage if results.get(run) is None]
        for run in left:
            if args.only and run.contestant not in args.only:
                continue
            if args.plan:
                print(run.key)
                continue
            if args.time and time.monotonic() - began + 60 * (run.minutes + AROUND) > 60 * args.time:
                print(f'no time for {run.key}')
                continue
            try:
                race = race or Race(args, results)
            except (ValueError, OSError) as error:
                sys.exit(f'error: {error}')
            race.begin(run)
        if any(results.get(run) is None for run in stage):
            # the next stage depends on these
            return


if __name__ == '__main__':
    main()
