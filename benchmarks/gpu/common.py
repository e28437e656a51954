"""What the GPU benchmarks share: the models, a timed training step, the card's limits, and the file of results."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from side_by_side import ROOT
from torch import Tensor, nn
from torch.profiler import record_function

import simple_hierarchical_transformer
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.files import standard_library
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.compiled import compile_blocks
from simple_hierarchical_transformer.training.optim import build_optimizer
from simple_hierarchical_transformer.training.report import write_text
from simple_hierarchical_transformer.training.settings import BYTES, PRESETS

from .peers import PlainTransformer

PRESET = PRESETS['gpu']
CONTEXT, ROWS = PRESET['seq_len'], PRESET['batch_size']
WIDTH, HEAD = PRESET['model']['dim'], 64
WINDOW = PRESET['model']['window_sizes'][0]
TABLES = ('ngrams', 'word_ngrams', 'ngram_dropout', 'recall', 'word_recall')
PHASES = ('forward', 'backward', 'optimizer')
MODES = ('eager', 'compiled', 'whole')
WARM_UP = 3
GIGABYTE = 1e9

Settings = dict[str, Any]
Found = TypeVar('Found')


# models


def preset(width: int = WIDTH) -> Settings:
    """The `gpu` preset, or one of the same depths and another width."""
    return {**PRESET['model'], 'dim': width, 'heads': width // HEAD}


def flat(window: int | None, width: int = WIDTH, depth: int | None = None) -> Settings:
    """The preset's recipe in one level. By default with as many layers, so that it has about as many parameters."""
    depth = sum(PRESET['model']['depth']) if depth is None else depth
    return {**preset(width), 'depth': depth, 'hierarchies': 1, 'hierarchical_stride': 1, 'window_sizes': window}


def without_tables(settings: Settings) -> Settings:
    """Without the embeddings of n-grams and of what followed them before."""
    return {name: value for name, value in settings.items() if name not in TABLES}


# each takes a width
MODELS: dict[str, Callable[[int], Settings]] = {
    'preset': preset,
    'flat, window 64': lambda width: flat(WINDOW, width),
    'flat, full': lambda width: flat(None, width),
    'plain transformer': lambda width: dict(
        dim=width, depth=sum(PRESET['model']['depth']), heads=width // HEAD, dim_head=HEAD
    ),
    'preset, no tables': lambda width: without_tables(preset(width)),
    'flat, window 64, no tables': lambda width: without_tables(flat(WINDOW, width)),
    'flat, full, no tables': lambda width: without_tables(flat(None, width)),
}


def small(settings: Settings) -> Settings:
    """The same options at toy size."""
    depth: int | tuple[int, ...] = (1,) * len(settings['depth']) if isinstance(settings['depth'], tuple) else 1
    rows = dict(ngram_rows=256) if 'ngrams' in settings else {}
    return {**settings, 'dim': 32, 'heads': 2, 'dim_head': 16, 'depth': depth, **rows}


def build(name: str, context: int, width: int = WIDTH, toy: bool = False) -> nn.Module:
    """One of MODELS, on the default device. Its weights are the same each time."""
    settings = MODELS[name](width)
    settings = small(settings) if toy else settings
    torch.manual_seed(0)
    if name == 'plain transformer':
        return PlainTransformer(num_tokens=BYTES['num_tokens'], seq_len=context, **settings)
    return HierarchicalTransformer(**BYTES, seq_len=context, **settings)


def step_flops(model: nn.Module, length: int) -> float:
    """Operations of a training step on one sequence, forward and backward."""
    return model.step_flops(length) if isinstance(model, PlainTransformer) else cost.step_flops(model, length)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters in tables of n-grams and recall, of which a step reads a few rows, and all others."""
    tables = sum(p.numel() for name, p in model.named_parameters() if name.startswith(('ngram_emb', 'recall_emb')))
    return dict(parameters=sum(p.numel() for p in model.parameters()) - tables, table_parameters=tables)


def compile_model(model: nn.Module, how: str, mode: str, toy: bool = False) -> Any:
    """Compiled for one shape: 'compiled' has blocks compiled, as train.py does, 'whole' the model in one graph.

    At toy size graphs are traced and run without a compiler, which is quicker.
    """
    settings: dict[str, Any] = dict(dynamic=False, **(dict(backend='eager') if toy else dict(mode=mode)))
    if how == 'compiled' and isinstance(model, HierarchicalTransformer):
        compile_blocks(model, **settings)
        return model
    return torch.compile(model, **settings)


# text


def text(size: int) -> Tensor:
    """Bytes `(size,)`, uint8: source files of Python's standard library, since tables depend on what is read."""
    held = bytearray()
    for file in standard_library():
        held += file.read_bytes()
        if len(held) >= size:
            break
    return torch.frombuffer(held, dtype=torch.uint8)[:size]


def batches(rows: int, length: int, device: torch.device, count: int = 8) -> Iterator[Tensor]:
    """Ids `(rows, length + 1)`, without end: `count` batches, over and over, that are on the device beforehand."""
    source = text(max(1 << 22, 2 * length))
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(source) - length, (count, rows), generator=draw)
    held = source[starts[..., None] + torch.arange(length + 1)].long().to(device)
    while True:
        yield from held


# time


