"""The race: bits per byte that contestants reach in the same wall-clock time, on the same cores, one after the other.

python benchmarks/race.py --data enwiki-articles.xml.bz2

Each run is a process of its own, that of a peer in a virtual environment of its own, and leaves a file in race/: the
race goes on where it stopped. What a contestant is made of is not kept: whoever changes one begins anew, with another
--results. --for MINUTES begins no run that would not end in that time, --plan says what is left.
Trains on the first 90 % of the corpus, chooses by the next 5 %, and reports the last 5 %.
"""

from __future__ import annotations

import argparse
import csv
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

import torch
from contestants import matmul_pace, read_bytes, windowed_bits
from paced import CPU, refuse_others
from resolutions import flat
from side_by_side import ROOT, machine
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import split_bytes
from simple_hierarchical_transformer.training.report import write_text
from simple_hierarchical_transformer.training.sources import load_sources

HERE = Path(__file__).resolve().parent
LENGTH, BATCH = 1024, 4
RATES = (1e-3, 3e-3)
# of the last 5 %, as a stream; each byte of a peer's takes two windows
STREAMING_BYTES = 1 << 17
# of a sample, which goes on from the beginning of the last 5 %
PROMPT, WRITTEN = 256, 768
# where peers find modules besides their own: nowhere, since the published package has the name of this one
PEER_PATH = ''
# between the race and a run, since a process counts as its peak what the one that started it once held
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], 'w') as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
# of setting up and scoring, in minutes, to know whether a run still fits
AROUND = 2.0


@dataclass(frozen=True)
class Contestant:
    """A model of others with its package, or settings of our train.py."""

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
    """None is what train.py's preset has."""
    seq_len: int

    @property
    def key(self) -> str:
        name = self.contestant.replace(', ', '-').replace(' ', '-').replace('/', '-')
        rate = '' if self.lr is None else f'-lr{self.lr:g}'
        return f'{name}-{self.seq_len}-{self.minutes:g}m{rate}-seed{self.seed}'


PUBLISHED = 'simple-hierarchical-transformer==0.4.0'
# shapes of their documentation in smaller sizes: 3.5 to 9.5 M parameters
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
    """Options of train.py for our flat model: the preset's recipe, and layers of the same cost in one level."""
    return ('--model', *(f'{name}={value}' for name, value in flat(window).items() if name != 'train'))


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
    """One file for each run that is done. Those that were made on other terms than `terms` are no part of this race."""

    def __init__(self, folder: Path, terms: Mapping[str, Any] | None = None) -> None:
        self.folder, self.terms = folder, terms or {}

    def path(self, run: Run) -> Path:
        return self.folder / f'{run.key}.json'

    def get(self, run: Run) -> dict[str, Any] | None:
        path = self.path(run)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        refuse_others(path, found, self.terms, 'give another --results')
        return found

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob('*.json'))]


def stages(results: Results, minutes: Sequence[float], seeds: int) -> Iterator[list[Run]]:
    """What is to be run, in order: each stage is known once those before it are done.

    `minutes` are the short, the middle and the long budget.
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
        # how soon ours are where the best peer ends
        *of([PRESET.name], 0.8 * short, seeds),
        *of([best, FLAT.name, PRESET.name], long, 1),
        *(run for seq_len in lengths for run in of(ours, middle, 1, seq_len)),
        *(run for seq_len in lengths for run in of([FLAT.name, PRESET.name], long, 1, seq_len)),
    ]


def python_of(contestant: Contestant, folder: Path) -> str:
    """The interpreter of a virtual environment that has the contestant's package, made where there is none."""
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
    """What a process printed, and the most memory that it took, in bytes."""
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
    """The corpus, its splits, and how a run is made."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        [corpus], _ = load_sources([args.data], ROOT / 'data', text_key='text', say=print)
        self.data = args.data
        self.spans = split_bytes(len(corpus), seq_len=max(LENGTHS))
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
        self.results.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.results.path(run), json.dumps(held, indent=1) + '\n')
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
        command = [python, str(HERE / 'contestants.py')]
        printed, memory = call(command, json.dumps(asked), PYTHONPATH=PEER_PATH, OMP_NUM_THREADS=str(self.threads))
        return dict(json.loads(printed.splitlines()[-1]), peak_bytes=memory)

    def ours(self, contestant: Contestant, run: Run) -> dict[str, Any]:
        """By train.py as a user runs it."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / 'run'
            command = [
                sys.executable, str(ROOT / 'train.py'), '--preset', 'cpu', '--data', self.data,
                '--minutes', str(run.minutes), '--seed', str(run.seed), '--every', str(10**9),
                '--checkpoint-every', str(10**9), '--valid-bytes', str(1 << 14), '--out', str(out),
                *LENGTHS[run.seq_len], *contestant.options,
            ]  # fmt: skip
            before = matmul_pace()
            _, memory = call(command, **CPU, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(self.threads))
            pace = [before, matmul_pace()]
            with open(out / 'metrics.csv', encoding='utf-8') as file:
                last = list(csv.DictReader(file))[-1]
            model = HierarchicalTransformer.from_pretrained(out / 'final')
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
            sample=self.goes_on(model, test),
            version=commit(),
            torch=torch.__version__,
            peak_bytes=memory,
        )

    def goes_on(self, model: HierarchicalTransformer, text: Tensor) -> dict[str, str]:
        """Text that begins what the model never saw, and how it would go on."""
        prompt = text[:PROMPT].long()
        new = model.generate(prompt[None], WRITTEN, temperature=0.8, generator=torch.Generator().manual_seed(0))
        return {
            name: bytes(ids.tolist()).decode(errors='replace') for name, ids in (('prompt', prompt), ('text', new[0]))
        }


def commit() -> str:
    found = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or 'unknown'


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='enwik8', help='what train.py --data takes')
    parser.add_argument('--minutes', type=float, nargs=3, default=(5.0, 10.0, 30.0), metavar='MINUTES', help='budgets')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--only', nargs='+', choices=CONTESTANTS, help='leave the others for later')
    parser.add_argument('--for', type=float, dest='time', metavar='MINUTES', help='begin no run that would end later')
    parser.add_argument('--results', type=Path, default=HERE / 'race')
    parser.add_argument('--environments', type=Path, default=ROOT / 'data' / 'race', help='of the peers')
    parser.add_argument('--score-bytes', type=int, help='of each split, for a look (default: all)')
    parser.add_argument('--streaming-bytes', type=int, default=STREAMING_BYTES)
    parser.add_argument('--plan', action='store_true', help='say what is left of the stage at hand, run nothing')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # of what is measured in this process, too
    torch.set_num_threads(args.threads)
    terms = dict(
        data=Path(args.data).name, threads=args.threads,
        score_bytes=args.score_bytes, streaming_bytes=args.streaming_bytes,
    )  # fmt: skip
    began, results = time.monotonic(), Results(args.results, terms)
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
            # what comes after hangs on these
            return


if __name__ == '__main__':
    main()
