"""What each option of the hierarchy is worth: bits per byte at equal time, by train.py, several seeds.

python benchmarks/ablations.py --data enwiki-articles.xml.bz2

Writes ablations.json run by run, and goes on from it; --report makes the table and the picture of what it holds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import ROOT, machine

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.batches import evaluation_batches, split_bytes
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
    'merge into all': dict(merge_into='all'),
    'merge by attention': dict(merge='attention'),
    'merge by attention, 3 before': dict(merge='attention', merge_window=3),
    'shared attention (4x, 16x)': dict(share_attention=True),
    'shared feed-forward': dict(share_feed_forward=True),
    'compressor: attention': dict(compressor='attention'),
    'compressor: mean': dict(compressor='mean'),
    'compressor: linear': dict(compressor='linear'),
    'autoencoder': dict(autoencoder=True),
    'hourglass': dict(arrangement='hourglass'),
    'hourglass, merge by attention': dict(arrangement='hourglass', merge='attention'),
    'windows of half': dict(window_sizes='auto'),
}


def train(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of train.py, in a folder that goes when it has been read."""
    model = {**BASE, **OPTIONS[name]}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'run'
        command = [
            sys.executable, str(ROOT / 'train.py'), '--preset', 'cpu', '--data', args.data,
            '--minutes', str(args.minutes), '--seed', str(seed), '--valid-bytes', str(args.valid_bytes),
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


def report(held: dict[str, Any]) -> None:
    runs, minutes = held['runs'], held['minutes']
    base = runs[DEFAULT]

    def differences(name: str) -> list[float]:
        return [run['bits'] - base[seed]['bits'] for seed, run in runs[name].items() if seed in base]

    rows = []
    for name in (name for name in OPTIONS if name in runs):
        found = list(runs[name].values())
        bits, spread = mean_and_spread([run['bits'] for run in found])
        apart, apart_spread = mean_and_spread(differences(name))
        step = statistics.mean(60_000 * minutes / run['steps'] for run in found)
        size = found[0]['parameters']
        delta = '' if name == DEFAULT else f'{apart:+.3f} ± {apart_spread:.3f}'
        steps = [run['steps'] for run in found]
        score = f'{bits:.3f} ± {spread:.3f} | {delta} | {step:.0f} | {min(steps)} to {max(steps)}'
        rows.append((apart, f'| {name} | {score} | {size / 1e6:.2f} |'))

    seeds = len(base)
    sizes = ', '.join(f'`{key} = {value!r}`' for key, value in BASE.items())
    lines = [
        '# What each option of the hierarchy is worth',
        '',
        f'Validation bits per byte after {minutes:g} minutes of training, {seeds} seeds: mean and standard deviation; '
        'the difference to the default is taken seed by seed. '
        f'{held["machine"]}. Made by `python benchmarks/ablations.py --data {held["data"]} --minutes {minutes:g}`.',
        '',
        f'All runs are `train.py --preset cpu` (2 x 512 bytes a step, AdamW), {held["valid_bytes"]:,} bytes of the '
        f'validation split, in windows of 512, with the model {sizes}, and one option changed. Every run has the same '
        'time, so an option pays for what it costs, and for what else the machine had to do: where the steps of one '
        'option lie far apart, so may its scores by chance. Sorted by the difference.',
        '',
        '| option | bits per byte | to the default | ms a step | steps | parameters, M |',
        '|---|---|---|---|---|---|',
        *(row for _, row in sorted(rows)),
        '',
        '![difference of each option to the default](ablations.png)',
    ]
    silent = [run['silent'] for run in base.values()]
    plain = statistics.mean(run['bits'] for run in base.values())
    lines += [
        '',
        'What the trained default loses where a level falls silent (`model.ablate`):',
        '',
        '| silent | bits per byte |',
        '|---|---|',
        f'| none | {plain:.3f} |',
        *(f'| {levels} | {statistics.mean(s[levels] for s in silent):.3f} |' for levels in silent[0]),
    ]
    write_text(HERE / 'ablations.md', '\n'.join(lines) + '\n')
    draw({name: differences(name) for name in runs if name != DEFAULT}, base)


def draw(found: dict[str, list[float]], base: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    names = sorted(found, key=lambda name: statistics.mean(found[name]))
    figure = Figure(figsize=(8, 0.3 * len(names) + 1.2), layout='constrained')
    axes = figure.subplots()
    for y, name in enumerate(names):
        axes.plot(found[name], [y] * len(found[name]), 'o', color='tab:blue', alpha=0.4, markersize=5)
        axes.plot(statistics.mean(found[name]), y, '|', color='black', markersize=14)
    spread = mean_and_spread([run['bits'] for run in base.values()])[1]
    axes.axvspan(-spread, spread, color='gray', alpha=0.2, label='standard deviation of the default')
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
        held = held or dict(**asked, machine=machine(), runs={})
        # seed by seed, so that a slow hour of the machine is not one option's alone
        for seed in range(args.seeds):
            for name in args.only or OPTIONS:
                done = held['runs'].setdefault(name, {})
                if str(seed) not in done:
                    done[str(seed)] = train(name, seed, args)
                    write_text(RESULTS, json.dumps(held, indent=1) + '\n')
                    found = done[str(seed)]
                    print(f'{name}, seed {seed}: {found["bits"]:.3f}, {found["steps"]} steps', flush=True)
    if not held.get('runs', {}).get(DEFAULT):
        sys.exit(f'{RESULTS} has no run of the default to compare with')
    report(held)


if __name__ == '__main__':
    main()
