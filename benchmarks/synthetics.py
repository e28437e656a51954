"""Two tasks that attention solves, and that were made to see what else does: recall, and induction.

python benchmarks/synthetics.py

Each mixer is the only one of a small flat model, trained for a fixed number of steps on tasks that are drawn anew each
step; the share of right answers on sequences it has not seen is written to synthetics.md.

- associative recall: pairs of a key and a value, then a key that came before; answer: its value.
- induction heads: random tokens, with a special one somewhere, and again at the end; answer: what followed it.

Fu et al. 2023, arXiv 2212.14052, section 3.1; Poli et al. 2023, arXiv 2302.10866, section 4.1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training.report import write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'synthetics.json'
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
    """Half of the tokens are keys, half values; each sequence has its own values, and asks for a key that came."""
    half = TOKENS // 2
    pairs = LENGTH // 2
    values = torch.randint(half, TOKENS, (batch, half))
    keys = torch.randint(0, half, (batch, pairs))
    asked = keys.gather(1, torch.randint(0, pairs - 1, (batch, 1)))
    keys[:, -1:] = asked
    ids = torch.stack((keys, values.gather(1, keys)), dim=-1).flatten(1)
    return ids[:, :-1], values.gather(1, asked)[:, 0]


def induction(batch: int) -> tuple[Tensor, Tensor]:
    """The last token of the vocabulary is the special one."""
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
    # which no step of training drew
    torch.manual_seed(10_000 + seed)
    with torch.no_grad():
        ids, answer = TASKS[task](1024)
        return (model(ids)[:, -1].argmax(dim=-1) == answer).double().mean().item()


def report(held: dict[str, Any]) -> None:
    lines = [
        '# What mixers can find again',
        '',
        f'Share of right answers after {held["steps"]:,} steps of {BATCH} sequences of {LENGTH} tokens out of '
        f'{TOKENS}, {held["seeds"]} seeds, mean and range; a guess is right in one of {TOKENS // 2} (recall) or '
        f'{TOKENS - 1} (induction). {held["machine"]}. Made by `python benchmarks/synthetics.py --steps '
        f'{held["steps"]} --seeds {held["seeds"]}`.',
        '',
        f'Models of one level: {", ".join(f"`{key} = {value!r}`" for key, value in MODEL.items())}. Every one has a '
        'token shift before each mixer and feed-forward, which lets a token know the one before it.',
        '',
        f'| mixer | {" | ".join(TASKS)} |',
        '|---|---|---|',
    ]
    for name, runs in held['runs'].items():
        cells = []
        for task in TASKS:
            found = list(runs[task].values())
            cells.append(f'{statistics.mean(found):.1%} ({min(found):.1%} to {max(found):.1%})')
        lines.append(f'| {name} | {" | ".join(cells)} |')
    write_text(HERE / 'synthetics.md', '\n'.join(lines) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--only', nargs='+', choices=MIXERS)
    args = parser.parse_args()
    asked = dict(steps=args.steps, seeds=args.seeds)
    held: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if held and asked != {key: held[key] for key in asked}:
        raise SystemExit(f'{RESULTS} was made with { ({key: held[key] for key in asked}) }: move it away to begin anew')
    held = held or dict(**asked, machine=machine(), runs={})
    for name in args.only or MIXERS:
        for task in TASKS:
            done = held['runs'].setdefault(name, {}).setdefault(task, {})
            for seed in range(args.seeds):
                if str(seed) not in done:
                    done[str(seed)] = accuracy(name, task, seed, args.steps)
                    write_text(RESULTS, json.dumps(held, indent=1) + '\n')
                    print(f'{name}, {task}, seed {seed}: {done[str(seed)]:.3f}', flush=True)
    report(held)


if __name__ == '__main__':
    main()
