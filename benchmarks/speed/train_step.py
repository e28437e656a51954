"""The time and memory of a training step, against the published package 0.4.0.

    python benchmarks/speed/train_step.py --published PYTHON

PYTHON is an interpreter with simple-hierarchical-transformer==0.4.0. Each package runs each model in a process of its
own. The processes take turns, and the table holds medians. Writes train_step.md and a figure. Without `--published`,
only this package is measured.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.common.machine import machine
from benchmarks.common.models import PUBLISHED, PUBLISHED_TRAIN, README_1, README_3, README_PLAIN, TOY, Settings
from benchmarks.common.plots import new_figure, save_figure
from benchmarks.common.results import new_folder, new_parser, write_lines
from benchmarks.common.tables import line, markdown
from benchmarks.common.timing import timed
from benchmarks.common.workers import Worker, serve

# a step reads seq_len ids and predicts all but the first, batch 1
CONFIGS: dict[str, Settings] = {
    f'A: {README_1}': PUBLISHED[README_1],
    f'B: {README_PLAIN}': PUBLISHED[README_PLAIN],
    f'C: {README_3}': PUBLISHED[README_3],
    f'T: {PUBLISHED_TRAIN}': PUBLISHED[PUBLISHED_TRAIN],
    'S: small': dict(num_tokens=256, dim=256, depth=4, seq_len=2048, hierarchies=(1, 4), window_sizes=(64, None)),
    'A, smaller': dict(
        num_tokens=5000, dim=256, depth=3, seq_len=1024, hierarchies=(1, 2, 8), window_sizes=(32, 64, None)
    ),
    'T, smaller': dict(num_tokens=256, dim=512, depth=4, seq_len=1024, hierarchies=(1, 2), window_sizes=(32, 64)),
}
LONG: Settings = dict(
    num_tokens=256,
    dim=256,
    depth=4,
    seq_len=65536,
    hierarchies=(1, 8, 64),
    hierarchical_stride=(1, 8, 64),
    window_sizes=(64, 64, None),
)
LONG_LENGTHS = (16384, 65536)
HUGE_PAGES = {'THP_MEM_ALLOC_ENABLE': '1'}
# wall-clock seconds, and seconds that all cores spend outside of the kernel
KEYS = ('seconds', 'user')
HEAD = (
    'model', 'published 0.4.0, s', 'here, s', 'ratio', 'published, GB', 'here, GB', 'ratio', 'TFLOP a step', 'GFLOP/s',
    'of the peak',
)  # fmt: skip


def worker(settings: str) -> None:
    """Answers with the seconds, the processor time and the peak memory of a step on `n` ids."""
    from simple_hierarchical_transformer import HierarchicalTransformer

    config = literal_eval(settings)
    torch.manual_seed(0)
    model = HierarchicalTransformer(**config)

    def step(n: int) -> dict[str, float]:
        ids = torch.randint(1, config['num_tokens'], (1, n + 1), generator=torch.Generator().manual_seed(0))

        def run() -> float:
            loss, _ = model(ids[:, :n], return_loss=True)
            loss.backward()
            return loss.item()

        model.zero_grad()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        seconds, loss = timed(run)
        used = resource.getrusage(resource.RUSAGE_SELF)
        return dict(seconds=seconds, user=used.ru_utime - before, loss=loss, peak=used.ru_maxrss * 1024)

    serve(step)


def start(config: Settings, **settings: Any) -> Worker:
    return Worker('benchmarks.speed.train_step', 'worker', repr(config), **settings)


def measure(config: Settings, published: str | None, rounds: int) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Steps of each package in turns, and the highest rate of a matrix product in between, in operations per second."""
    from simple_hierarchical_transformer.training.cost import matmul_peak

    workers = {'here': start(config)}
    if published:
        workers['published'] = start(config, python=published)
    measured: dict[str, list[dict[str, float]]] = {who: [] for who in workers}
    peaks = []
    for turn in range(rounds + 1):
        for who, each in workers.items():
            answer = each.ask(n=config['seq_len'])
            # the first step allocates memory
            if turn:
                measured[who].append(answer)
        peaks.append(matmul_peak(torch.device('cpu')))
    for each in workers.values():
        each.close()
    return measured, max(peaks)


