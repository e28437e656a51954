"""A report of the race and of the other benchmarks of quality, with figures, and the table of the race in a page.

    python benchmarks/quality/report.py --readme docs/results.md               the latest results of each benchmark
    python benchmarks/quality/report.py --folder mine --log-with wandb        the results in a folder, also to a tracker

Trains nothing. Each section names the command that made its figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accelerate import Accelerator

from benchmarks.common.results import latest_folder, new_folder, new_parser, read_json, write_text
from benchmarks.quality import comparison, race, race_report, recipe, resolutions, scaling
from benchmarks.quality.race_report import Runs
from benchmarks.speed import plan
from simple_hierarchical_transformer.training.trackers import PROJECT, TRACKERS, check_trackers

BEGIN, END = '<!-- race: made by benchmarks/quality/report.py -->', '<!-- end of race -->'


def read_source(source: Path | None, benchmark: str) -> dict[str, Any] | None:
    """The results of a benchmark in `source`, by default the latest, or None if there are none."""
    return read_json((source or latest_folder(benchmark)) / f'{benchmark}.json')


def of_resolutions(source: Path | None) -> list[str]:
    if not (held := read_source(source, 'resolutions')):
        return []
    return [
        '## 2. A second level in place of full resolution',
        '',
        f'`python benchmarks/quality/resolutions.py --data {held["data"]} --minutes {held["minutes"]:g} --valid-bytes '
        f'{held["valid_bytes"]}`, {held["machine"]}. Bits are those of the validation split. All have the recipe of '
        'the cpu preset. The layers of the flat models process as many tokens as those of the preset, rounded up. '
        'Equal steps: as many as the first has. Equal time: as many as fit into the same time, by the pace of steps '
        f'that were timed in turns ({held["clock"]}). Generation starts after {resolutions.LENGTH // 2} bytes. Its '
        f'speed is the median of {resolutions.ROUNDS} rounds in turns.',
        '',
        *resolutions.table(held),
        '',
    ]


def of_scaling(source: Path | None, folder: Path) -> list[str]:
    if not (held := read_source(source, 'scaling')):
        return []
    scaling.draw(held, folder / 'scaling.png')
    return [
        '## 3. Scaling',
        '',
        f'`python benchmarks/quality/scaling.py --data {held["data"]}`, {held["machine"]}. Four sizes, each with four '
        f'times the operations of the one before, with sequences of {scaling.LENGTH:,} bytes, one seed and one '
        'learning rate. Bits are those of the validation split. All have the recipe of the cpu preset without n-grams '
        'and recall, which cost no operations and hide in a small corpus what layers do.',
        '',
        '![bits per byte by operations of training](scaling.png)',
        '',
        *scaling.table(held),
        '### Larger models, on paper',
        '',
        f'Counted by `python benchmarks/speed/plan.py`; none of it was run. Assumed: {plan.BYTES_A_PARAMETER} bytes of '
        f'text for each parameter outside of tables, and accelerators of {plan.MEMORY / 1e9:.0f} GB that reach '
        f'{100 * plan.SHARE:.0f} % of the {plan.PEAK / 1e12:.0f} TFLOP/s in bfloat16 that their maker states.',
        '',
        *plan.table(),
        '',
    ]


def of_recipe(source: Path | None, folder: Path) -> list[str]:
    if not (held := read_source(source, 'recipe')):
        return []
    comparison.draw(folder / 'recipe.png', held, recipe.DEFAULT)
    sizes = dict(length=recipe.LENGTH, batch=recipe.BATCH)
    return [
        '## 4. What each part of the recipe is worth',
        '',
        comparison.protocol(held, 'recipe.py', recipe.PRESET, recipe.DEFAULT, **sizes),
        '',
        *comparison.table(held, recipe.OPTIONS, recipe.DEFAULT),
        '',
        '![difference of each to the preset](recipe.png)',
        '',
    ]


def sample_text(runs: Runs) -> list[str]:
    """Text that the preset generated after its longest run at the context of the race."""
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
        f'By the preset of the race after {run["minutes"]:g} minutes, at a temperature of 0.8. The prompt, from the '
        'part of the corpus that it has never seen:',
        '',
        *shown(run['sample']['prompt']),
        '',
        'Generated:',
        '',
        *shown(run['sample']['text']),
        '',
    ]


def labelled(runs: Runs, source: Path | None) -> dict[str, dict[str, Any]]:
    """The measurements of each run of all scripts, by a name for the run."""
    found = {
        f'race, {run["contestant"]}, {run["seq_len"]} bytes, {run["minutes"]:g} minutes, seed {run["seed"]}': run
        for run in runs
    }
    for section in ('resolutions', 'scaling', 'recipe'):
        held = read_source(source, section) or dict(runs={})
        for name, by_seed in held['runs'].items():
            found |= {f'{section}, {name}, seed {seed}': run for seed, run in by_seed.items()}
    return found


def track(runs: Runs, source: Path | None, folder: Path, names: Sequence[str]) -> None:
    """Logs each run as a run of the trackers, and the figures as another one."""
    from matplotlib.image import imread

    check_trackers(names)

    @contextmanager
    def tracked(label: str, config: dict[str, Any]) -> Iterator[Accelerator]:
        # TensorBoard identifies a run by its folder
        place = folder / 'tracked' / label.replace('/', '-')
        accelerator = Accelerator(log_with=list(names), project_dir=place)
        named = dict(name=label)
        accelerator.init_trackers(PROJECT, config=config, init_kwargs=dict(wandb=named, trackio=named))
        yield accelerator
        accelerator.end_training()

    for label, run in labelled(runs, source).items():
        numbers = {key: value for key, value in run.items() if isinstance(value, (int, float))}
        words = {key: value for key, value in run.items() if isinstance(value, str)}
        with tracked(label, numbers | words) as accelerator:
            accelerator.log(numbers, step=run['steps'])
    with tracked('report', {}) as accelerator:
        for name in ('race', 'scaling', 'recipe'):
            if (path := folder / f'{name}.png').exists():
                picture = (255 * imread(path)[None, ..., :3]).astype('uint8')
                for tracker in accelerator.trackers:
                    # trackio has no method for images
                    if hasattr(tracker, 'log_images'):
                        layout = dict(dataformats='NHWC') if tracker.name == 'tensorboard' else {}
                        tracker.log_images({name: picture}, step=0, **layout)


def update_readme(path: Path, runs: Runs, picture: Path) -> None:
    """Replaces the section between BEGIN and END. Exits if the file has no such section."""
    text = path.read_text()
    if BEGIN not in text:
        sys.exit(f'{path} has no line {BEGIN}, where the race would go')
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    made = f'Made by `python benchmarks/quality/race.py --data {runs[0]["data"]}` on {race_report.machine_of(runs)}.'
    tables = [*race_report.headline(runs), '', *race_report.by_context(runs)]
    section = [BEGIN, '', *tables, f'![the race]({os.path.relpath(picture, path.parent)})', '', made, '', END]
    write_text(path, before + '\n'.join(section) + after)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument('--folder', type=Path, help='folder of the results and of the report')
    parser.add_argument('--readme', type=Path, help='a page whose section of the race is replaced')
    parser.add_argument('--log-with', nargs='+', choices=TRACKERS)
    args = parser.parse_args(argv)
    source, folder = args.folder, args.folder or new_folder('report')
    of_race = source / 'race' if source else latest_folder('race')
    runs = race_report.chosen(race.Results(of_race).all())
    if not runs:
        sys.exit(f'{of_race} has no results: benchmarks/quality/race.py makes them')

    race_report.draw_race(runs, folder / 'race.png')
    command = 'python benchmarks/quality/report.py' + (f' --folder {source}' if source else '')
    lines = [
        '# Report',
        '',
        f'Made by `{command}` from the results of the commands that its sections name.',
        '',
        '## 1. The race',
        '',
        race_report.protocol(runs),
        '',
        '![bits per byte by minutes of training](race.png)',
        '',
        *race_report.goals(runs),
        '',
        *race_report.by_context(runs),
        *race_report.race_tables(runs),
        *of_resolutions(source),
        *of_scaling(source, folder),
        *of_recipe(source, folder),
        *sample_text(runs),
    ]
    write_text(folder / 'report.md', '\n'.join(lines))
    if args.readme:
        update_readme(args.readme, runs, folder / 'race.png')
    if args.log_with:
        track(runs, source, folder, args.log_with)


if __name__ == '__main__':
    main()
