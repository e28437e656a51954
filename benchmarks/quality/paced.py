"""Options of a model compared after the same training time, independently of other load on the machine.

The speed of a shared machine changes from minute to minute, by more than most options change it. So the steps of all
options are first timed in turns. Each option then trains by train.py for as many steps as fit into the time at that
pace.
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.machine import CPU, machine
from benchmarks.common.results import check_terms, latest_folder, new_folder, read_json, write_json
from benchmarks.common.timing import timed
from benchmarks.common.training import NEVER, load_corpus, load_final, model_options, read_metrics, train_command
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training.optim import WeightAverage, build_optimizer
from simple_hierarchical_transformer.training.settings import PRESETS, flag

# rounds of timing, and how reports describe them
ROUNDS = 61
CLOCK = f'{ROUNDS} rounds of a step on text'

# arguments of the model, and under the key `train` those of train.py
Options = Mapping[str, dict[str, Any]]
# training of an option that has no `train`
PLAIN: dict[str, Any] = dict(
    optimizer='adamw', lr=3e-3, table_lr=3e-3, schedule='cosine', warmup=0.03, weight_decay=0.1
)
Look = Callable[[str, HierarchicalTransformer], dict[str, Any]]


def split(option: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of an option for the model and for train.py.

    Arguments that the `cpu` preset sets and the option does not are given their defaults.
    """
    defaults = inspect.signature(HierarchicalTransformer).parameters
    model = {name: defaults[name].default for name in PRESETS['cpu']['model'] if name not in ('dim', 'depth')}
    model |= {name: value for name, value in option.items() if name != 'train'}
    return model, PLAIN | option.get('train', {})


def of_preset(name: str) -> dict[str, Any]:
    """A preset of train.py as an option."""
    preset = PRESETS[name]
    names = ('optimizer', 'lr', 'table_lr', 'schedule', 'warmup', 'weight_decay', 'clip', 'ema')
    return {**preset['model'], 'train': {key: preset[key] for key in names if key in preset}}


