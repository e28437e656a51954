"""Bits per byte against compute, flat and hierarchical, at four sizes, with fitted slopes.

python benchmarks/scaling.py --data enwiki-articles.xml.bz2

Writes scaling.json run by run, and goes on from it; --report makes the table and the picture of what it holds. All have
the recipe of the cpu preset. Each size is trained with four times the operations of the one before it, as many steps as
they allow: a count of operations is the same on every machine, busy or not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import paced
import torch
from compression import flat
from side_by_side import machine

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.report import replace_file, write_text
from simple_hierarchical_transformer.training.settings import PRESETS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'scaling.json'
LENGTH, BATCH = PRESETS['cpu']['seq_len'], PRESETS['cpu']['batch_size']
# operations of training, for each size
COMPUTE = tuple(5e11 * 4**k for k in range(4))
KINDS: dict[str, list[dict[str, Any]]] = {
    'flat': [
        {**flat(), 'dim': dim, 'depth': depth, 'heads': heads, 'dim_head': 32}
        for dim, depth, heads in ((64, 1, 2), (96, 2, 3), (128, 4, 4), (192, 6, 6))
    ],
    'hierarchical': [
        {**paced.of_preset('cpu'), 'dim': dim, 'depth': depth, 'heads': heads, 'dim_head': 32}
        for dim, depth, heads in (
            ((64, 64), (1, 1), (2, 2)),
            ((96, 128), (1, 2), (3, 4)),
            ((128, 192), (1, 4), (4, 6)),
            ((192, 320), (2, 6), (6, 10)),
        )
    ],
}


def operations(option: dict[str, Any]) -> float:
    """Of a step."""
    settings, _ = paced.split(option)
    with torch.device('meta'):
        model = HierarchicalTransformer(num_tokens=256, seq_len=LENGTH, **settings)
    return BATCH * cost.step_flops(model, LENGTH)


def run(args: argparse.Namespace) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.report:
        return held
    held = held or dict(data=Path(args.data).name, machine=machine(), runs={})
    for seed in range(args.seeds):
        for size, compute in enumerate(args.compute):
            for kind, options in KINDS.items():
                key = f'{kind}/{size}/{compute:g}/{seed}'
                if key in held['runs']:
                    continue
                steps = max(round(compute / operations(options[size])), 1)
                found = paced.train(
                    options[size], args, seed=seed, steps=steps, length=LENGTH, batch=BATCH, look=lambda _: {}
                )
                held['runs'][key] = dict(found, kind=kind, size=size, compute=compute, seed=seed)
                write_text(RESULTS, json.dumps(held, indent=1) + '\n')
                print(f'{kind}, size {size}, {compute:.1e}: {found["bits"]:.3f}, {steps:,} steps', flush=True)
    return held


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """a and b of `bits = a * compute ** -b`, by least squares of the logarithms."""
    xs, ys = ([math.log(each) for each in axis] for axis in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    b = -sum((u - x) * (v - y) for u, v in zip(xs, ys, strict=True)) / sum((u - x) ** 2 for u in xs)
    return math.exp(y + b * x), b


def curves(held: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """By kind, compute and bits of each run."""
    return {
        kind: [(each['compute'], each['bits']) for each in held['runs'].values() if each['kind'] == kind]
        for kind in KINDS
    }


def table(held: dict[str, Any]) -> list[str]:
    lines = [
        '| | size | parameters without tables, M | operations | MB read | bits per byte |',
        '|---|---|---|---|---|---|',
    ]
    for each in sorted(held['runs'].values(), key=lambda each: (each['kind'], each['compute'], each['seed'])):
        lines.append(
            f'| {each["kind"]} | {each["size"] + 1} | {(each["parameters"] - each["tables"]) / 1e6:.2f} | '
            f'{each["compute"]:.1e} | {each["steps"] * BATCH * LENGTH / 1e6:.1f} | {each["bits"]:.3f} |'
        )
    lines.append('')
    for kind, points in curves(held).items():
        if len({compute for compute, _ in points}) > 1:
            a, b = slope(points)
            lines.append(f'{kind}: bits = {a:.2f} x operations^-{b:.3f}')
            lines.append('')
    return lines


def draw(held: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for (kind, points), color in zip(curves(held).items(), ('tab:gray', 'tab:blue'), strict=True):
        if len({compute for compute, _ in points}) < 2:
            continue
        a, b = slope(points)
        xs = sorted({compute for compute, _ in points})
        axes.plot(*zip(*points, strict=True), 'o', color=color)
        axes.plot(xs, [a * x**-b for x in xs], color=color, label=f'{kind}: slope -{b:.3f}')
    axes.set(xscale='log', yscale='log', xlabel='operations of training', ylabel='bits per byte')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='enwik8', help='what train.py --data takes')
    parser.add_argument('--compute', type=float, nargs='+', default=COMPUTE, help='operations of each size')
    parser.add_argument('--seeds', type=int, default=1)
    parser.add_argument('--valid-bytes', type=int, default=1 << 16)
    parser.add_argument('--report', action='store_true', help='train nothing')
    held = run(parser.parse_args())
    if not held:
        sys.exit(f'there is no {RESULTS} to make a table of')
    draw(held, HERE / 'scaling.png')
    print('\n'.join(table(held)))


if __name__ == '__main__':
    main()