def compare(name: str, config: Settings, args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    """The row of a model, and the values of its bars: seconds and GB of the published package and of this one."""
    from simple_hierarchical_transformer import HierarchicalTransformer
    from simple_hierarchical_transformer.training.cost import step_flops

    measured, peak = measure(config, args.published, args.rounds)
    seconds = {who: statistics.median(step['seconds'] for step in steps) for who, steps in measured.items()}
    memory = {who: steps[-1]['peak'] / 1e9 for who, steps in measured.items()}
    with torch.device('meta'):
        flops = step_flops(HierarchicalTransformer(**config), config['seq_len'] - 1)
    rate = flops / seconds['here']
    bars, (theirs, larger, times, sizes) = None, [''] * 4
    if args.published:
        theirs, larger = f'{seconds["published"]:.2f}', f'{memory["published"]:.2f}'
        times = f'**{seconds["published"] / seconds["here"]:.1f}x**'
        sizes = f'**{memory["here"] / memory["published"]:.2f}**'
        bars = [seconds['published'], seconds['here'], memory['published'], memory['here']]
    row = [
        name, theirs, f'{seconds["here"]:.2f}', times, larger, f'{memory["here"]:.2f}', sizes, f'{flops / 1e12:.2f}',
        f'{rate / 1e9:.0f} of {peak / 1e9:.0f}', f'**{100 * rate / peak:.0f} %**',
    ]  # fmt: skip
    return row, bars


def long_sequences(config: Settings, lengths: tuple[int, int]) -> list[str]:
    """The text and the table on long sequences, which only this package is measured on."""
    rows = []
    for label, environment in (('default', {}), ('`THP_MEM_ALLOC_ENABLE=1`', HUGE_PAGES)):
        each = start(config, **environment)
        short, long = ([each.ask(n=n) for _ in range(3)][1:] for n in lengths)
        each.close()
        (a, b), (c, d) = ([statistics.median(s[key] for s in runs) for runs in (short, long)] for key in KEYS)
        rows.append(
            (label, f'{a:.1f}', f'{b:.1f}', f'**{b / a:.2f}x**', f'{c:.1f} and {d:.1f}', f'{d / c:.2f}x',
             f'{long[-1]["peak"] / 1e9:.1f}')
        )  # fmt: skip
    head = ('', *(f'{n:,} ids, s' for n in lengths), 'ratio', 'processor time outside of the kernel, s', 'ratio', 'GB')
    return [
        f'Long sequences ({", ".join(f"{key} {value}" for key, value in config.items())}). The system clears the '
        'memory of such long tensors page by page, each time that they are allocated. This time in the kernel grows '
        'faster than the length. With `THP_MEM_ALLOC_ENABLE=1` PyTorch asks for huge pages.',
        '',
        *markdown(head, rows),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument('--published', metavar='PYTHON', help='an interpreter with the published package 0.4.0')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--only', help='models whose names start with this; writes no files')
    parser.add_argument('--toy', action='store_true', help='tiny models, to see that the script runs')
    parser.add_argument('--out', type=Path, help='folder of the results (default: one of today in benchmarks/results)')
    args = parser.parse_args(argv)

    rows: list[list[str]] = []
    bars: dict[str, list[float]] = {}
    print('\n'.join(markdown(HEAD, [])), flush=True)
    configs = {name: config for name, config in CONFIGS.items() if not args.only or name.startswith(args.only)}
    if args.toy:
        configs = {name: {**config, **TOY} for name, config in configs.items()}
    for name, config in configs.items():
        row, values = compare(name, config, args)
        rows.append(row)
        if values:
            bars[name] = values
        print(line(row), flush=True)
    if args.only:
        return

    name, config = next(iter(configs.items()))
    each = start({**config, 'gradient_checkpointing': True})
    step = [each.ask(n=config['seq_len']) for _ in range(2)][-1]
    each.close()
    share = f', {step["peak"] / 1e9 / bars[name][2]:.2f} of the published' if bars else ''
    long_model, lengths = ({**LONG, **TOY, 'seq_len': 512}, (128, 512)) if args.toy else (LONG, LONG_LENGTHS)
    long = long_sequences(long_model, lengths)
    print('\n'.join(long))
    if args.toy and not args.out:
        return

    folder = args.out or new_folder('train_step')
    command = 'python benchmarks/speed/train_step.py' + ' --published PYTHON' * bool(args.published)
    lines = [
        '# A training step',
        '',
        f'`{command}`, {machine()}. Forward and backward, batch 1. The machine is shared, so the packages take turns, '
        'and the figures are medians. The peak is the best rate of a matrix product (2048 x 2048 x 2048) in between.',
        '',
        *markdown(HEAD, rows),
        '',
        f'{name} with `gradient_checkpointing = True`: {step["peak"] / 1e9:.2f} GB{share}.',
        '',
        *long,
    ]
    if bars:
        draw(bars, folder / 'train_step.png')
        lines += ['', '![time and memory of a step](train_step.png)']
    write_lines(folder / 'train_step.md', lines)


def draw(bars: dict[str, list[float]], path: Path) -> None:
    figure = new_figure(10, 4)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(bars)
    for axis, first, label in zip(axes, (0, 2), ('seconds a step', 'peak memory, GB'), strict=True):
        for offset, column, who in ((-0.2, first, 'published 0.4.0'), (0.2, first + 1, 'here')):
            places = [i + offset for i in range(len(names))]
            axis.barh(places, [bars[name][column] for name in names], height=0.4, label=who)
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        axis.grid(axis='x', alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend()
    save_figure(figure, path)


if __name__ == '__main__':
    main()
