"""Tables and figures of runs by `paced.py`: each option against the default."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.plots import new_figure, save_figure
from benchmarks.common.tables import markdown, mean_and_spread, plus_minus
from benchmarks.quality.paced import Options, split
from simple_hierarchical_transformer.training.settings import flag


def differences(runs: dict[str, Any], default: str) -> dict[str, list[float]]:
    """Bits per byte of each option minus those of the default with the same seed."""
    base = runs[default]
    return {
        name: [run['bits'] - base[seed]['bits'] for seed, run in found.items() if seed in base]
        for name, found in runs.items()
    }


def noise(deltas: dict[str, list[float]], default: str) -> float:
    """A difference of means that chance exceeds once in 100 times: 2.7 standard errors.

    The variance is pooled over all options, because the few seeds of one option do not estimate it well. It is 0 if
    each option has only one seed.
    """
    others = [found for name, found in deltas.items() if name != default and len(found) > 1]
    if not others:
        return 0.0
    return 2.7 * math.sqrt(statistics.mean(statistics.variance(found) / len(found) for found in others))


def table(held: dict[str, Any], options: Options, default: str) -> list[str]:
    """One row for each option, the best first."""
    deltas = differences(held['runs'], default)
    limit = noise(deltas, default)
    rows = []
    for name in (name for name in options if name in held['runs']):
        found = list(held['runs'][name].values())
        delta, delta_spread = mean_and_spread(deltas[name])
        verdict = 'chance' if abs(delta) <= limit else 'helps' if delta < 0 else 'hurts'
        if not limit:
            # one seed does not show how far seeds differ
            verdict = ''
        cells = (
            name,
            plus_minus([run['bits'] for run in found]),
            '' if name == default else f'{delta:+.3f} ± {delta_spread:.3f}',
            '' if name == default else verdict,
            f'{held["ms"] * held["pace"][name]:.0f}',
            f'{found[0]["steps"]:,}',
            f'{found[0]["parameters"] / 1e6:.2f}',
        )
        rows.append((delta, cells))
    head = ('option', 'bits per byte', 'to the default', '', 'ms a step', 'steps', 'parameters, M')
    return markdown(head, [cells for _, cells in sorted(rows)])


def protocol(held: dict[str, Any], script: str, base: dict[str, Any], default: str, *, length: int, batch: int) -> str:
    """The method, for the text above the table."""
    sizes = ', '.join(f'`{key} = {value!r}`' for key, value in base.items() if key != 'train')
    _, flags = split(base)
    learning = ' '.join(f'{flag(name)} {value}' for name, value in flags.items() if value is not None)
    runs, minutes = held['runs'], held['minutes']
    limit = noise(differences(runs, default), default)
    return (
        f'Validation bits per byte after {minutes:g} minutes of training, {len(runs[default])} seeds: mean and '
        f'standard deviation. The difference to the default is taken seed by seed. {held["machine"]}. Made by `python '
        f'benchmarks/quality/{script} --data {held["data"]} --minutes {minutes:g} --seeds {len(runs[default])}`.\n\n'
        f'All runs use `train.py {learning}` ({batch} x {length} bytes per step). They are scored on '
        f'{held["valid_bytes"]:,} bytes of the validation split, in windows of {length}. The model has {sizes}, and '
        f'one option is changed. Steps were timed first, all options in turns ({held["clock"]}, medians). Each option '
        'then ran as many steps as fit into the time at its pace, so the score includes the cost of the option, but '
        f'not other load on the machine. Rows are sorted by the difference. A mean within {limit:.3f} of the default '
        'is called chance: that is 2.7 standard errors, with the variance pooled over all options.'
    )


def draw(path: Path, held: dict[str, Any], default: str) -> None:
    """A figure with the difference of each run to the default."""
    deltas = differences(held['runs'], default)
    limit = noise(deltas, default)
    found = {name: each for name, each in deltas.items() if name != default}
    names = sorted(found, key=lambda name: statistics.mean(found[name]))
    figure = new_figure(8, 0.3 * len(names) + 1.2)
    axes = figure.subplots()
    for y, name in enumerate(names):
        axes.plot(found[name], [y] * len(found[name]), 'o', color='tab:blue', alpha=0.4, markersize=5)
        axes.plot(statistics.mean(found[name]), y, '|', color='black', markersize=14)
    axes.axvspan(-limit, limit, color='gray', alpha=0.2, label='chance')
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel='bits per byte above the default (left is better)')
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='upper right')
    save_figure(figure, path)
