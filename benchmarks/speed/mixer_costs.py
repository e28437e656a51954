"""The cost of each mixer: the time of a layer by the length of the sequence, and the speed of generation.

    python benchmarks/speed/mixer_costs.py

Writes mixer_costs.json after each mixer, and continues from it. `--report` only makes the table and the figure again.
How well mixers predict: benchmarks/quality/mixers.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.common.machine import machine
from benchmarks.common.mixers import BASE, MIXERS
from benchmarks.common.plots import new_figure, save_figure
from benchmarks.common.results import latest_folder, new_folder, new_parser, read_json, write_json, write_lines
from benchmarks.common.tables import markdown
from benchmarks.common.timing import generation_speed, timed
from simple_hierarchical_transformer import HierarchicalTransformer

LENGTHS = tuple(1024 * 2**k for k in range(6))
CONTEXT = 1024
# seconds. A layer that takes longer at one length is not timed at the next
TOO_SLOW = 20.0


def by_length(settings: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of one layer, forward and backward, by the length of the sequence. Each is the best of three."""
    found: dict[str, float] = {}
    for n in lengths:
        torch.manual_seed(0)
        config = {**BASE, **settings, 'depth': 1}
        block = HierarchicalTransformer(num_tokens=256, seq_len=n, **config).layers[0][0]  # type: ignore[index]
        x = torch.randn(1, n, BASE['dim'], requires_grad=True)
        best = min(timed(lambda block=block, x=x: block(x)[0].sum().backward())[0] for _ in range(3))
        found[str(n)] = 1000 * best
        if best > TOO_SLOW:
            break
    return found


def generation(settings: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    model = HierarchicalTransformer(num_tokens=256, seq_len=2 * CONTEXT, **{**BASE, **settings})
    return generation_speed(model, context=CONTEXT)


def report(costs: dict[str, Any], folder: Path) -> None:
    rows = []
    for name in (name for name in MIXERS if name in costs['found']):
        cost = costs['found'][name]
        times = [f'{cost["ms"][str(n)]:,.0f}' if str(n) in cost['ms'] else '' for n in LENGTHS]
        wrote = cost['writing']
        rows.append((name, *times, f'{wrote["bytes_a_second"]:.0f}', f'{wrote["state"] / 1000:,.0f}'))
    lines = [
        '# Cost of each mixer',
        '',
        f'One layer of width {BASE["dim"]}, forward and backward, in milliseconds by the length of the sequence. Bytes '
        'per second that the whole model generates, and the kilobytes of its state, after a context of '
        f'{CONTEXT:,} bytes in a model for {2 * CONTEXT:,}. Each is the best of three. {costs["machine"]}. Made by '
        '`python benchmarks/speed/mixer_costs.py`.',
        '',
        *markdown(('mixer', *(f'{n // 1024}k' for n in LENGTHS), 'bytes a second', 'state, kB'), rows),
        '',
        '![time of a layer by length](mixer_costs.png)',
    ]
    write_lines(folder / 'mixer_costs.md', lines)
    draw(costs['found'], folder / 'mixer_costs.png')


def draw(costs: dict[str, Any], path: Path) -> None:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for k, (name, cost) in enumerate(costs.items()):
        style = ('-', '--', ':')[k // 10]
        axes.plot([int(n) for n in cost['ms']], list(cost['ms'].values()), style, marker='o', markersize=3, label=name)
    axes.set(xscale='log', yscale='log', xlabel='tokens', ylabel='milliseconds, forward and backward')
    axes.set_xticks(LENGTHS, [f'{n // 1024}k' for n in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument('--only', nargs='+', choices=MIXERS)
    parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS, help='lengths at which a layer is timed')
    parser.add_argument('--out', type=Path, help='folder of the results (default: one of today in benchmarks/results)')
    parser.add_argument('--report', action='store_true', help='time nothing, only make the table and the figure')
    args = parser.parse_args(argv)
    folder = args.out or (latest_folder if args.report else new_folder)('mixer_costs')
    path = folder / 'mixer_costs.json'
    costs = read_json(path) or dict(machine=machine(), found={})
    if not args.report:
        for name in args.only or MIXERS:
            if name not in costs['found']:
                costs['found'][name] = found = dict(
                    ms=by_length(MIXERS[name], tuple(args.lengths)), writing=generation(MIXERS[name])
                )
                write_json(path, costs)
                print(f'{name}: {", ".join(f"{ms:.0f}" for ms in found["ms"].values())} ms', flush=True)
    report(costs, folder)


if __name__ == '__main__':
    main()
