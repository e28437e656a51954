"""Options of a model compared at equal time, whatever else the machine does: steps are timed first, all in turns.

A machine's pace moves from minute to minute, by more than most options do. So each option's step is timed beside the
default's, round by round, and each then trains, by train.py, for as many steps as fit into the time at that pace.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
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
from side_by_side import ROOT, machine, timed
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import split_bytes
from simple_hierarchical_transformer.training.optim import WeightAverage, build_optimizer
from simple_hierarchical_transformer.training.report import replace_file, write_text
from simple_hierarchical_transformer.training.settings import PRESETS, flag
from simple_hierarchical_transformer.training.sources import load_sources

HERE = Path(__file__).resolve().parent
# of the clock
ROUNDS = 61
CLOCK = f'{ROUNDS} rounds of a step on text'
# the figures are the processor's; a model that found a GPU would be another one, in another precision
CPU = dict(ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')

# arguments of the model, and under `train` those of train.py
Options = Mapping[str, dict[str, Any]]
# what trains an option that says nothing else
PLAIN: dict[str, Any] = dict(
    optimizer='adamw', lr=3e-3, table_lr=3e-3, schedule='cosine', warmup=0.03, weight_decay=0.1
)


def split(option: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An option's arguments of the model, those that the preset has at their defaults, and those of train.py."""
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
    """Milliseconds of a step of the default, and how many times that a step of each takes.

    Medians over rounds, in each of which all take a step on text of `data`, in an order of chance, and times are those
    relative to the round. What computes the same counts as one.
    """
    [corpus], _ = load_sources([data], ROOT / 'data', text_key='text', say=print)
    room = split_bytes(len(corpus), seq_len=length)['train'].stop - length
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
    base, order, chance = works[default], list(steps), random.Random(0)
    seconds: list[float] = []
    shares: dict[str, list[float]] = {work: [] for work in steps}
    for _ in range(ROUNDS):
        chance.shuffle(order)
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
    """One run of train.py, in a folder that goes when it has been read, and what `look` finds in its model."""
    model, flags = split(option)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'run'
        command = [
            sys.executable, str(ROOT / 'train.py'), '--preset', 'cpu', '--data', args.data, '--seq-len', str(length),
            '--batch-size', str(batch), '--steps', str(steps), '--seed', str(seed),
            '--valid-bytes', str(args.valid_bytes), '--every', str(10**9), '--checkpoint-every', str(10**9),
            *(text for name, value in flags.items() if value is not None for text in (flag(name), str(value))),
            '--out', str(out), '--model', *(f'{key}={value}' for key, value in model.items()),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **CPU})
        if result.returncode:
            sys.exit(f'{option}, seed {seed}: {result.stderr[-2000:]}')
        with open(out / 'metrics.csv', encoding='utf-8') as file:
            last = list(csv.DictReader(file))[-1]
        trained = HierarchicalTransformer.from_pretrained(out / 'final')
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
    """What the scripts that train by paced.py are asked. `options` are those that may be left for later."""
    parser.add_argument('--data', default='enwik8', help='what train.py --data takes')
    if minutes is not None:
        parser.add_argument('--minutes', type=float, default=minutes, help='of training, for each run')
    parser.add_argument('--seeds', type=int, default=seeds)
    parser.add_argument('--valid-bytes', type=int, default=1 << 15)
    if options is not None:
        parser.add_argument('--only', nargs='+', choices=options, help='some of the options, and the default')
    parser.add_argument('--out', type=Path, default=HERE, help='folder of the results, and of what is made of them')
    parser.add_argument('--report', action='store_true', help='train nothing')


def refuse_others(path: Path, held: Mapping[str, Any], asked: Mapping[str, Any], way_out: str) -> None:
    """Ends where what `path` holds was made on other terms than those that are asked."""
    made = {name: held.get(name) for name in asked}
    if made != asked:
        sys.exit(f'{path} was made with {made}, and now is asked {asked}: {way_out}')


def open_results(path: Path, args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What `path` holds, or a beginning of it. Refused where it was made with other arguments than `names` now have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        held: dict[str, Any] = json.loads(path.read_text())
    elif args.report:
        sys.exit(f'there is no {path} to make a report of')
    else:
        held = {}
    asked = {name: getattr(args, name) for name in names} | dict(data=Path(args.data).name)
    if not args.report and held:
        refuse_others(path, held, asked, 'move it away to begin anew')
    return held or dict(**asked, machine=machine(), runs={})


def save(path: Path, held: dict[str, Any]) -> None:
    write_text(path, json.dumps(held, indent=1) + '\n')


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
    """How many steps of each option fit into the minutes that were asked. What was timed before stays as it was."""
    if set(options) - set(held.setdefault('pace', {})):
        ms, ratios = pace(options, default, data=args.data, length=length, batch=batch)
        held['ms'], held['pace'] = held.get('ms', ms), ratios | held['pace']
        held.setdefault('clock', CLOCK)
        save(path, held)
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
    look: Callable[[str, HierarchicalTransformer], dict[str, Any]] = lambda *_: {},
) -> None:
    """All runs that are asked for, each written to `path` once it is done; those that stand there are kept."""
    for seed in range(args.seeds):
        for name in options:
            done = held['runs'].setdefault(name, {})
            if str(seed) not in done:

                def look_at(model: HierarchicalTransformer, name: str = name) -> dict[str, Any]:
                    return look(name, model)

                done[str(seed)] = found = train(
                    options[name], args, seed=seed, steps=steps[name], length=length, batch=batch, look=look_at
                )
                save(path, held)
                print(f'{name}, seed {seed}: {found["bits"]:.3f}, {found["steps"]} steps', flush=True)


