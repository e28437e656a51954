"""Which mixers solve two tasks that attention solves: associative recall, and induction heads.

    python benchmarks/quality/synthetics.py

A small flat model with each mixer trains for a fixed number of steps. Each step draws new sequences. synthetics.md
holds the share of correct answers on sequences that the model has not seen.

- associative recall: pairs of a key and a value, then a key that came before. The answer is its value.
- induction heads: random tokens with one special token, and the special token again at the end. The answer is the token
  that followed it.

Fu et al. 2023, arXiv 2212.14052, section 3.1; Poli et al. 2023, arXiv 2302.10866, section 4.1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from benchmarks.common.machine import machine
from benchmarks.common.results import check_terms, new_folder, new_parser, read_json, write_json, write_lines
from benchmarks.common.tables import markdown
from simple_hierarchical_transformer import HierarchicalTransformer

LENGTH, BATCH, LEARNING_RATE = 64, 64, 2e-3
MODEL: dict[str, Any] = dict(dim=64, depth=2, heads=2, dim_head=32, recon_loss_weight=0.0, next_latent_loss_weight=0.0)
TOKENS = 20

MIXERS: dict[str, dict[str, Any]] = {
    'attention': {},
    'attention, strided, union': dict(mixer_kwargs=dict(pattern='strided', pattern_mode='union')),
    'attention in a window of 16': dict(window_sizes=16),
    'lsh': dict(mixer='lsh'),
    'gateloop': dict(mixer='gateloop'),
    'gateloop, 8 heads': dict(mixer='gateloop', mixer_kwargs=dict(state_heads=8)),
    'simple-gateloop': dict(mixer='simple-gateloop'),
    's4d': dict(mixer='s4d'),
    'h3': dict(mixer='h3'),
    'hyena': dict(mixer='hyena'),
}


def recall(batch: int) -> tuple[Tensor, Tensor]:
    """Ids `(batch, LENGTH - 1)` and answers `(batch,)`.

    The first half of the tokens are keys, the others values. Each sequence draws a value for each key.
    """
    half = TOKENS // 2
    pairs = LENGTH // 2
    values = torch.randint(half, TOKENS, (batch, half))
    keys = torch.randint(0, half, (batch, pairs))
    asked = keys.gather(1, torch.randint(0, pairs - 1, (batch, 1)))
    keys[:, -1:] = asked
    ids = torch.stack((keys, values.gather(1, keys)), dim=-1).flatten(1)
    return ids[:, :-1], values.gather(1, asked)[:, 0]


def induction(batch: int) -> tuple[Tensor, Tensor]:
    """Ids `(batch, LENGTH)` and answers `(batch,)`. The last token of the vocabulary is the special one."""
    ids = torch.randint(0, TOKENS - 1, (batch, LENGTH - 1))
    at = torch.randint(0, LENGTH - 3, (batch, 1))
    ids.scatter_(1, at, TOKENS - 1)
    ids[:, -1] = TOKENS - 1
    return ids, ids.gather(1, at + 1)[:, 0]


TASKS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    'associative recall': recall,
    'induction heads': induction,
}


def accuracy(name: str, task: str, seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    model = HierarchicalTransformer(num_tokens=TOKENS, seq_len=LENGTH, ignore_index=-1, **MODEL, **MIXERS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ids, answer = TASKS[task](BATCH)
        labels = torch.full_like(ids, -1)
        labels[:, -1] = answer
        loss, _ = model(ids, return_loss=True, labels=labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # a seed that training does not use
    torch.manual_seed(10_000 + seed)
    with torch.no_grad():
        ids, answer = TASKS[task](1024)
        return (model(ids)[:, -1].argmax(dim=-1) == answer).double().mean().item()


def report(held: dict[str, Any], folder: Path) -> None:
    lines = [
        '# Recall by mixers',
        '',
        f'Share of correct answers after {held["steps"]:,} steps of {BATCH} sequences of {LENGTH} tokens out of '
        f'{TOKENS}, {held["seeds"]} seeds, mean and range. A guess is right once in {TOKENS // 2} (recall) or '
        f'{TOKENS - 1} (induction) times. {held["machine"]}. Made by `python benchmarks/quality/synthetics.py --steps '
        f'{held["steps"]} --seeds {held["seeds"]}`.',
        '',
        f'Models of one level: {", ".join(f"`{key} = {value!r}`" for key, value in MODEL.items())}. A token '
        'shift before each mixer and feed-forward gives each token a part of the one before it.',
        '',
    ]
    rows = []
    for name, runs in held['runs'].items():
        cells = [name]
        for task in TASKS:
            found = list(runs[task].values())
            cells.append(f'{statistics.mean(found):.1%} ({min(found):.1%} to {max(found):.1%})')
        rows.append(cells)
    write_lines(folder / 'synthetics.md', [*lines, *markdown(('mixer', *TASKS), rows)])


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--only', nargs='+', choices=MIXERS)
    parser.add_argument('--out', type=Path, help='folder of the results (default: one of today in benchmarks/results)')
    args = parser.parse_args(argv)
    folder = args.out or new_folder('synthetics')
    path = folder / 'synthetics.json'
    asked = dict(steps=args.steps, seeds=args.seeds)
    if held := read_json(path):
        check_terms(path, held, asked, 'move it away to start again')
    held = held or dict(**asked, machine=machine(), runs={})
    for name in args.only or MIXERS:
        for task in TASKS:
            done = held['runs'].setdefault(name, {}).setdefault(task, {})
            for seed in range(args.seeds):
                if str(seed) not in done:
                    done[str(seed)] = accuracy(name, task, seed, args.steps)
                    write_json(path, held)
                    print(f'{name}, {task}, seed {seed}: {done[str(seed)]:.3f}', flush=True)
    report(held, folder)


if __name__ == '__main__':
    main()
