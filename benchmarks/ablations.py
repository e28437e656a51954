"""What each option of the hierarchy is worth: bits per byte at equal time, by train.py, several seeds.

python benchmarks/ablations.py --data enwiki-articles.xml.bz2

A machine's pace moves from minute to minute, by more than most options do. So steps are timed first, all options in
turns, and each option then trains for as many steps as fit into the time at that pace: whatever else the machine does
while it trains. Writes ablations.json run by run, and goes on from it; --report makes the table and the picture of
what it holds.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import ROOT, machine, timed
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.batches import evaluation_batches, split_bytes
from simple_hierarchical_transformer.training.optim import build_optimizer
from simple_hierarchical_transformer.training.report import replace_file, write_text
from simple_hierarchical_transformer.training.scores import bits_per_byte
from simple_hierarchical_transformer.training.sources import load_sources

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'ablations.json'

# losses off, as in the cpu preset, so that each can be told from the others
BASE: dict[str, Any] = dict(
    dim=128, depth=2, heads=2, hierarchies=(1, 4, 16), hierarchical_stride=(1, 4, 16), window_sizes=(64, None, None),
    recon_loss_weight=0.0, next_latent_loss_weight=0.0,
)  # fmt: skip
DEFAULT = 'default'
OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    'one level, full attention': dict(hierarchies=1, hierarchical_stride=1, window_sizes=None),
    'reconstruction loss': dict(recon_loss_weight=0.1),
    'next-latent loss': dict(next_latent_loss_weight=0.25),
    'both, as the constructor has it': dict(recon_loss_weight=0.1, next_latent_loss_weight=0.25),
    'prophet loss': dict(prophet_loss_weight=0.1),
    'quantized loss, compressed': dict(quantized_loss_weight=0.1),
    'quantized loss, output': dict(quantized_loss_weight=0.1, quantize_from='output'),
    'quantized loss, 4 codebooks': dict(quantized_loss_weight=0.1, quantizer_codebooks=4),
    'merge into all': dict(merge_into='all'),
    'merge into 1x and 4x': dict(merge_into=(1, 4)),
    'merge by attention': dict(merge='attention'),
    'merge by attention, 3 before': dict(merge='attention', merge_window=3),
    'shared attention (4x, 16x)': dict(share_attention=True),
    'shared feed-forward': dict(share_feed_forward=True),
    'both shared': dict(share_attention=True, share_feed_forward=True),
    'compressor: attention': dict(compressor='attention'),
    'compressor: mean': dict(compressor='mean'),
    'compressor: linear': dict(compressor='linear'),
    'autoencoder': dict(autoencoder=True),
    'hourglass': dict(arrangement='hourglass'),
    'hourglass, merge by attention': dict(arrangement='hourglass', merge='attention'),
    'windows of half (4x, 16x)': dict(window_sizes=(64, 'auto', 'auto')),
}
LENGTH, BATCH = 512, 2
# rounds of the clock, and steps in each
ROUNDS, STEPS = 21, 3


def pace(names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step of the default, and how many times that a step of each takes: medians over rounds."""
    steps = {}
    for name in names:
        torch.manual_seed(0)
        model = HierarchicalTransformer(num_tokens=256, ignore_index=-1, seq_len=LENGTH, **{**BASE, **OPTIONS[name]})
        optimizer = build_optimizer(model, 'adamw', lr=1e-4, weight_decay=0.1)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(STEPS):
                model(torch.randint(0, 256, (BATCH, LENGTH + 1)), return_loss=True)[0].backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        step()
        steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(timed(step)[0] / STEPS)
    base = seconds[DEFAULT]
    ratios = {name: [a / b for a, b in zip(found, base, strict=True)] for name, found in seconds.items()}
    return 1000 * statistics.median(base), {name: statistics.median(found) for name, found in ratios.items()}


