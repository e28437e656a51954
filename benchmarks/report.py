"""The report of what the library reaches: report.md with its pictures, and the headline in README.md.

python benchmarks/report.py --readme README.md                      of the results in this folder
python benchmarks/report.py --folder mine --log-with wandb          of others, and each run shown to a tracker

Trains nothing: each section says which command made what it shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paced
import plan
import race
import recipe
import resolutions
import scaling
from accelerate import Accelerator

from simple_hierarchical_transformer.training.report import replace_file, write_text
from simple_hierarchical_transformer.training.trackers import PROJECT, TRACKERS, check_trackers

HERE = Path(__file__).resolve().parent
BEGIN, END = '<!-- race: made by benchmarks/report.py -->', '<!-- end of race -->'

Runs = list[dict[str, Any]]


def chosen(runs: Runs) -> Runs:
    """Of a peer the runs at its better learning rate, by validation at the shortest budget; all of ours."""
    shortest = min((run['minutes'] for run in runs if run['lr'] is not None), default=None)
    rates: dict[str, dict[float, float]] = defaultdict(dict)
    for run in runs:
        if run['lr'] is not None and run['minutes'] == shortest and run['seed'] == 0:
            rates[run['contestant']][run['lr']] = run['valid_bits']
    best = {name: min(found, key=found.__getitem__) for name, found in rates.items()}
    return [run for run in runs if run['lr'] == best.get(run['contestant'])]


def grouped(runs: Runs) -> dict[tuple[int, float], dict[str, Runs]]:
    """By context and budget, by contestant."""
    groups: dict[tuple[int, float], dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run['seq_len'], run['minutes']][run['contestant']].append(run)
    return {key: dict(groups[key]) for key in sorted(groups)}


def mean_of(runs: Runs, name: str = 'bits') -> float:
    return statistics.mean(run[name] for run in runs)


def bits_of(runs: Runs) -> str:
    """Their mean, and its spread where there are several."""
    return paced.plus_minus([run['bits'] for run in runs])


def fewer(runs: Runs, others: Runs) -> float:
    """How many per cent fewer bits `runs` have than `others`, to what floats hold: 2 are 20 % fewer than 2.5."""
    return round(100 * (1 - mean_of(runs) / mean_of(others)), 6)


def is_ours(name: str) -> bool:
    return race.CONTESTANTS[name].ours


def race_tables(runs: Runs) -> list[str]:
    lines: list[str] = []
    for (seq_len, minutes), by in grouped(runs).items():
        peers = {name: found for name, found in by.items() if not is_ours(name)}
        best = min(map(mean_of, peers.values()), default=None)
        lines += [
            f'### {minutes:g} minutes, context of {seq_len:,} bytes',
            '',
            '| contestant | bits per byte | streaming | to the best peer | seeds | lr | steps | MB read '
            '| parameters, M | peak memory, GB | pace, GFLOP/s |',
            '|---|---|---|---|---|---|---|---|---|---|---|',
        ]
        for name, found in sorted(by.items(), key=lambda item: mean_of(item[1])):
            last = found[-1]
            cells = [
                f'**{name}**' if is_ours(name) else name,
                bits_of(found),
                paced.plus_minus([run['streaming_bits'] for run in found]),
                '' if best is None else f'{100 * (mean_of(found) / best - 1):+.1f} %',
                str(len(found)),
                '' if last['lr'] is None else f'{last["lr"]:g}',
                f'{mean_of(found, "steps"):,.0f}',
                f'{mean_of(found, "bytes") / 1e6:.1f}',
                f'{last["parameters"] / 1e6:.2f}',
                f'{last["peak_bytes"] / 1e9:.2f}' if 'peak_bytes' in last else '',
                f'{statistics.mean(pace for run in found for pace in run["pace"]):.0f}',
            ]
            lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
    return lines


def goals(runs: Runs) -> list[str]:
    """What was aimed at, and what came of it."""
    groups = grouped(runs)
    preset, flats = race.PRESET.name, (race.FLAT.name, race.WINDOWED.name)
    lines = ['| aim | reached | seeds |', '|---|---|---|']

    def seeds(*each: Runs) -> str:
        return ' and '.join(str(len(found)) for found in each)

    for minutes, wanted in ((5.0, 30), (10.0, 30), (30.0, 20)):
        by = groups.get((race.LENGTH, minutes), {})
        peers = {name: mean_of(found) for name, found in by.items() if not is_ours(name)}
        if preset in by and peers:
            best = min(peers, key=peers.__getitem__)
            less = fewer(by[preset], by[best])
            lines.append(
                f'| {wanted} % fewer bits than the best peer after {minutes:g} minutes | {less:.1f} % fewer than '
                f'{best}{"" if less >= wanted else ": missed"} | {seeds(by[preset], by[best])} |'
            )
    for seq_len, wanted in ((1024, 3), (4096, 10), (16384, 20)):
        for minutes in (10.0, 30.0):
            by = groups.get((seq_len, minutes), {})
            there = [name for name in flats if name in by]
            if preset in by and there:
                best = min(there, key=lambda name: mean_of(by[name]))
                less = fewer(by[preset], by[best])
                against = '' if len(there) > 1 else ', the only one that was run'
                lines.append(
                    f'| {wanted} % fewer bits than our best flat model, {minutes:g} minutes, {seq_len:,} bytes | '
                    f'{abs(less):.1f} % {"fewer" if less >= 0 else "more"} than {best.removeprefix("ours, ")}{against}'
                    f'{"" if less >= wanted else ": missed"} | {seeds(by[preset], by[best])} |'
                )
    long = groups.get((race.LENGTH, 30.0), {})
    peers_long = [found for name, found in long.items() if not is_ours(name)]
    soon = groups.get((race.LENGTH, 4.0), {}).get(preset)
    if peers_long and soon:
        ahead = min(peers_long, key=mean_of)
        reached = mean_of(soon) <= mean_of(ahead)
        lines.append(
            f'| in 4 minutes where the best peer is in 30 ({mean_of(ahead):.3f}) | {mean_of(soon):.3f} after 4 minutes'
            f'{"" if reached else ": missed"} | {seeds(soon, ahead)} |'
        )
    return lines


def fewer_bits(runs: Runs) -> dict[str, dict[float, dict[int, float]]]:
    """What the preset has fewer than each other of ours, by budget and context, where a budget has several contexts."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for other in (each.name for each in race.OURS if each != race.PRESET):
        by_budget: dict[float, dict[int, float]] = defaultdict(dict)
        for (seq_len, minutes), by in grouped(runs).items():
            if by.keys() >= {race.PRESET.name, other}:
                by_budget[minutes][seq_len] = fewer(by[race.PRESET.name], by[other])
        found[other] = {minutes: each for minutes, each in by_budget.items() if len(each) > 1}
    return found


