"""What larger models would cost, on paper: parameters, operations, memory, and how to share them out. Nothing is run.

python benchmarks/plan.py

Counts are the library's own (`training.cost`), of models built without memory (device 'meta'). Times are what they come
to on accelerators of so many operations a second at a share of their peak: assumptions, not measurements.
"""

from __future__ import annotations

from typing import Any

import torch

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.settings import PRESETS

# an accelerator of 80 GB: dense bfloat16 operations a second as its maker gives them, and the share assumed of it
PEAK, SHARE, MEMORY = 989e12, 0.35, 80e9
BYTES_A_PARAMETER = 20  # tokens to learn from for each parameter are counted in bytes here
# float32 weights and gradients, and of AdamW two moments (Muon has one); tables of n-grams have one number a row
STATE, TABLE_STATE = 16, 8

GPU = PRESETS['gpu']
COMMON: dict[str, Any] = {**GPU['model'], 'num_tokens': 256, 'ignore_index': -1, 'seq_len': GPU['seq_len']}
SIZES: dict[str, dict[str, Any]] = {
    'gpu preset': {},
    '0.4 B': dict(dim=1280, depth=(16, 5), heads=20),
    '1.3 B': dict(dim=2048, depth=(20, 5), heads=32),
    '7 B': dict(dim=4096, depth=(28, 5), heads=64),
}


def row(name: str, settings: dict[str, Any]) -> str:
    with torch.device('meta'):
        model = HierarchicalTransformer(**settings)
        ids = torch.zeros(1, model.seq_len + 1, dtype=torch.long)
    total = sum(cost.parameters_by_level(model).values())
    tables = model.ngram_emb.weight.numel() if model.ngram_emb is not None else 0
    flops = cost.step_flops(model, model.seq_len) / model.seq_len
    # counted in float32, of which bfloat16 is half
    with cost.FusedKernels():
        kept = cost.bytes_kept(model, ids, return_loss=True) / 2
    state = STATE * (total - tables) + TABLE_STATE * tables
    devices = 1
    while state / devices + kept > 0.9 * MEMORY:
        devices *= 2
    learn = BYTES_A_PARAMETER * (total - tables)
    days = learn * flops / (PEAK * SHARE * devices) / 86400
    rows = int((0.9 * MEMORY - state / devices) / kept)
    share = 'whole' if devices == 1 else f'FSDP2 over {devices}'
    cells = [
        name, f'{settings["dim"]:,}, {settings["depth"]}', f'{(total - tables) / 1e9:.2f} + {tables / 1e9:.2f}',
        f'{flops / 1e9:.2f}', f'{state / 1e9:.0f}', f'{kept / 1e9:.1f}', share, f'{rows}',
        f'{learn / 1e9:.0f}', f'{days:.1f} days' if days > 1 else f'{24 * days:.1f} hours',
    ]  # fmt: skip
    return f'| {" | ".join(cells)} |'


def table() -> list[str]:
    return [
        '| | width, depths | parameters, B + tables | GFLOP a byte | weights and optimizer, GB | '
        'kept a sequence of 8,192, GB | shared out | sequences a device | GB of text | time |',
        '|---|---|---|---|---|---|---|---|---|---|',
        *(row(name, {**COMMON, **settings}) for name, settings in SIZES.items()),
    ]


def main() -> None:
    print('\n'.join(table()))


if __name__ == '__main__':
    main()
