"""What compressing costs: flat against a second level of 1/2, 1/4 and 1/8, at equal steps and at equal time.

python benchmarks/compression.py --data enwiki-articles.xml.bz2

Writes compression.json run by run, and goes on from it; --report makes the table of what it holds. All have the recipe
of the cpu preset, and the flat model its second level's layers at full resolution. How time is shared out: paced.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import paced
import torch
from side_by_side import machine, writing

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.report import write_text
from simple_hierarchical_transformer.training.settings import PRESETS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'compression.json'
PRESET = PRESETS['cpu']
LENGTH, BATCH = PRESET['seq_len'], PRESET['batch_size']
FLAT = '1'


def levels(c: int) -> dict[str, Any]:
    """The preset with its coarse level at 1/c."""
    return {**paced.of_preset('cpu'), 'hierarchies': (1, c), 'hierarchical_stride': (1, c)}


def flat() -> dict[str, Any]:
    """The preset with all its layers in one level, at the width of its finest and with its own window."""
    model = PRESET['model']

    def first(name: str) -> Any:
        value = model[name]
        return value[0] if isinstance(value, tuple) else value

    one = {name: first(name) for name in ('dim', 'heads', 'dim_head', 'ff_mult', 'window_sizes') if name in model}
    depth = model['depth']
    total = sum(depth) if isinstance(depth, tuple) else depth
    return {**paced.of_preset('cpu'), **one, 'depth': total, 'hierarchies': 1, 'hierarchical_stride': 1}


OPTIONS = {FLAT: flat(), **{f'1, 1/{c}': levels(c) for c in (2, 4, 8)}}


def look(model: HierarchicalTransformer) -> dict[str, Any]:
    """Memory that a step keeps, and bytes a second in writing after a context."""
    ids = torch.randint(0, 256, (BATCH, LENGTH + 1))
    kept = cost.bytes_kept(model.train(), ids, return_loss=True)
    return dict(kept=kept, **writing(model, context=LENGTH // 2))


def run(args: argparse.Namespace) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.report:
        return held
    if not held:
        ms, ratios = paced.pace(OPTIONS, FLAT, length=LENGTH, batch=BATCH)
        held = dict(data=Path(args.data).name, minutes=args.minutes, machine=machine(), ms=ms, pace=ratios, runs={})
        write_text(RESULTS, json.dumps(held, indent=1) + '\n')
    steps = round(60_000 * args.minutes / held['ms'])
    for seed in range(args.seeds):
        for name, option in OPTIONS.items():
            for kind, count in (('steps', steps), ('time', round(steps / held['pace'][name]))):
                done = held['runs'].setdefault(name, {}).setdefault(kind, {})
                if str(seed) in done:
                    continue
                # of the flat model both are one
                other = held['runs'][name].get('steps', {}).get(str(seed))
                done[str(seed)] = found = (
                    other
                    if name == FLAT and other
                    else paced.train(option, args, seed=seed, steps=count, length=LENGTH, batch=BATCH, look=look)
                )
                write_text(RESULTS, json.dumps(held, indent=1) + '\n')
                print(f'{name}, equal {kind}, seed {seed}: {found["bits"]:.3f}', flush=True)
    return held


def table(held: dict[str, Any]) -> list[str]:
    lines = [
        '| levels | bits per byte, equal steps | equal time | parameters, M (of them tables) | ms a step | '
        'kept a step, MB | bytes a second, writing |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, found in held['runs'].items():
        scores = [paced.mean_and_spread([run['bits'] for run in found[kind].values()]) for kind in ('steps', 'time')]
        last = list(found['time'].values())[-1]
        cells = [
            name,
            *(f'{bits:.3f} ± {spread:.3f}' for bits, spread in scores),
            f'{last["parameters"] / 1e6:.2f} ({last["tables"] / 1e6:.1f})',
            f'{held["ms"] * held["pace"][name]:.0f}',
            f'{last["kept"] / 1e6:.0f}',
            f'{last["bytes_a_second"]:.0f}',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='enwik8', help='what train.py --data takes')
    parser.add_argument('--minutes', type=float, default=2.5, help='of training, for each run')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--valid-bytes', type=int, default=1 << 16)
    parser.add_argument('--report', action='store_true', help='train nothing')
    held = run(parser.parse_args())
    if not held:
        sys.exit(f'there is no {RESULTS} to make a table of')
    print('\n'.join(table(held)))


if __name__ == '__main__':
    main()