def train(name: str, seed: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of train.py, in a folder that goes when it has been read."""
    model = {**BASE, **OPTIONS[name]}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'run'
        command = [
            sys.executable, str(ROOT / 'train.py'), '--preset', 'cpu', '--data', args.data,
            '--steps', str(steps), '--seed', str(seed), '--valid-bytes', str(args.valid_bytes),
            '--every', str(10**9), '--checkpoint-every', str(10**9), '--out', str(out),
            '--model', *(f'{key}={value}' for key, value in model.items()),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f'{name}, seed {seed}: {result.stderr[-2000:]}')
        with open(out / 'metrics.csv') as file:
            last = list(csv.DictReader(file))[-1]
        trained = HierarchicalTransformer.from_pretrained(out / 'final')
    found = dict(
        bits=float(last['valid_bits_per_byte']),
        streaming=float(last['valid_streaming_bits_per_byte']),
        steps=int(last['step']),
        parameters=sum(p.numel() for p in trained.parameters()),
    )
    if name == DEFAULT:
        found['silent'] = silence(trained, args)
    return found


def silence(model: HierarchicalTransformer, args: argparse.Namespace) -> dict[str, float]:
    """Bits per byte with each of the other levels silent, and with all of them."""
    corpus = load_sources([args.data], ROOT / 'data', text_key='text', say=print)[0][0]
    span = split_bytes(len(corpus), seq_len=model.seq_len)['valid']

    def score(*levels: int) -> float:
        batches = evaluation_batches(corpus, span, seq_len=model.seq_len, batch_size=8, max_bytes=args.valid_bytes)
        with model.ablate(*levels):
            return bits_per_byte(model, batches, torch.device('cpu'))

    others = [level.compression for i, level in enumerate(model.levels) if i != model.predict_level]
    return {', '.join(f'{c}x' for c in levels): score(*levels) for levels in (*((c,) for c in others), others)}


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def differences(runs: dict[str, Any]) -> dict[str, list[float]]:
    """Bits per byte of each option above those of the default, seed by seed."""
    base = runs[DEFAULT]
    return {
        name: [run['bits'] - base[seed]['bits'] for seed, run in found.items() if seed in base]
        for name, found in runs.items()
    }


def chance(apart: dict[str, list[float]]) -> float:
    """How far apart from the default a mean over seeds comes to be by chance, 99 times in 100.

    2.7 times its standard error, and that by the spread of all options' differences together: three of one option's
    say too little of how far they spread.
    """
    others = [found for name, found in apart.items() if name != DEFAULT and len(found) > 1]
    if not others:
        return 0.0
    return 2.7 * math.sqrt(statistics.mean(statistics.variance(found) / len(found) for found in others))


def report(held: dict[str, Any]) -> None:
    runs, minutes = held['runs'], held['minutes']
    base, apart = runs[DEFAULT], differences(runs)
    reach = chance(apart)

    rows = []
    for name in (name for name in OPTIONS if name in runs):
        found = list(runs[name].values())
        bits, spread = mean_and_spread([run['bits'] for run in found])
        delta, delta_spread = mean_and_spread(apart[name])
        says = 'chance' if abs(delta) <= reach else 'helps' if delta < 0 else 'hurts'
        cells = [
            name,
            f'{bits:.3f} ± {spread:.3f}',
            '' if name == DEFAULT else f'{delta:+.3f} ± {delta_spread:.3f}',
            '' if name == DEFAULT else says,
            f'{held["ms"] * held["pace"][name]:.0f}',
            f'{found[0]["steps"]:,}',
            f'{found[0]["parameters"] / 1e6:.2f}',
        ]
        rows.append((delta, f'| {" | ".join(cells)} |'))

    sizes = ', '.join(f'`{key} = {value!r}`' for key, value in BASE.items())
    silent = [run['silent'] for run in base.values()]
    plain = statistics.mean(run['bits'] for run in base.values())
    lines = [
        '# What each option of the hierarchy is worth',
        '',
        f'Validation bits per byte after {minutes:g} minutes of training, {len(base)} seeds: mean and standard '
        f'deviation; the difference to the default is taken seed by seed. {held["machine"]}. Made by `python '
        f'benchmarks/ablations.py --data {held["data"]} --minutes {minutes:g}`.',
        '',
        f'All runs are `train.py --preset cpu` ({BATCH} x {LENGTH} bytes a step, AdamW), {held["valid_bytes"]:,} bytes '
        f'of the validation split, in windows of {LENGTH}, with the model {sizes}, and one option changed. Steps were '
        f'timed first, all options in turns ({ROUNDS} rounds of {STEPS} steps, the median ratio to the default), and '
        'each option then had as many as fit into the time at its pace: it pays for what it costs, and not for what '
        f'else the machine had to do. Sorted by the difference. A mean within {reach:.3f} of the default is called '
        'chance: 2.7 standard errors, by the spread of all differences together.',
        '',
        '| option | bits per byte | to the default | | ms a step | steps | parameters, M |',
        '|---|---|---|---|---|---|---|',
        *(row for _, row in sorted(rows)),
        '',
        '![difference of each option to the default](ablations.png)',
        '',
        'What the trained default loses where a level falls silent (`model.ablate`):',
        '',
        '| silent | bits per byte |',
        '|---|---|',
        f'| none | {plain:.3f} |',
        *(f'| {levels} | {statistics.mean(s[levels] for s in silent):.3f} |' for levels in silent[0]),
    ]
    write_text(HERE / 'ablations.md', '\n'.join(lines) + '\n')
    draw({name: found for name, found in apart.items() if name != DEFAULT}, reach)


def draw(found: dict[str, list[float]], reach: float) -> None:
    from matplotlib.figure import Figure

    names = sorted(found, key=lambda name: statistics.mean(found[name]))
    figure = Figure(figsize=(8, 0.3 * len(names) + 1.2), layout='constrained')
    axes = figure.subplots()
    for y, name in enumerate(names):
        axes.plot(found[name], [y] * len(found[name]), 'o', color='tab:blue', alpha=0.4, markersize=5)
        axes.plot(statistics.mean(found[name]), y, '|', color='black', markersize=14)
    axes.axvspan(-reach, reach, color='gray', alpha=0.2, label='chance')
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel='bits per byte above the default (left is better)')
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='lower right')
    replace_file(HERE / 'ablations.png', lambda partial: figure.savefig(partial, dpi=120, format='png'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='enwik8', help='what train.py --data takes')
    parser.add_argument('--minutes', type=float, default=1.0, help='of training, for each run')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--valid-bytes', type=int, default=1 << 15)
    parser.add_argument('--only', nargs='+', choices=OPTIONS, help='some of the options')
    parser.add_argument('--report', action='store_true', help='train nothing')
    args = parser.parse_args()

    held: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.report:
        asked = dict(data=Path(args.data).name, minutes=args.minutes, valid_bytes=args.valid_bytes)
        if held and asked != {key: held[key] for key in asked}:
            sys.exit(f'{RESULTS} was made with { ({key: held[key] for key in asked}) }: move it away to begin anew')
        held = held or dict(**asked, machine=machine(), pace={}, runs={})
        names = list(dict.fromkeys([DEFAULT, *(args.only or OPTIONS)]))
        if set(names) - set(held['pace']):
            # what was timed before stays as it was
            ms, ratios = pace(names)
            held['ms'], held['pace'] = held.get('ms', ms), ratios | held['pace']
            write_text(RESULTS, json.dumps(held, indent=1) + '\n')
        # seed by seed, so that a slow hour of the machine is not one option's alone
        for seed in range(args.seeds):
            for name in names:
                done = held['runs'].setdefault(name, {})
                if str(seed) not in done:
                    steps = max(round(60_000 * args.minutes / (held['ms'] * held['pace'][name])), 1)
                    done[str(seed)] = train(name, seed, steps, args)
                    write_text(RESULTS, json.dumps(held, indent=1) + '\n')
                    found = done[str(seed)]
                    print(f'{name}, seed {seed}: {found["bits"]:.3f}, {found["steps"]} steps', flush=True)
    if not held.get('runs', {}).get(DEFAULT):
        sys.exit(f'{RESULTS} has no run of the default to compare with')
    report(held)


if __name__ == '__main__':
    main()
