"""The tables and figures of boundaries.py, from the files of its runs."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.plots import new_figure, save_figure
from benchmarks.common.results import write_lines
from benchmarks.common.tables import markdown, plus_minus
from benchmarks.quality.boundaries import FLAT, PEERS, WITH_TABLES
from benchmarks.quality.comparison import differences, noise
from benchmarks.quality.scaling import slope

Runs = list[dict[str, Any]]
Points = list[tuple[float, float]]
DRAWS = 4000
COLORS = ('tab:gray', 'tab:blue', 'tab:orange', 'tab:green', 'tab:red', 'tab:purple', 'tab:brown', 'tab:pink')


def mean_of(runs: Runs, name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def by_contestant(runs: Runs) -> dict[str, Runs]:
    found: dict[str, Runs] = defaultdict(list)
    for run in runs:
        found[run['contestant']].append(run)
    return found


def twin_of(name: str) -> str:
    """The flat model that a contestant is compared with: with tables if it has them."""
    return FLAT + WITH_TABLES * (name.endswith(WITH_TABLES) or name == 'cpu preset')


def against_twins(by: Mapping[str, Runs]) -> dict[str, list[float]]:
    """Per cent more bits of each contestant than of its flat twin, seed by seed."""
    # a logarithm of bits makes of a ratio a difference
    logs = {name: {run['seed']: dict(bits=math.log(run['bits'])) for run in runs} for name, runs in by.items()}
    found: dict[str, list[float]] = {}
    for twin in {twin_of(name) for name in by} & set(by):
        deltas = differences({name: held for name, held in logs.items() if twin_of(name) == twin}, twin)
        found |= {name: [100 * math.expm1(each) for each in held] for name, held in deltas.items()}
    return found


def race_table(runs: Runs) -> list[str]:
    by = by_contestant(runs)
    deltas = against_twins(by)
    rows: list[Sequence[object]] = []
    for name, found in sorted(by.items(), key=lambda item: mean_of(item[1], 'bits')):
        last = found[-1]
        cells = (
            name if name in PEERS else f'**{name}**',
            plus_minus([run['bits'] for run in found]),
            '' if name == twin_of(name) or not deltas.get(name) else signed(deltas[name]),
            str(len(found)),
            f'{last["rate"]:g}',
            f'{mean_of(found, "steps"):,.0f}',
            f'{mean_of(found, "bytes") / 1e6:.1f}',
            f'{mean_of(found, "operations") / mean_of(found, "bytes") / 1e6:.2f}' if 'operations' in last else '',
            f'{(last["parameters"] - last["tables"]) / 1e6:.2f}',
            pieces(found),
        )
        rows.append(cells)
    head = (
        'contestant', 'bits per byte', 'to the flat twin', 'seeds', 'rate', 'steps', 'MB read', 'M operations a byte',
        'parameters, M, without n-grams', 'bytes a piece',
    )  # fmt: skip
    limit = noise({name: each for name, each in deltas.items() if name != twin_of(name)}, '')
    lines = [f'### {runs[0]["budget"]:g} seconds of processor time', '', *markdown(head, rows), '']
    if limit:
        lines += [f'A mean within {limit:.2f} % of its twin may be chance (2.7 standard errors, pooled).', '']
    return lines


def signed(values: Sequence[float]) -> str:
    """Per cent, with the standard deviation if there are several."""
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):+.1f}{spread} %'


def pieces(runs: Runs) -> str:
    """Mean lengths of the pieces of placed levels."""
    lengths = zip(*(run['piece'] for run in runs), strict=True)
    return ', '.join(f'{statistics.mean(each):.2f}' for each in lengths)


class Fit(NamedTuple):
    """The line `bits = a * operations ** -b` on logarithms, and how far runs are from it."""

    a: float
    b: float
    residuals: list[float]
    """Of the logarithms, scaled so that their square has the variance of a run as its mean."""

    def at(self, operations: float) -> float:
        return self.a * operations**-self.b

    @property
    def spread(self) -> float:
        """The standard deviation of a run around the line, relative."""
        return math.sqrt(statistics.mean(each * each for each in self.residuals))


def fit(points: Points) -> Fit:
    a, b = slope(points)
    # two numbers were fitted
    grown = math.sqrt(len(points) / max(len(points) - 2, 1))
    return Fit(a, b, [grown * (math.log(bits) - math.log(a) + b * math.log(x)) for x, bits in points])


def redrawn(points: Points, first: Fit, draw: random.Random) -> Fit:
    """The fit of the same points with other residuals (a bootstrap, Efron 1979)."""
    return fit([(x, first.at(x) * math.exp(draw.choice(first.residuals))) for x, _ in points])


class Crossing(NamedTuple):
    """Where a line of ratios to the flat twin is 1, as logarithms to base 10 of the operations."""

    middle: float
    low: float
    high: float
    """The bounds of nine tenths of the draws whose line has the same direction."""
    falls: float
    """The share of draws in which the line falls, so that the contestant is ahead from the crossing on."""


def cross(ratios: Points) -> Crossing:
    first, draw = fit(ratios), random.Random(0)
    lines = [redrawn(ratios, first, draw) for _ in range(DRAWS)]
    draws = sorted(math.log10(line.a) / line.b for line in lines if line.b * first.b > 0)
    tail = len(draws) // 20
    falls = sum(line.b > 0 for line in lines) / DRAWS
    return Crossing(math.log10(first.a) / first.b, draws[tail], draws[-tail - 1], falls)


def points_of(runs: Runs) -> Points:
    return [(run['budget'], run['bits']) for run in runs]


def ratios_of(runs: Runs, twins: Runs) -> Points:
    """Bits of each run by those of its twin of the same budget and seed. They have the same text, and its chances."""
    held = {(run['budget'], run['seed']): run['bits'] for run in twins}
    found = [(run['budget'], run['bits'] / held.get((run['budget'], run['seed']), math.nan)) for run in runs]
    return [(x, ratio) for x, ratio in found if ratio == ratio]


def enough(points: Points) -> bool:
    """Whether a fitted line shows how well it fits."""
    return len({x for x, _ in points}) > 2


def scaling_tables(runs: Runs) -> list[str]:
    budgets = sorted({run['budget'] for run in runs})
    by = by_contestant(runs)
    groups = {x: by_contestant([run for run in runs if run['budget'] == x]) for x in budgets}
    deltas = {x: against_twins(group) for x, group in groups.items()}

    rows: list[Sequence[object]] = []
    for name in sorted(by, key=lambda name: name != FLAT):
        cells = []
        for x in budgets:
            found = groups[x].get(name)
            delta = deltas[x].get(name) if name != twin_of(name) else None
            text = plus_minus([run['bits'] for run in found]) if found else ''
            cells.append(text + (f' ({signed(delta)})' if delta else ''))
        rows.append((name, *cells))
    lines = ['Bits per byte, and the difference to the flat twin seed by seed:', '']
    lines += [*markdown(('operations', *(f'{x:.0e}' for x in budgets)), rows), '']

    details: list[Sequence[object]] = []
    for x in budgets:
        for name, found in groups[x].items():
            model = found[0]['settings']['model']
            values = (
                f'{x:.0e}', name, model['dim'], model['depth'], f'{found[0]["parameters"] / 1e6:.2f}',
                f'{mean_of(found, "bytes") / 1e6:.1f}', f'{x / mean_of(found, "bytes") / 1e6:.2f}',
                f'{mean_of(found, "seconds"):,.0f}', f'{found[0]["rate"]:g}', pieces(found), len(found),
            )  # fmt: skip
            details.append(values)
    head = (
        'operations', 'contestant', 'widths', 'depths', 'parameters, M', 'MB read', 'M operations a byte',
        'seconds of one thread', 'rate', 'bytes a piece', 'seeds',
    )  # fmt: skip
    return [*lines, 'The runs:', '', *markdown(head, details), '', *fits_table(runs)]


def fits_table(runs: Runs) -> list[str]:
    rows: list[Sequence[object]] = []
    by = by_contestant(runs)
    for name, found in by.items():
        points = points_of(found)
        if not enough(points):
            continue
        line = fit(points)
        cells = [name, f'{line.a:.2f} x operations^{-line.b:.4f}', f'{100 * line.spread:.1f} %', '', '', '', '']
        ratios = ratios_of(found, by.get(twin_of(name), []))
        if name != twin_of(name) and enough(ratios):
            ratio, crossing = fit(ratios), cross(ratios)
            cells[3:] = [
                f'{100 * ratio.spread:.1f} %',
                f'{"from" if ratio.b > 0 else "up to"} 10^{crossing.middle:.1f}',
                f'10^{crossing.low:.1f} to 10^{crossing.high:.1f}',
                f'{100 * crossing.falls:.0f} %',
            ]
        rows.append(cells)
    if not rows:
        return []
    head = (
        'contestant', 'fitted bits per byte', 'spread of runs', 'spread of ratios', 'ahead of the flat twin',
        '90 % of draws', 'draws in which it gains on the twin',
    )  # fmt: skip
    budgets = [run['budget'] for run in runs]
    text = (
        'Lines by least squares on logarithms. The crossing is that of a line through the ratios of bits to those of '
        f'the flat twin, seed by seed. Its interval comes from {DRAWS:,} draws of the residuals. Runs reach from '
        f'{min(budgets):.0e} to {max(budgets):.0e} operations: a crossing outside of that is extrapolated.'
    )
    return [*markdown(head, rows), '', text, '']


def draw_scaling(runs: Runs, path: Path) -> None:
    """Bits, and per cent more bits than the flat twin seed by seed, with their fitted lines."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    by = by_contestant(runs)
    for name, color in zip(sorted(by, key=lambda name: name != FLAT), COLORS, strict=False):
        points, ratios = points_of(by[name]), ratios_of(by[name], by.get(twin_of(name), []))
        left.plot(*zip(*points, strict=True), 'o', color=color, markersize=4, label=name)
        if enough(points):
            xs, line = sorted({x for x, _ in points}), fit(points)
            left.plot(xs, [line.at(x) for x in xs], color=color, label=f'slope {-line.b:.3f}')
        if name != twin_of(name) and ratios:
            right.plot([x for x, _ in ratios], [100 * (y - 1) for _, y in ratios], 'o', color=color, markersize=4)
            if enough(ratios):
                xs, line = sorted({x for x, _ in ratios}), fit(ratios)
                right.plot(xs, [100 * (line.at(x) - 1) for x in xs], color=color)
    right.axhline(0, color='tab:gray', linewidth=1)
    left.set(xscale='log', yscale='log', xlabel='operations of training', ylabel='bits per byte')
    right.set(xscale='log', xlabel='operations of training', ylabel='% more bits than the flat twin')
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3, which='both')
    save_figure(figure, path)