class Clock:
    """Seconds between marks: on CUDA of events in the stream, elsewhere of the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == 'cuda'
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Between each mark and the next. Waits for the device, and forgets the marks."""
        marks, self.marks = self.marks, []
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return [b - a for a, b in pairwise(marks)]


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 5, count: int = 10) -> float:
    """Seconds of one call: the median over repeats, each of `count` calls in a row, after a warm-up."""
    clock, found = Clock(device), []
    for repeat in range(repeats + 1):
        clock.mark()
        for _ in range(count):
            run()
        clock.mark()
        [span] = clock.spans()
        # the first warms up
        if repeat:
            found.append(span / count)
    return statistics.median(found)


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of square matrices: what shares of the peak are measured by."""
    # not zeros: a card draws less power for them, and runs faster
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second of a copy in the device's memory, read and written bytes together."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


# training


class Trainer:
    """A model in training under bf16 autocast, with the preset's optimizer. Each step is timed by phase.

    Args:
        model: on the device, `model(ids, return_loss=True)` gives the loss first.
        batches: ids of each step.
        how: one of MODES.
        compile_mode: for `torch.compile`.
    """

    def __init__(
        self, model: nn.Module, batches: Iterator[Tensor], *, how: str, compile_mode: str = 'default', toy: bool = False
    ) -> None:
        self.model, self.batches = model, batches
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(
            model, PRESET['optimizer'], lr=PRESET['lr'], table_lr=PRESET['table_lr'], weight_decay=0.1,
            sparse=how == 'eager',
        )  # fmt: skip
        # as in train.py: rows of tables move by a rule that knows no length of a gradient
        self.clipped = [p for group in self.optimizer.param_groups if group['rule'] != 'rows' for p in group['params']]
        self.call = model if how == 'eager' else compile_model(model, how, compile_mode, toy)
        self.clock = Clock(self.device)

    def step(self) -> Tensor:
        ids = next(self.batches)
        self.clock.mark()
        with record_function('forward'), torch.autocast(self.device.type, torch.bfloat16):
            loss, _ = self.call(ids, return_loss=True)
        self.clock.mark()
        with record_function('backward'):
            loss.backward()
        self.clock.mark()
        with record_function('optimizer'):
            nn.utils.clip_grad_norm_(self.clipped, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.clock.mark()
        return loss

    def warm_up(self) -> dict[str, float]:
        """Takes the first steps. Returns the seconds of the first, which compiles, and the last loss."""
        start = time.perf_counter()
        self.step()
        cost.wait(self.device)
        first = time.perf_counter() - start
        for _ in range(WARM_UP - 1):
            loss = self.step()
        self.clock.spans()
        return dict(first_step_seconds=first, loss=loss.item())

    def timed(self, steps: int) -> dict[str, float]:
        """Seconds of each phase and of a whole step: medians over so many."""
        for _ in range(steps):
            self.step()
        # three phases of a step, and what lies between it and the next
        spans = self.clock.spans()
        found = {phase: statistics.median(spans[i :: len(PHASES) + 1]) for i, phase in enumerate(PHASES)}
        whole = [sum(spans[i : i + len(PHASES)]) for i in range(0, len(spans), len(PHASES) + 1)]
        return dict(seconds=statistics.median(whole), **found)


def steps_within(trainer: Trainer, seconds: float, least: int = 3, most: int = 100) -> int:
    """How many steps fit into so many seconds."""
    return min(max(int(seconds / trainer.timed(least)['seconds']), least), most)


def alternate(trainers: dict[str, Trainer], rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Times of each, round by round, in which all take turns: so whatever the card does meanwhile meets all alike."""
    steps = {name: steps_within(trainer, seconds) for name, trainer in trainers.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            found[name].append(trainer.timed(steps[name]))
    return found


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each value over the rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


# a run and its results


@dataclass
class Left:
    """The time that is left of a run."""

    minutes: float
    began: float

    @property
    def seconds(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.began)


class Bench:
    """A run of one script: its device, its time, and its results, which are written again after each part.

    `found` is what the file holds. `about` says what it was measured on and how, `left_out` names the parts that time
    did not allow, and `failed` those that raised, with the error.
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
        """Adds what the card does at most: bf16 operations and copied bytes a second."""
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
        write_text(self.path, json.dumps(self.found, indent=1) + '\n')

    def part(
        self, name: str, measure: Callable[[], Found], *, kind: str = '', expected: float = 0.0, reserve: float = 0.0
    ) -> Found | None:
        """Runs a part and returns what it finds, or None where it has no time or fails.

        The file then says so, and the run goes on. A part needs `reserve` seconds and as long as the longest part of
        its kind took so far, or `expected` seconds if it is the first.
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
        """Writes the results and prints what people read first, last."""
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


def commit() -> str:
    try:
        found = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return 'unknown'
    return found.stdout.strip() or 'unknown'


def free(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0


def reset_peak(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else 0


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, with columns that stand below each other. Empty without rows."""
    if not rows:
        return ''
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ['| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in cells]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])


def trainer_of(bench: Bench, name: str, *, how: str, compile_mode: str, context: int, rows: int, width: int) -> Trainer:
    """One of MODELS in training on the bench's device."""
    model = build(name, context, width, bench.toy).to(bench.device)
    data = batches(rows, context, bench.device)
    return Trainer(model, data, how=how, compile_mode=compile_mode, toy=bench.toy)


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """With the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=9.0, help='leave out what does not fit (default: 9)')
    parser.add_argument('--toy', action='store_true', help='tiny models on the CPU, to see that the script runs')
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments as they were given."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(given)
    if not args.toy and not torch.cuda.is_available():
        parser.error('no CUDA device was found; --toy runs a tiny version on the CPU')
    return args, given
