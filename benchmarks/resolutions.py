"""What compressing costs: flat against a second level of 1/2, 1/4 and 1/8, at equal steps and at equal time.

python benchmarks/resolutions.py --data enwiki-articles.xml.bz2

Writes resolutions.json run by run, and goes on from it; --report makes the table of what it holds. All have the recipe
of the cpu preset, and the flat model as many layers as cost what the preset's do. How time is shared out: paced.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import paced
import torch
from side_by_side import writing

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.checks import per_level
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.settings import PRESETS

PRESET = PRESETS['cpu']
LENGTH, BATCH = PRESET['seq_len'], PRESET['batch_size']
FLAT = '1, window of 64'
# in which writing is timed
ROUNDS = 7


def levels(c: int) -> dict[str, Any]:
    """The preset with its coarse level at 1/c."""
    return {**paced.of_preset('cpu'), 'hierarchies': (1, c), 'hierarchical_stride': (1, c)}


def flat(window: int | None = 64) -> dict[str, Any]:
    """The preset in one level of its finest's width, with layers for as many tokens as its own read, or more."""
    model = PRESET['model']

    def spread(name: str) -> tuple[Any, ...]:
        return per_level(name, model[name], len(model['hierarchies']))

    one = {name: spread(name)[0] for name in ('dim', 'heads', 'dim_head', 'ff_mult') if name in model}
    layers = zip(spread('depth'), spread('hierarchical_stride'), strict=True)
    depth = math.ceil(sum(count / stride for count, stride in layers))
    return {
        **paced.of_preset('cpu'), **one,
        'depth': depth, 'hierarchies': 1, 'hierarchical_stride': 1, 'window_sizes': window,
    }  # fmt: skip


FULL = '1, full attention'
OPTIONS = {FLAT: flat(), FULL: flat(window=None), **{f'1, 1/{c}': levels(c) for c in (2, 4, 8)}}
EQUAL_STEPS = ', as many steps as the first'


def costs() -> dict[str, dict[str, float]]:
    """Of each, bytes that a step keeps, and bytes a second in writing after a context: medians of rounds in turns."""
    models = {}
    for name, option in OPTIONS.items():
        settings, _ = paced.split(option)
        models[name] = HierarchicalTransformer(num_tokens=256, ignore_index=-1, seq_len=LENGTH, **settings)
    ids = torch.randint(0, 256, (BATCH, LENGTH + 1))
    kept = {name: cost.bytes_kept(model, ids, return_loss=True) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            rates[name].append(writing(model, context=LENGTH // 2)['bytes_a_second'])
    return {name: dict(kept=kept[name], bytes_a_second=statistics.median(rates[name])) for name in models}


def run(args: argparse.Namespace) -> dict[str, Any]:
    path = args.out / 'resolutions.json'
    held = paced.open_results(path, args, 'minutes', 'valid_bytes')
    if not args.report:
        sizes = dict(length=LENGTH, batch=BATCH)
        steps = paced.steps_in_time(held, path, OPTIONS, FLAT, args, **sizes)
        options, counts = dict(OPTIONS), dict(steps)
        for name, option in OPTIONS.items():
            # of the first both are one
            if name != FLAT:
                options[name + EQUAL_STEPS], counts[name + EQUAL_STEPS] = option, steps[FLAT]
        if 'costs' not in held:
            held['costs'] = costs()
            paced.save(path, held)
        paced.train_all(held, path, options, counts, args, **sizes)
    return held


def table(held: dict[str, Any]) -> list[str]:
    lines = [
        '| levels | bits per byte, equal steps | equal time | parameters, M (of them tables) | ms a step | '
        'kept a step, MB | bytes a second, writing |',
        '|---|---|---|---|---|---|---|',
    ]
    runs = held['runs']
    for name in (name for name in OPTIONS if name in runs):
        scores = [
            paced.plus_minus([run['bits'] for run in found.values()])
            for found in (runs.get(name + EQUAL_STEPS, runs[name]), runs[name])
        ]
        last = list(runs[name].values())[-1]
        cells = [
            name,
            *scores,
            f'{last["parameters"] / 1e6:.2f} ({last["tables"] / 1e6:.1f})',
            f'{held["ms"] * held["pace"][name]:.0f}',
            f'{held["costs"][name]["kept"] / 1e6:.0f}',
            f'{held["costs"][name]["bytes_a_second"]:.0f}',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paced.add_arguments(parser, seeds=2, minutes=2.5)
    parser.set_defaults(valid_bytes=1 << 16)
    print('\n'.join(table(run(parser.parse_args(argv)))))


if __name__ == '__main__':
    main()