def draw_race(runs: Runs, path: Path) -> None:
    """Per cent more bits than the flat twin, one panel for each budget."""
    budgets = sorted({run['budget'] for run in runs})
    deltas = [against_twins(by_contestant([run for run in runs if run['budget'] == x])) for x in budgets]
    names = sorted(
        {name for found in deltas for name, each in found.items() if each and name != twin_of(name)},
        key=lambda name: statistics.mean(next(found[name] for found in reversed(deltas) if found.get(name))),
    )
    if not names:
        return
    figure = new_figure(3 + 3.5 * len(budgets), 0.3 * len(names) + 1.2)
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, x, found in zip(panels, budgets, deltas, strict=True):
        for y, name in enumerate(names):
            values = found.get(name, [])
            axes.plot(values, [y] * len(values), 'o', color='tab:blue', alpha=0.5, markersize=5)
        axes.axvline(0, color='tab:gray', linewidth=1)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel='% more bits than the flat twin', title=f'{x:g} s')
        axes.grid(axis='x', alpha=0.3)
    panels[0].invert_yaxis()
    save_figure(figure, path)


def chosen_rates(runs: Runs) -> list[str]:
    """The table of runs that chose learning rates."""
    rates = sorted({run['rate'] for run in runs})
    rows: list[Sequence[object]] = []
    for name, found in by_contestant(runs).items():
        bits = {run['rate']: run['bits'] for run in found}
        cells = [f'{bits[rate]:.3f}' if rate in bits else '' for rate in rates]
        rows.append((name, *(f'**{text}**' if bits.get(rate) == min(bits.values()) else text
                             for rate, text in zip(rates, cells, strict=True))))  # fmt: skip
    return markdown((f'rate, {runs[0]["budget"]:g}', *(f'{rate:g}' for rate in rates)), rows)


