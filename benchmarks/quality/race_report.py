"""The tables and the figure of the race."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.plots import new_figure, save_figure
from benchmarks.common.tables import markdown, plus_minus
from benchmarks.quality import race

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD = (
    'contestant', 'bits per byte', 'streaming', 'to the best peer', 'seeds', 'lr', 'steps', 'MB read', 'parameters, M',
    'peak memory, GB', 'pace, GFLOP/s',
)  # fmt: skip

Runs = list[dict[str, Any]]


def chosen(runs: Runs) -> Runs:
    """All of our runs, and those of each peer at its better learning rate.

    The validation score of seed 0 at the shortest budget decides which rate is better.
    """
    shortest = min((run['minutes'] for run in runs if run['lr'] is not None), default=None)
    rates: dict[str, dict[float, float]] = defaultdict(dict)
    for run in runs:
        if run['lr'] is not None and run['minutes'] == shortest and run['seed'] == 0:
            rates[run['contestant']][run['lr']] = run['valid_bits']
    best = {name: min(found, key=found.__getitem__) for name, found in rates.items()}
    return [run for run in runs if run['lr'] == best.get(run['contestant'])]


def grouped(runs: Runs) -> dict[tuple[int, float], dict[str, Runs]]:
    """Runs by context and budget, then by contestant."""
    groups: dict[tuple[int, float], dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run['seq_len'], run['minutes']][run['contestant']].append(run)
    return {key: dict(groups[key]) for key in sorted(groups)}


def mean_of(runs: Runs, name: str = 'bits') -> float:
    return statistics.mean(run[name] for run in runs)


def bits_of(runs: Runs) -> str:
    """Mean of their bits per byte, and the standard deviation if there are several."""
    return plus_minus([run['bits'] for run in runs])


def fewer(runs: Runs, others: Runs) -> float:
    """How many per cent fewer bits `runs` have than `others`: 2 bits are 20 % fewer than 2.5."""
    return round(100 * (1 - mean_of(runs) / mean_of(others)), 6)


def is_ours(name: str) -> bool:
    return race.CONTESTANTS[name].ours


def bold_ours(name: str) -> str:
    return f'**{name}**' if is_ours(name) else name


def race_tables(runs: Runs) -> list[str]:
    lines: list[str] = []
    for (seq_len, minutes), by in grouped(runs).items():
        peers = {name: found for name, found in by.items() if not is_ours(name)}
        best = min(map(mean_of, peers.values()), default=None)
        rows = []
        for name, found in sorted(by.items(), key=lambda item: mean_of(item[1])):
            last = found[-1]
            cells = (
                bold_ours(name),
                bits_of(found),
                plus_minus([run['streaming_bits'] for run in found]),
                '' if best is None else f'{100 * (mean_of(found) / best - 1):+.1f} %',
                str(len(found)),
                '' if last['lr'] is None else f'{last["lr"]:g}',
                f'{mean_of(found, "steps"):,.0f}',
                f'{mean_of(found, "bytes") / 1e6:.1f}',
                f'{last["parameters"] / 1e6:.2f}',
                f'{last["peak_bytes"] / 1e9:.2f}' if 'peak_bytes' in last else '',
                f'{statistics.mean(pace for run in found for pace in run["pace"]):.0f}',
            )
            rows.append(cells)
        lines += [f'### {minutes:g} minutes, context of {seq_len:,} bytes', '', *markdown(HEAD, rows), '']
    return lines


def goals(runs: Runs) -> list[str]:
    """The table of goals, and whether the runs reach them."""
    groups = grouped(runs)
    preset, flats = race.PRESET.name, (race.FLAT.name, race.WINDOWED.name)
    rows: list[tuple[str, str, str]] = []

    def seeds(*each: Runs) -> str:
        return ' and '.join(str(len(found)) for found in each)

    for minutes, wanted in ((5.0, 30), (10.0, 30), (30.0, 20)):
        by = groups.get((race.LENGTH, minutes), {})
        peers = {name: mean_of(found) for name, found in by.items() if not is_ours(name)}
        if preset in by and peers:
            best = min(peers, key=peers.__getitem__)
            less = fewer(by[preset], by[best])
            goal = f'{wanted} % fewer bits than the best peer after {minutes:g} minutes'
            reached = f'{less:.1f} % fewer than {best}{"" if less >= wanted else ": missed"}'
            rows.append((goal, reached, seeds(by[preset], by[best])))
    for seq_len, wanted in ((1024, 3), (4096, 10), (16384, 20)):
        for minutes in (10.0, 30.0):
            by = groups.get((seq_len, minutes), {})
            there = [name for name in flats if name in by]
            if preset in by and there:
                best = min(there, key=lambda name: mean_of(by[name]))
                less = fewer(by[preset], by[best])
                against = '' if len(there) > 1 else ', the only one that was run'
                goal = f'{wanted} % fewer bits than our best flat model, {minutes:g} minutes, {seq_len:,} bytes'
                reached = (
                    f'{abs(less):.1f} % {"fewer" if less >= 0 else "more"} than {best.removeprefix("ours, ")}{against}'
                    f'{"" if less >= wanted else ": missed"}'
                )
                rows.append((goal, reached, seeds(by[preset], by[best])))
    long = groups.get((race.LENGTH, 30.0), {})
    peers_long = [found for name, found in long.items() if not is_ours(name)]
    soon = groups.get((race.LENGTH, 4.0), {}).get(preset)
    if peers_long and soon:
        ahead = min(peers_long, key=mean_of)
        goal = f'in 4 minutes the score of the best peer after 30 ({mean_of(ahead):.3f})'
        missed = '' if mean_of(soon) <= mean_of(ahead) else ': missed'
        rows.append((goal, f'{mean_of(soon):.3f} after 4 minutes{missed}', seeds(soon, ahead)))
    return markdown(('goal', 'reached', 'seeds'), rows)


def fewer_bits(runs: Runs) -> dict[str, dict[float, dict[int, float]]]:
    """Per cent fewer bits of the preset than of each other model of ours, by budget and context.

    Budgets with only one context are left out.
    """
    found: dict[str, dict[float, dict[int, float]]] = {}
    for other in (each.name for each in race.OURS if each != race.PRESET):
        by_budget: dict[float, dict[int, float]] = defaultdict(dict)
        for (seq_len, minutes), by in grouped(runs).items():
            if by.keys() >= {race.PRESET.name, other}:
                by_budget[minutes][seq_len] = fewer(by[race.PRESET.name], by[other])
        found[other] = {minutes: each for minutes, each in by_budget.items() if len(each) > 1}
    return found


def by_context(runs: Runs) -> list[str]:
    """The table of our models by context, which the README shows too."""
    groups, others = grouped(runs), fewer_bits(runs)
    names = [each.name for each in race.OURS]
    to_others = [f'the preset to {name.removeprefix("ours, ")}' for name in others]
    rows = []
    for minutes, seq_len in sorted({(m, n) for found in others.values() for m, each in found.items() for n in each}):
        by = groups[seq_len, minutes]
        cells = [
            f'{bits_of(by[name])} ({mean_of(by[name], "bytes") / 1e6:.1f} MB)' if name in by else '' for name in names
        ]
        cells += [f'{-fewer(by[race.PRESET.name], by[name]):+.1f} %' if name in by else '' for name in others]
        rows.append((f'{seq_len:,}', f'{minutes:g}', *cells))
    caption = (
        'Bits per byte, in windows of the context, and how much text was read in the time. Figures without a spread '
        'come from one seed:'
    )
    head = ('context, bytes', 'minutes', *map(bold_ours, names), *to_others)
    return [caption, '', *markdown(head, rows), ''] if rows else []


def draw_by_minutes(axes: Axes, runs: Runs) -> None:
    scores: dict[str, dict[float, Runs]] = defaultdict(dict)
    for (seq_len, minutes), by in grouped(runs).items():
        for name, found in by.items():
            if seq_len == race.LENGTH:
                scores[name][minutes] = found
    for name, found in sorted(scores.items(), key=lambda item: mean_of(item[1][max(item[1])])):
        minutes = sorted(found)
        style = dict(linewidth=2.5) if is_ours(name) else dict(linestyle='--', linewidth=1.2)
        axes.plot(minutes, [mean_of(found[each]) for each in minutes], marker='o', markersize=4, label=name, **style)
    axes.set(xscale='log', xlabel='minutes of training on the same 2 cores', ylabel='bits per byte (lower is better)')
    label_ticks(axes, {minutes for found in scores.values() for minutes in found})


def draw_by_context(axes: Axes, others: dict[str, dict[float, dict[int, float]]]) -> None:
    axes.axhline(0, color='tab:gray', linewidth=1)
    for (name, by_budget), style in zip(others.items(), ('-', '--'), strict=True):
        for minutes, lengths in by_budget.items():
            label = f'{name.removeprefix("ours, ")}, {minutes:g} minutes'
            axes.plot(*zip(*lengths.items(), strict=True), marker='o', linestyle=style, label=label)
    axes.set(
        xscale='log',
        xlabel='context of training, bytes',
        ylabel='% fewer bits of the cpu preset than of our flat model',
    )
    label_ticks(axes, {n for found in others.values() for each in found.values() for n in each})


def label_ticks(axes: Axes, at: Collection[float]) -> None:
    axes.set_xticks(sorted(at), [f'{each:,g}' for each in sorted(at)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_race(runs: Runs, path: Path) -> None:
    others = fewer_bits(runs)
    if any(others.values()):
        figure = new_figure(12, 4.5)
        left, right = figure.subplots(1, 2, width_ratios=[5, 3])
        draw_by_context(right, others)
    else:
        figure = new_figure(8, 4.5)
        left = figure.subplots()
    draw_by_minutes(left, runs)
    save_figure(figure, path)


def headline(runs: Runs) -> list[str]:
    """The table of all contestants by budget, for the README."""
    groups = {minutes: by for (seq_len, minutes), by in grouped(runs).items() if seq_len == race.LENGTH}
    budgets = [minutes for minutes in sorted(groups) if len(groups[minutes]) > 1]
    names = sorted(
        {name for minutes in budgets for name in groups[minutes]},
        key=lambda name: min(mean_of(by[name]) for by in groups.values() if name in by),
    )
    rows = []
    for name in names:
        cells = [bits_of(groups[minutes][name]) if name in groups[minutes] else '' for minutes in budgets]
        size = next(by[name][-1]['parameters'] for by in groups.values() if name in by)
        rows.append((bold_ours(name), f'{size / 1e6:.1f}', *cells))
    return markdown(('bits per byte after', 'parameters, M', *(f'{minutes:g} minutes' for minutes in budgets)), rows)


def machine_of(runs: Runs) -> str:
    """Each machine once, with its first and its last day."""
    days: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        day, kind = run['machine'].split(', ', 1)
        days[kind].append(day)
    return '; '.join(f'{" to ".join(sorted({min(each), max(each)}))}, {kind}' for kind, each in days.items())


def protocol(runs: Runs) -> str:
    paces = [pace for run in runs for pace in run['pace']]
    return (
        f'`python benchmarks/quality/race.py --data {runs[0]["data"]}` on {machine_of(runs)}. All runs have one '
        'corpus, one budget of wall-clock time, and the same cores. They run one after the other, each in its own '
        'process and environment. They train on the first 90 % of the corpus. The learning rate of a peer is the '
        'better of 1e-3 and 3e-3 on the next 5 % after the shortest budget. The last 5 % is reported: in windows '
        'without overlap, and as a stream, which a model without a state reads in windows that overlap by half. '
        'Peers train on sequences of 1,024 bytes drawn at random, 4 per step, with AdamW, warm-up over 3 % and a '
        'cosine down to a tenth. The published package also has its auxiliary losses. Our models use train.py, '
        'which reads the corpus in passes. Spreads are standard deviations over seeds. Pace is that of a matrix '
        f'product before and after each run, {min(paces):.0f} to {max(paces):.0f} GFLOP/s in all: the machine is '
        'shared. Peers have smaller versions of the shapes in their documentation, one batch size and two learning '
        'rates. Ours come from a search for a recipe (`results/recipe_search/`).'
    )