def run_all(
    args: argparse.Namespace,
    options: Options,
    default: str,
    path: Path,
    *,
    length: int,
    batch: int,
    look: Callable[[str, HierarchicalTransformer], dict[str, Any]] = lambda *_: {},
) -> dict[str, Any]:
    """Options compared with a default at equal time: what `path` holds once all runs are done."""
    held = open_results(path, args, 'minutes', 'valid_bytes')
    if not args.report:
        names = list(dict.fromkeys([default, *(args.only or options)]))
        chosen = {name: options[name] for name in names}
        steps = steps_in_time(held, path, chosen, default, args, length=length, batch=batch)
        train_all(held, path, chosen, steps, args, length=length, batch=batch, look=look)
    if not held['runs'].get(default):
        sys.exit(f'{path} has no run of the default to compare with')
    return held


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(values: list[float]) -> str:
    """Mean and spread; of one value there is no spread."""
    mean, spread = mean_and_spread(values)
    return f'{mean:.3f} ± {spread:.3f}' if len(values) > 1 else f'{mean:.3f}'


def differences(runs: dict[str, Any], default: str) -> dict[str, list[float]]:
    """Bits per byte of each option above those of the default, seed by seed."""
    base = runs[default]
    return {
        name: [run['bits'] - base[seed]['bits'] for seed, run in found.items() if seed in base]
        for name, found in runs.items()
    }


def chance(apart: dict[str, list[float]], default: str) -> float:
    """How far apart from the default a mean over seeds comes to be by chance, 99 times in 100.

    2.7 times its standard error, and that by the spread of all options' differences together: a few of one option's
    say too little of how far they spread.
    """
    others = [found for name, found in apart.items() if name != default and len(found) > 1]
    if not others:
        return 0.0
    return 2.7 * math.sqrt(statistics.mean(statistics.variance(found) / len(found) for found in others))


def table(held: dict[str, Any], options: Options, default: str) -> list[str]:
    """A line for each option, the best first."""
    apart = differences(held['runs'], default)
    reach = chance(apart, default)
    rows = []
    for name in (name for name in options if name in held['runs']):
        found = list(held['runs'][name].values())
        delta, delta_spread = mean_and_spread(apart[name])
        says = 'chance' if abs(delta) <= reach else 'helps' if delta < 0 else 'hurts'
        if not reach:
            # one seed says nothing of chance
            says = ''
        cells = [
            name,
            plus_minus([run['bits'] for run in found]),
            '' if name == default else f'{delta:+.3f} ± {delta_spread:.3f}',
            '' if name == default else says,
            f'{held["ms"] * held["pace"][name]:.0f}',
            f'{found[0]["steps"]:,}',
            f'{found[0]["parameters"] / 1e6:.2f}',
        ]
        rows.append((delta, f'| {" | ".join(cells)} |'))
    return [
        '| option | bits per byte | to the default | | ms a step | steps | parameters, M |',
        '|---|---|---|---|---|---|---|',
        *(row for _, row in sorted(rows)),
    ]


def protocol(held: dict[str, Any], script: str, base: dict[str, Any], default: str, *, length: int, batch: int) -> str:
    """How the runs were made, for above their table."""
    sizes = ', '.join(f'`{key} = {value!r}`' for key, value in base.items() if key != 'train')
    _, flags = split(base)
    learning = ' '.join(f'{flag(name)} {value}' for name, value in flags.items() if value is not None)
    runs, minutes = held['runs'], held['minutes']
    reach = chance(differences(runs, default), default)
    return (
        f'Validation bits per byte after {minutes:g} minutes of training, {len(runs[default])} seeds: mean and '
        f'standard deviation; the difference to the default is taken seed by seed. {held["machine"]}. Made by `python '
        f'benchmarks/{script} --data {held["data"]} --minutes {minutes:g} --seeds {len(runs[default])}`.\n\n'
        f'All runs are by `train.py {learning}` ({batch} x {length} bytes a step), {held["valid_bytes"]:,} bytes '
        f'of the validation split, in windows of {length}, with the model {sizes}, and one option changed. Steps were '
        f'timed first, all options in turns ({held["clock"]}, medians), and each '
        'option then had as many as fit into the time at its pace: it pays for what it costs, and not for what '
        f'else the machine had to do. Sorted by the difference. A mean within {reach:.3f} of the default is called '
        'chance: 2.7 standard errors, by the spread of all differences together.'
    )


def draw(path: Path, held: dict[str, Any], default: str) -> None:
    """The differences to the default, run by run."""
    from matplotlib.figure import Figure

    apart = differences(held['runs'], default)
    reach = chance(apart, default)
    found = {name: each for name, each in apart.items() if name != default}
    names = sorted(found, key=lambda name: statistics.mean(found[name]))
    figure = Figure(figsize=(8, 0.3 * len(names) + 1.2), layout='constrained')
    axes = figure.subplots()
    for y, name in enumerate(names):
        axes.plot(found[name], [y] * len(found[name]), 'o', color='tab:blue', alpha=0.4, markersize=5)
        axes.plot(statistics.mean(found[name]), y, '|', color='black', markersize=14)
    axes.axvspan(-reach, reach, color='gray', alpha=0.2, label='chance')
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel='bits per byte above the default (left is better)')
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='upper right')
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))