def by_context(runs: Runs) -> list[str]:
    """What longer contexts make of ours, for the README as well."""
    groups, others = grouped(runs), fewer_bits(runs)
    names = [each.name for each in race.OURS]
    to_others = ' | '.join(f'the preset to {name.removeprefix("ours, ")}' for name in others)
    lines = [
        f'| context, bytes | minutes | {" | ".join(f"**{name}**" for name in names)} | {to_others} |',
        f'|---|---|{"---|" * (len(names) + len(others))}',
    ]
    for minutes, seq_len in sorted({(m, n) for found in others.values() for m, each in found.items() for n in each}):
        by = groups[seq_len, minutes]
        cells = [
            f'{bits_of(by[name])} ({mean_of(by[name], "bytes") / 1e6:.1f} MB)' if name in by else '' for name in names
        ]
        cells += [f'{-fewer(by[race.PRESET.name], by[name]):+.1f} %' if name in by else '' for name in others]
        lines.append(f'| {seq_len:,} | {minutes:g} | {" | ".join(cells)} |')
    told = (
        'Bits per byte, in windows of the context, and how much text was read in the time; what has no spread is one '
        'seed:'
    )
    return [told, '', *lines, ''] if len(lines) > 2 else []


def draw_by_minutes(axes: Any, runs: Runs) -> None:
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


def draw_by_context(axes: Any, others: dict[str, dict[float, dict[int, float]]]) -> None:
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