def pace(options: Options, default: str, *, data: str, length: int, batch: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a training step of the default, and the relative time of a step of each option.

    In each round every option takes one step on text of `data`, in random order. A time is divided by the total of its
    round, and the result is the median over the rounds. Options that compute the same share one measurement.
    """
    corpus, spans = load_corpus(data, length)
    room = spans['train'].stop - length
    works, steps = {}, {}
    for name, option in options.items():
        settings, flags = split(option)
        averages = flags.get('ema')
        works[name] = work = repr((sorted(settings.items()), flags['optimizer'], bool(averages)))
        if work in steps:
            continue
        torch.manual_seed(0)
        model = HierarchicalTransformer(num_tokens=256, ignore_index=-1, seq_len=length, **settings)
        optimizer = build_optimizer(model, flags['optimizer'], lr=1e-4, weight_decay=0.1)
        average = WeightAverage(model, averages) if averages else None

        def step(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            average: WeightAverage | None = average,
        ) -> None:
            clipped = [p for group in optimizer.param_groups if group['rule'] != 'rows' for p in group['params']]
            start = torch.randint(room, (batch,))
            ids = corpus.read(start, start + length + 1, length + 1, pad=0)
            model(ids, return_loss=True)[0].backward()
            nn.utils.clip_grad_norm_(clipped, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update()

        step()
        steps[work] = step
    base, order, draw = works[default], list(steps), random.Random(0)
    seconds: list[float] = []
    shares: dict[str, list[float]] = {work: [] for work in steps}
    for _ in range(ROUNDS):
        draw.shuffle(order)
        found = {work: timed(steps[work])[0] for work in order}
        seconds.append(found[base])
        for work, each in found.items():
            shares[work].append(each / sum(found.values()))
    middle = {work: statistics.median(each) for work, each in shares.items()}
    return 1000 * statistics.median(seconds), {name: middle[work] / middle[base] for name, work in works.items()}


def train(
    option: dict[str, Any],
    args: argparse.Namespace,
    *,
    seed: int,
    steps: int,
    length: int,
    batch: int,
    look: Callable[[HierarchicalTransformer], dict[str, Any]],
) -> dict[str, Any]:
    """The scores of one run of train.py, and what `look` returns for its model. The folder of the run is deleted."""
    model, flags = split(option)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'run'
        command = train_command(
            'cpu', args.data, out, '--seq-len', str(length), '--batch-size', str(batch), '--steps', str(steps),
            '--seed', str(seed), '--valid-bytes', str(args.valid_bytes), '--every', NEVER,
            *(text for name, value in flags.items() if value is not None for text in (flag(name), str(value))),
            *model_options(model),
        )  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **CPU})
        if result.returncode:
            sys.exit(f'{option}, seed {seed}: {result.stderr[-2000:]}')
        last, trained = read_metrics(out)[-1], load_final(out)
    return dict(
        bits=float(last['valid_bits_per_byte']),
        streaming=float(last['valid_streaming_bits_per_byte']),
        steps=int(last['step']),
        parameters=sum(p.numel() for p in trained.parameters()),
        tables=0 if trained.ngram_emb is None else trained.ngram_emb.weight.numel(),
        **look(trained),
    )


def add_arguments(
    parser: argparse.ArgumentParser, *, seeds: int, minutes: float | None = None, options: Options | None = None
) -> None:
    """Adds the arguments of all scripts that train by this module. `--only` chooses from `options`."""
    parser.add_argument('--data', default='enwik8', help='a value of train.py --data')
    if minutes is not None:
        parser.add_argument('--minutes', type=float, default=minutes, help='training time of each run')
    parser.add_argument('--seeds', type=int, default=seeds)
    parser.add_argument('--valid-bytes', type=int, default=1 << 15)
    if options is not None:
        parser.add_argument('--only', nargs='+', choices=options, help='run only these options and the default')
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of the results; a run continues what it finds there (default: a folder of today under '
        'benchmarks/results, with --report the latest one)',
    )
    parser.add_argument('--report', action='store_true', help='train nothing, only make tables and figures')


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, benchmark: str) -> argparse.Namespace:
    """The arguments, with a folder for the results."""
    args = parser.parse_args(argv)
    args.out = args.out or (latest_folder if args.report else new_folder)(benchmark)
    return args


def open_results(path: Path, args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The results at `path`, or an empty record. Exits if they were made with other arguments named in `names`."""
    held = read_json(path)
    if held is None and args.report:
        sys.exit(f'there are no results at {path}')
    asked = {name: getattr(args, name) for name in names} | dict(data=Path(args.data).name)
    if held and not args.report:
        check_terms(path, held, asked, 'move it away to start again')
    return held or dict(**asked, machine=machine(), runs={})


def steps_in_time(
    held: dict[str, Any],
    path: Path,
    options: Options,
    default: str,
    args: argparse.Namespace,
    *,
    length: int,
    batch: int,
) -> dict[str, int]:
    """The number of steps of each option that fit into `--minutes`. Earlier measurements in `held` stay."""
    if set(options) - set(held.setdefault('pace', {})):
        ms, ratios = pace(options, default, data=args.data, length=length, batch=batch)
        held['ms'], held['pace'] = held.get('ms', ms), ratios | held['pace']
        held.setdefault('clock', CLOCK)
        write_json(path, held)
    return {name: max(round(60_000 * held['minutes'] / (held['ms'] * held['pace'][name])), 1) for name in options}


def train_all(
    held: dict[str, Any],
    path: Path,
    options: Options,
    steps: Mapping[str, int],
    args: argparse.Namespace,
    *,
    length: int,
    batch: int,
    look: Look = lambda *_: {},
) -> None:
    """Trains each option with each seed, unless `held` has the run. Writes `path` after each run."""
    for seed in range(args.seeds):
        for name in options:
            done = held['runs'].setdefault(name, {})
            if str(seed) in done:
                continue

            def look_at(model: HierarchicalTransformer, name: str = name) -> dict[str, Any]:
                return look(name, model)

            done[str(seed)] = found = train(
                options[name], args, seed=seed, steps=steps[name], length=length, batch=batch, look=look_at
            )
            write_json(path, held)
            print(f'{name}, seed {seed}: {found["bits"]:.3f}, {found["steps"]} steps', flush=True)


def run_all(
    args: argparse.Namespace,
    options: Options,
    default: str,
    path: Path,
    *,
    length: int,
    batch: int,
    look: Look = lambda *_: {},
) -> dict[str, Any]:
    """Compares options with a default after the same time. Returns the contents of `path`."""
    held = open_results(path, args, 'minutes', 'valid_bytes')
    if not args.report:
        names = list(dict.fromkeys([default, *(args.only or options)]))
        chosen = {name: options[name] for name in names}
        steps = steps_in_time(held, path, chosen, default, args, length=length, batch=batch)
        train_all(held, path, chosen, steps, args, length=length, batch=batch, look=look)
    if not held['runs'].get(default):
        sys.exit(f'{path} has no run of the default to compare with')
    return held
