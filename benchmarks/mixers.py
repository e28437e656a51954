"""What each mixer is worth, and what it costs: bits per byte at equal time, time by length, bytes a second in writing.

python benchmarks/mixers.py --data enwiki-articles.xml.bz2

Writes mixers.json and mixers_costs.json run by run, and goes on from them; --report makes tables and pictures of what
they hold. How runs are compared: paced.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import paced
import torch
from side_by_side import machine, timed, writing

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training.report import replace_file, write_text

LENGTH, BATCH = 1024, 1

# one level: what a mixer can do alone
BASE: dict[str, Any] = dict(
    dim=128, depth=3, heads=2, hierarchies=1, hierarchical_stride=1, window_sizes=None, recon_loss_weight=0.0,
    next_latent_loss_weight=0.0,
)  # fmt: skip
DEFAULT = 'attention'


def mixer(name: str, **kwargs: Any) -> dict[str, Any]:
    return dict(mixer=name, mixer_kwargs=kwargs)


MIXERS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    'attention in a window of 64': dict(window_sizes=64),
    'attention, one head of keys': mixer('attention', kv_heads=1),
    'attention, strided, interleaved': mixer('attention', pattern='strided'),
    'attention, strided, union': mixer('attention', pattern='strided', pattern_mode='union'),
    'attention, fixed, heads': mixer('attention', pattern='fixed', pattern_mode='heads'),
    'lsh': mixer('lsh'),
    'gateloop': mixer('gateloop'),
    'simple-gateloop': mixer('simple-gateloop'),
    's4d': mixer('s4d'),
    's4d, inv': mixer('s4d', init='inv'),
    's4d, by matrices': mixer('s4d', fft='monarch'),
    'h3': mixer('h3'),
    'hyena': mixer('hyena'),
}
# what stands around a mixer
AROUND: dict[str, dict[str, Any]] = {
    'attention, gated residuals': dict(residual='gru'),
    'attention, reversible': dict(reversible=True),
    'attention, shared layers': dict(share_layers=True),
    'attention, shared layers that halt': dict(share_layers=True, halting='act'),
}
OPTIONS = {**MIXERS, **AROUND}
LENGTHS = tuple(1024 * 2**k for k in range(6))
# a layer that is slower than this at one length is not timed at the next
TOO_SLOW = 20.0


def by_length(settings: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds that one layer takes, forward and backward, over a sequence of each length: the best of three."""
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


def written(settings: dict[str, Any], *, context: int) -> dict[str, float]:
    torch.manual_seed(0)
    return writing(
        HierarchicalTransformer(num_tokens=256, seq_len=2 * context, **{**BASE, **settings}), context=context
    )


def report(held: dict[str, Any], costs: dict[str, Any], folder: Path) -> None:
    lines = [
        '# What each mixer is worth, and what it costs',
        '',
        paced.protocol(held, 'mixers.py', BASE, DEFAULT, length=LENGTH, batch=BATCH),
        '',
        *paced.table(held, OPTIONS, DEFAULT),
        '',
        '![difference of each mixer to attention](mixers.png)',
        '',
        f'One layer of width {BASE["dim"]}, forward and backward, in milliseconds by the length of the sequence; bytes '
        'a second that the whole model writes, and the kilobytes of its state, after a context of 1,024 bytes in a '
        f'model for 2,048. The best of three. {costs["machine"]}. Made by the same command.',
        '',
        f'| mixer | {" | ".join(f"{n // 1024}k" for n in LENGTHS)} | bytes a second | state, kB |',
        f'|{"---|" * (len(LENGTHS) + 3)}',
    ]
    for name in (name for name in OPTIONS if name in costs['found']):
        cost = costs['found'][name]
        times = [f'{cost["ms"][str(n)]:,.0f}' if str(n) in cost['ms'] else '' for n in LENGTHS]
        wrote = cost['writing']
        lines.append(f'| {name} | {" | ".join(times)} | {wrote["bytes_a_second"]:.0f} | {wrote["state"] / 1000:,.0f} |')
    lines += ['', '![time of a layer by length](mixers_by_length.png)']
    write_text(folder / 'mixers.md', '\n'.join(lines) + '\n')
    paced.draw(folder / 'mixers.png', held, DEFAULT)
    draw_lengths(costs['found'], folder / 'mixers_by_length.png')


def draw_lengths(costs: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for k, (name, cost) in enumerate(costs.items()):
        style = ('-', '--', ':')[k // 10]
        axes.plot([int(n) for n in cost['ms']], list(cost['ms'].values()), style, marker='o', markersize=3, label=name)
    axes.set(xscale='log', yscale='log', xlabel='tokens', ylabel='milliseconds, forward and backward')
    axes.set_xticks(LENGTHS, [f'{n // 1024}k' for n in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paced.add_arguments(parser, seeds=2, minutes=1.0, options=OPTIONS)
    parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS, help='at which a layer is timed')
    args = parser.parse_args()

    path = args.out / 'mixers_costs.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    costs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(machine=machine(), found={})
    if not args.report:
        for name in args.only or OPTIONS:
            if name in MIXERS and name not in costs['found']:
                costs['found'][name] = found = dict(
                    ms=by_length(OPTIONS[name], tuple(args.lengths)),
                    writing=written(OPTIONS[name], context=1024),
                )
                write_text(path, json.dumps(costs, indent=1) + '\n')
                print(f'{name}: {", ".join(f"{ms:.0f}" for ms in found["ms"].values())} ms', flush=True)
    options = {name: {**BASE, **changes} for name, changes in OPTIONS.items()}
    held = paced.run_all(args, options, DEFAULT, args.out / 'mixers.json', length=LENGTH, batch=BATCH)
    report(held, costs, args.out)


if __name__ == '__main__':
    main()