def protocol(runs: Runs) -> str:
    first = runs[0]
    terms = first['terms']
    machines = ', '.join(sorted({run['machine'] for run in runs if 'machine' in run}))
    commits = ', '.join(sorted({run['commit'] for run in runs if 'commit' in run}))
    paces = [pace for run in runs for pace in run['pace']]
    return (
        f'`python benchmarks/quality/boundaries.py` on {" and ".join(first["data"])}. Machine: {machines}. Commit: '
        f'{commits}. A run is one process with one thread, and several ran side by side. Scores cost no budget. Models '
        f'train on sequences of {terms["length"]:,} bytes, {terms["batch"]} a step, with the recipe of the cpu preset, '
        f'and no run read more than {max(run["readings"] for run in runs):.2f} of the text. The score is that of '
        f'{terms["streams"]} streams of {terms["stream_bytes"]:,} bytes, evenly spaced in the last '
        f'{terms["held_out"]:,}. Learning rates are relative to the preset, scaled with the width as in the gpu '
        'preset, and chosen in short runs on other held-out text. Peers choose between absolute rates. A model '
        'without a state reads streams in windows that overlap by half. The pace of a matrix product around each run '
        f'was {min(paces):.0f} to {max(paces):.0f} GFLOP/s.'
    )


def write_report(folder: Path) -> None:
    """Writes boundaries.md and its figures to the folder of the runs, and prints the page."""
    held: Runs = [json.loads(path.read_text()) for path in sorted(folder.glob('*-seed*.json'))]
    if not held:
        raise SystemExit(f'there are no results in {folder}')
    finite = [run for run in held if math.isfinite(run['bits'])]
    lines = ['# Does the placement of coarse tokens pay?', '', protocol(held), '']
    for kind, title in (('race', 'Equal processor time'), ('scaling', 'Equal operations')):
        runs = [run for run in finite if run['kind'] == kind and not run['tuning']]
        tuning = [run for run in held if run['kind'] == kind and run['tuning']]
        if runs:
            lines += [f'## {title}', '']
            if kind == 'race':
                for budget in sorted({run['budget'] for run in runs}):
                    lines += race_table([run for run in runs if run['budget'] == budget])
                draw_race(runs, folder / 'race.png')
            else:
                lines += scaling_tables(runs)
                draw_scaling(runs, folder / 'scaling.png')
        if tuning:
            lines += [
                f'Learning rates of {kind}, bits per byte of the text that chooses:',
                '',
                *chosen_rates(tuning),
                '',
            ]
    diverged = [f'{run["contestant"]} at {run["budget"]:g}, rate {run["rate"]:g}' for run in held if run not in finite]
    if diverged:
        lines += [f'Diverged: {"; ".join(diverged)}.', '']
    write_lines(folder / 'boundaries.md', lines[:-1])
    print('\n'.join(lines))
