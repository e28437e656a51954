"""How fast a step of training is, and how much memory it takes, beside the published package 0.4.0.

    python benchmarks/train_step.py --published PYTHON

PYTHON is an interpreter with simple-hierarchical-transformer==0.4.0. Each package runs each configuration in a process
of its own; they take turns (A B A B ...), and medians are reported. Writes a table to benchmarks/train_step.md and a
picture beside it. Without --published, only this package is measured.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import torch
from side_by_side import Worker, machine, serve, timed

HERE = Path(__file__).resolve().parent

# constructor arguments; a step reads seq_len ids and predicts all but the first, batch 1
CONFIGS: dict[str, dict[str, Any]] = {
    'A: README example 1': dict(
        num_tokens=20000, dim=512, depth=6, seq_len=2048, hierarchies=(1, 2, 8), window_sizes=(32, 64, None)
    ),
    'B: README plain GPT': dict(num_tokens=20000, dim=512, depth=8, seq_len=2048),
    'C: README example 3': dict(
        num_tokens=256,
        dim=(128, 256, 512, 1024),
        depth=8,
        seq_len=1024,
        ff_mult=(2, 2, 4, 4),
        dim_head=(16, 32, 64, 64),
        heads=(2, 4, 8, 8),
        hierarchies=(1, 2, 4, 16),
        hierarchical_stride=(1, 1, 1, 8),
        window_sizes=(16, 32, 64, None),
    ),
    "T: published train.py's model": dict(
        num_tokens=256, dim=1024, depth=8, seq_len=2048, hierarchies=(1, 2), window_sizes=(32, 64)
    ),
    'S: small': dict(num_tokens=256, dim=256, depth=4, seq_len=2048, hierarchies=(1, 4), window_sizes=(64, None)),
    'A, smaller': dict(
        num_tokens=5000, dim=256, depth=3, seq_len=1024, hierarchies=(1, 2, 8), window_sizes=(32, 64, None)
    ),
    'T, smaller': dict(num_tokens=256, dim=512, depth=4, seq_len=1024, hierarchies=(1, 2), window_sizes=(32, 64)),
}
LONG = dict(
    num_tokens=256,
    dim=256,
    depth=4,
    seq_len=65536,
    hierarchies=(1, 8, 64),
    hierarchical_stride=(1, 8, 64),
    window_sizes=(64, 64, None),
)
# what a step of a long sequence is measured by: the wall's seconds, and those of programs on all cores
KEYS = ('seconds', 'user')


def worker(settings: str) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--published', metavar='PYTHON', help='an interpreter that has the published package 0.4.0')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--only', help='configurations whose name begins so; writes no files')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    from simple_hierarchical_transformer import HierarchicalTransformer
    from simple_hierarchical_transformer.training.cost import matmul_peak, step_flops

    command = 'python benchmarks/train_step.py' + ' --published PYTHON' * bool(args.published)
    lines = [
        '# A step of training',
        '',
        f'`{command}`, {machine()}. Forward and backward, batch 1. The machine is shared: runs are interleaved, '
        'figures are medians, and the matmul peak (2048 x 2048 x 2048) is the best seen in between.',
        '',
        '| model | published 0.4.0, s | here, s | ratio | published, GB | here, GB | ratio | TFLOP a step | GFLOP/s '
        '| of the peak |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    print('\n'.join(lines), flush=True)
    bars: dict[str, list[float]] = {}

    for name, config in CONFIGS.items():
        if args.only and not name.startswith(args.only):
            continue
        workers = {'here': Worker(sys.executable, __file__, '--worker', repr(config))}
        if args.published:
            workers['published'] = Worker(args.published, __file__, '--worker', repr(config))
        measured: dict[str, list[dict[str, float]]] = {who: [] for who in workers}
        peaks = []
        for turn in range(args.rounds + 1):
            for who, each in workers.items():
                answer = each.ask(n=config['seq_len'])
                # the first step finds memory, and compiles nothing
                if turn:
                    measured[who].append(answer)
            peaks.append(matmul_peak(torch.device('cpu')))
        for each in workers.values():
            each.close()

        seconds = {who: statistics.median(step['seconds'] for step in steps) for who, steps in measured.items()}
        memory = {who: steps[-1]['peak'] / 1e9 for who, steps in measured.items()}
        with torch.device('meta'):
            flops = step_flops(HierarchicalTransformer(**config), config['seq_len'] - 1)
        peak = max(peaks)
        rate = flops / seconds['here']
        if args.published:
            theirs, ours = f'{seconds["published"]:.2f}', f'{memory["published"]:.2f}'
            ratios = seconds['published'] / seconds['here'], memory['here'] / memory['published']
            bars[name] = [seconds['published'], seconds['here'], memory['published'], memory['here']]
            times, sizes = f'**{ratios[0]:.1f}x**', f'**{ratios[1]:.2f}**'
        else:
            theirs = ours = times = sizes = ''
        lines.append(
            f'| {name} | {theirs} | {seconds["here"]:.2f} | {times} | {ours} | {memory["here"]:.2f} | {sizes} '
            f'| {flops / 1e12:.2f} | {rate / 1e9:.0f} of {peak / 1e9:.0f} | **{100 * rate / peak:.0f} %** |'
        )
        print(lines[-1], flush=True)

    if args.only:
        return

    # ours alone

    name, config = next(iter(CONFIGS.items()))
    each = Worker(sys.executable, __file__, '--worker', repr(dict(config, gradient_checkpointing=True)))
    step = [each.ask(n=config['seq_len']) for _ in range(2)][-1]
    each.close()
    share = f', {step["peak"] / 1e9 / bars[name][2]:.2f} of the published' if bars else ''
    lines += ['', f'{name} with `gradient_checkpointing = True`: {step["peak"] / 1e9:.2f} GB{share}.']

    lines += [
        '',
        f'Long sequences ({", ".join(f"{key} {value}" for key, value in LONG.items())}). Tensors of such length are '
        'memory that the system finds and clears anew each time, page by page: time in the kernel that grows faster '
        'than the length. `THP_MEM_ALLOC_ENABLE=1` has PyTorch ask for huge pages.',
        '',
        '| | 16,384 ids, s | 65,536 ids, s | ratio | in programs alone, s | ratio | GB |',
        '|---|---|---|---|---|---|---|',
    ]
    for label, env in (('as it is', {}), ('`THP_MEM_ALLOC_ENABLE=1`', {'THP_MEM_ALLOC_ENABLE': '1'})):
        each = Worker(sys.executable, __file__, '--worker', repr(LONG), **env)
        short, long = ([each.ask(n=n) for _ in range(3)][1:] for n in (16384, 65536))
        each.close()
        (a, b), (c, d) = ([statistics.median(s[key] for s in runs) for runs in (short, long)] for key in KEYS)
        lines.append(
            f'| {label} | {a:.1f} | {b:.1f} | **{b / a:.2f}x** | {c:.1f} and {d:.1f} | {d / c:.2f}x '
            f'| {long[-1]["peak"] / 1e9:.1f} |'
        )
    print('\n'.join(lines[-5:]))
    if bars:
        draw(bars)
        lines += ['', '![time and memory of a step](train_step.png)']
    (HERE / 'train_step.md').write_text('\n'.join(lines) + '\n')


def draw(bars: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained', sharey=True)
    names = list(bars)
    for axis, first, label in zip(axes, (0, 2), ('seconds a step', 'peak memory, GB'), strict=True):
        for offset, column, who in ((-0.2, first, 'published 0.4.0'), (0.2, first + 1, 'here')):
            places = [i + offset for i in range(len(names))]
            axis.barh(places, [bars[name][column] for name in names], height=0.4, label=who)
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        axis.grid(axis='x', alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.savefig(HERE / 'train_step.png', dpi=120)


if __name__ == '__main__':
    main()