def label_ticks(axes: Any, at: set[Any]) -> None:
    axes.set_xticks(sorted(at), [f'{each:,g}' for each in sorted(at)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_race(runs: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    others = fewer_bits(runs)
    if any(others.values()):
        figure = Figure(figsize=(12, 4.5), layout='constrained')
        left, right = figure.subplots(1, 2, width_ratios=[5, 3])
        draw_by_context(right, others)
    else:
        figure = Figure(figsize=(8, 4.5), layout='constrained')
        left = figure.subplots()
    draw_by_minutes(left, runs)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def headline(runs: Runs) -> list[str]:
    """Bits per byte by budget, all contestants, for the README."""
    groups = {minutes: by for (seq_len, minutes), by in grouped(runs).items() if seq_len == race.LENGTH}
    budgets = [minutes for minutes in sorted(groups) if len(groups[minutes]) > 1]
    names = sorted(
        {name for minutes in budgets for name in groups[minutes]},
        key=lambda name: min(mean_of(by[name]) for by in groups.values() if name in by),
    )
    lines = [
        f'| bits per byte after | parameters, M | {" | ".join(f"{minutes:g} minutes" for minutes in budgets)} |',
        f'|---|---|{"---|" * len(budgets)}',
    ]
    for name in names:
        cells = [bits_of(groups[minutes][name]) if name in groups[minutes] else '' for minutes in budgets]
        size = next(by[name][-1]['parameters'] for by in groups.values() if name in by)
        lines.append(f'| {f"**{name}**" if is_ours(name) else name} | {size / 1e6:.1f} | {" | ".join(cells)} |')
    return lines


def machine_of(runs: Runs) -> str:
    """Each kind of machine once, with its first and last day."""
    days: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        day, kind = run['machine'].split(', ', 1)
        days[kind].append(day)
    return '; '.join(f'{" to ".join(sorted({min(each), max(each)}))}, {kind}' for kind, each in days.items())


def protocol(runs: Runs) -> str:
    paces = [pace for run in runs for pace in run['pace']]
    return (
        f'`python benchmarks/race.py --data {runs[0]["data"]}` on {machine_of(runs)}. One corpus, one budget of '
        'wall-clock time, all on the same cores, one after the other, each in its own process and environment. Trained '
        'on the first 90 % of the corpus; the learning rate of a peer is the better of 1e-3 and 3e-3 on the next 5 % '
        'after the shortest budget; the last 5 % is reported: in windows without overlap, and as a stream, which a '
        f'model without a state reads in windows that overlap by half. Peers: sequences of {race.LENGTH:,} bytes drawn '
        f'at random, {race.BATCH} a step, AdamW, warm-up over 3 % and a cosine down to a tenth, and of the published '
        'package its own auxiliary losses. Ours: train.py, which reads the corpus in passes. Spreads are standard '
        'deviations over seeds. Pace is that of a product of matrices '
        f'before and after each run, {min(paces):.0f} to {max(paces):.0f} GFLOP/s in all: the machine is shared. Peers '
        'have the shapes of their documentation in smaller sizes, one batch size and two learning rates; ours come of '
        'the trials in notes.md.'
    )


def read(path: Path) -> dict[str, Any] | None:
    """What a script left, where it has been run."""
    return json.loads(path.read_text()) if path.exists() else None


def of_resolutions(folder: Path) -> list[str]:
    if not (held := read(folder / 'resolutions.json')):
        return []
    return [
        '## 2. A second level in place of full resolution',
        '',
        f'`python benchmarks/resolutions.py --data {held["data"]} --minutes {held["minutes"]:g} --valid-bytes '
        f'{held["valid_bytes"]}`, {held["machine"]}. Bits are those of the validation split. All have the recipe of '
        'the cpu preset; the flat models have as many layers as read the tokens that those of the preset do, rounded '
        'up. Equal steps: as many as the first has. Equal time: as many as fit into the same time, by the pace of '
        f'steps that were timed in turns ({held["clock"]}). Writing is '
        f'after {resolutions.LENGTH // 2} bytes, the median of {resolutions.ROUNDS} rounds in turns.',
        '',
        *resolutions.table(held),
        '',
    ]


def of_scaling(folder: Path) -> list[str]:
    if not (held := read(folder / 'scaling.json')):
        return []
    scaling.draw(held, folder / 'scaling.png')
    return [
        '## 3. Scaling',
        '',
        f'`python benchmarks/scaling.py --data {held["data"]}`, {held["machine"]}. Four sizes, each with four times '
        f'the operations of the one before, with sequences of {scaling.LENGTH:,} bytes, one seed and one learning '
        'rate; bits are those of the validation split. All have the recipe of the cpu preset without what it looks up, '
        'since n-grams and recall cost no operations, and say much of what layers would in a small corpus.',
        '',
        '![bits per byte by operations of training](scaling.png)',
        '',
        *scaling.table(held),
        '### Larger models, on paper',
        '',
        f'Counted by `python benchmarks/plan.py`; nothing of it was run. Assumed: {plan.BYTES_A_PARAMETER} bytes of '
        f'text for each parameter that is in no table, accelerators of {plan.MEMORY / 1e9:.0f} GB and '
        f'{plan.PEAK / 1e12:.0f} TFLOP/s in bfloat16, as their maker gives them, of which {100 * plan.SHARE:.0f} % are '
        'reached.',
        '',
        *plan.table(),
        '',
    ]


def of_recipe(folder: Path) -> list[str]:
    if not (held := read(folder / 'recipe.json')):
        return []
    paced.draw(folder / 'recipe.png', held, recipe.DEFAULT)
    sizes = dict(length=recipe.LENGTH, batch=recipe.BATCH)
    return [
        '## 4. What each part of the recipe is worth',
        '',
        paced.protocol(held, 'recipe.py', recipe.PRESET, recipe.DEFAULT, **sizes),
        '',
        *paced.table(held, recipe.OPTIONS, recipe.DEFAULT),
        '',
        '![difference of each to the preset](recipe.png)',
        '',
    ]


def sample_text(runs: Runs) -> list[str]:
    """What the preset wrote after its longest run at the length of the race."""
    wrote = [run for run in runs if 'sample' in run and run['contestant'] == race.PRESET.name]
    wrote = [run for run in wrote if run['seq_len'] == race.LENGTH]
    if not wrote:
        return []
    run = max(wrote, key=lambda run: run['minutes'])

    def shown(text: str) -> list[str]:
        return [f'    {line}' for line in text.splitlines()]

    return [
        '## 5. Sample text',
        '',
        f'By the preset of the race after {run["minutes"]:g} minutes, at a temperature of 0.8. Given, from the part of '
        'the corpus that it never saw:',
        '',
        *shown(run['sample']['prompt']),
        '',
        'Written:',
        '',
        *shown(run['sample']['text']),
        '',
    ]


def labelled(runs: Runs, folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured in each run, of the race and of the other scripts, by what it is called."""
    found = {
        f'race, {run["contestant"]}, {run["seq_len"]} bytes, {run["minutes"]:g} minutes, seed {run["seed"]}': run
        for run in runs
    }
    for section in ('resolutions', 'scaling', 'recipe'):
        held = read(folder / f'{section}.json') or dict(runs={})
        for name, by_seed in held['runs'].items():
            found |= {f'{section}, {name}, seed {seed}': run for seed, run in by_seed.items()}
    return found


def track(runs: Runs, folder: Path, names: Sequence[str]) -> None:
    """Each run as a run of a tracker, and the pictures as another."""
    from matplotlib.image import imread

    check_trackers(names)

    @contextmanager
    def tracked(label: str, config: dict[str, Any]) -> Iterator[Accelerator]:
        # TensorBoard tells runs apart by their folders
        place = folder / 'tracked' / label.replace('/', '-')
        accelerator = Accelerator(log_with=list(names), project_dir=place)
        named = dict(name=label)
        accelerator.init_trackers(PROJECT, config=config, init_kwargs=dict(wandb=named, trackio=named))
        yield accelerator
        accelerator.end_training()

    for label, run in labelled(runs, folder).items():
        numbers = {key: value for key, value in run.items() if isinstance(value, (int, float))}
        words = {key: value for key, value in run.items() if isinstance(value, str)}
        with tracked(label, numbers | words) as accelerator:
            accelerator.log(numbers, step=run['steps'])
    with tracked('report', {}) as accelerator:
        for name in ('race', 'scaling', 'recipe'):
            if (path := folder / f'{name}.png').exists():
                picture = (255 * imread(path)[None, ..., :3]).astype('uint8')
                for tracker in accelerator.trackers:
                    # trackio takes none
                    if hasattr(tracker, 'log_images'):
                        layout = dict(dataformats='NHWC') if tracker.name == 'tensorboard' else {}
                        tracker.log_images({name: picture}, step=0, **layout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=HERE, help='of the results, and of what is made of them')
    parser.add_argument('--readme', type=Path, help='whose section of the race is made anew')
    parser.add_argument('--log-with', nargs='+', choices=TRACKERS)
    args = parser.parse_args(argv)
    folder = args.folder
    runs = chosen(race.Results(folder / 'race').all())
    if not runs:
        sys.exit(f'{folder / "race"} has no results: benchmarks/race.py makes them')

    draw_race(runs, folder / 'race.png')
    lines = [
        '# Report',
        '',
        f'Remade by `python benchmarks/report.py{"" if folder == HERE else f" --folder {folder}"}` from the results of '
        'the commands that its sections name.',
        '',
        '## 1. The race',
        '',
        protocol(runs),
        '',
        '![bits per byte by minutes of training](race.png)',
        '',
        *goals(runs),
        '',
        *by_context(runs),
        *race_tables(runs),
        *of_resolutions(folder),
        *of_scaling(folder),
        *of_recipe(folder),
        *sample_text(runs),
    ]
    write_text(folder / 'report.md', '\n'.join(lines))

    if args.readme:
        text = args.readme.read_text()
        if BEGIN not in text:
            sys.exit(f'{args.readme} has no line {BEGIN}, where the race would go')
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        made = f'Made by `python benchmarks/race.py --data {runs[0]["data"]}` on {machine_of(runs)}.'
        tables = [*headline(runs), '', *by_context(runs)]
        picture = os.path.relpath(folder / 'race.png', args.readme.parent)
        section = [BEGIN, '', *tables, f'![the race]({picture})', '', made, '', END]
        write_text(args.readme, before + '\n'.join(section) + after)
    if args.log_with:
        track(runs, folder, args.log_with)


if __name__ == '__main__':
    main()
