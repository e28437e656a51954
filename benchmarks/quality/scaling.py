"""Bits per byte against compute, for flat and hierarchical models of four sizes, with fitted slopes.

    python benchmarks/quality/scaling.py --data enwiki-articles.xml.bz2

Writes scaling.json after each run, and continues from it. `--report` only makes the table and the figure again. All
models have the recipe of the cpu preset without n-grams and recall. These cost no operations, and in a small corpus
they hide what layers do. Each size trains with four times the operations of the one before. Operations are counted and
not timed, so other load on the machine does not matter.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.common.plots import new_figure, save_figure
from benchmarks.common.results import new_parser
from benchmarks.common.tables import markdown, plus_minus
from benchmarks.quality import paced
from benchmarks.quality.resolutions import BATCH, LENGTH, flat
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost

# training operations of each size
COMPUTE = tuple(1e12 * 4**k for k in range(4))

LOOKUPS: dict[str, Any] = dict(ngrams=(), word_ngrams=(), recall=(), word_recall=())
FLAT_SIZES = ((64, 1), (96, 2), (128, 4), (192, 6))
HIERARCHICAL_SIZES = (((64, 64), (1, 2)), ((96, 128), (2, 2)), ((128, 192), (3, 4)), ((192, 320), (4, 8)))


def sized(base: dict[str, Any], dim: Any, depth: Any) -> dict[str, Any]:
    """A model with heads of 32, without n-grams and recall."""
    heads = tuple(each // 32 for each in dim) if isinstance(dim, tuple) else dim // 32
    return {**base, **LOOKUPS, 'dim': dim, 'depth': depth, 'heads': heads, 'dim_head': 32}


KINDS: dict[str, list[dict[str, Any]]] = {
    'flat': [sized(flat(window=None), *sizes) for sizes in FLAT_SIZES],
    'flat, window of 64': [sized(flat(), *sizes) for sizes in FLAT_SIZES],
    'hierarchical': [sized(paced.of_preset('cpu'), *sizes) for sizes in HIERARCHICAL_SIZES],
}
# kind and size of each run
RUNS = {f'{kind}, size {size + 1}': (kind, size) for size in range(len(COMPUTE)) for kind in KINDS}


def operations(option: dict[str, Any]) -> float:
    """Operations of a training step."""
    settings, _ = paced.split(option)
    with torch.device('meta'):
        model = HierarchicalTransformer(num_tokens=256, seq_len=LENGTH, **settings)
    return BATCH * cost.step_flops(model, LENGTH)


def run(args: argparse.Namespace) -> dict[str, Any]:
    path = args.out / 'scaling.json'
    held = paced.open_results(path, args, 'compute', 'valid_bytes')
    if not args.report:
        options = {name: KINDS[kind][size] for name, (kind, size) in RUNS.items()}
        steps = {
            name: max(round(args.compute[RUNS[name][1]] / operations(option)), 1) for name, option in options.items()
        }
        paced.train_all(held, path, options, steps, args, length=LENGTH, batch=BATCH)
    return held


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """a and b of `bits = a * compute ** -b`, by least squares on the logarithms."""
    xs, ys = ([math.log(each) for each in axis] for axis in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    b = -sum((u - x) * (v - y) for u, v in zip(xs, ys, strict=True)) / sum((u - x) ** 2 for u in xs)
    return math.exp(y + b * x), b


def curves(held: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Compute and bits of each run, by kind."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for name, runs in held['runs'].items():
        kind, size = RUNS[name]
        found[kind] += [(held['compute'][size], each['bits']) for each in runs.values()]
    return found


def table(held: dict[str, Any]) -> list[str]:
    rows = []
    for name in sorted(held['runs']):
        kind, size = RUNS[name]
        option, found = KINDS[kind][size], list(held['runs'][name].values())
        cells = (
            name,
            option['dim'],
            option['depth'],
            f'{found[0]["parameters"] / 1e6:.2f}',
            f'{held["compute"][size]:.1e}',
            f'{found[0]["steps"] * BATCH * LENGTH / 1e6:.1f}',
            plus_minus([each['bits'] for each in found]),
        )
        rows.append(cells)
    lines = markdown(('', 'widths', 'depths', 'parameters, M', 'operations', 'MB read', 'bits per byte'), rows)
    lines.append('')
    for kind, points in curves(held).items():
        if len({compute for compute, _ in points}) > 2:
            a, b = slope(points)
            off = max(abs(bits / (a * compute**-b) - 1) for compute, bits in points)
            lines += [
                f'{kind}: bits = {a:.2f} x operations^-{b:.3f}. Runs differ from it by up to {100 * off:.1f} %.',
                '',
            ]
    return lines


def draw(held: dict[str, Any], path: Path) -> None:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for (kind, points), color in zip(curves(held).items(), ('tab:gray', 'tab:olive', 'tab:blue'), strict=True):
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), 'o', color=color, label=kind)
        xs = sorted({compute for compute, _ in points})
        if len(xs) < 3:
            # a line through two points does not show how well it fits
            continue
        a, b = slope(points)
        axes.plot(xs, [a * x**-b for x in xs], color=color, label=f'slope -{b:.3f}')
    axes.set(xscale='log', yscale='log', xlabel='operations of training', ylabel='bits per byte')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    paced.add_arguments(parser, seeds=1)
    parser.set_defaults(valid_bytes=1 << 16)
    parser.add_argument(
        '--compute', type=float, nargs=len(COMPUTE), default=list(COMPUTE), help='operations of each size'
    )
    args = paced.parse(parser, argv, 'scaling')
    held = run(args)
    draw(held, args.out / 'scaling.png')
    print('\n'.join(table(held)))


if __name__ == '__main__':
    main()
