"""Estimates for larger models: parameters, operations, memory, and devices to share the weights. Nothing is run.

    python benchmarks/speed/plan.py

The counts come from `training.cost`, with models on the device 'meta', which takes no memory. The times assume
accelerators that reach a fixed share of their peak. They are not measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.common.results import new_parser
from benchmarks.common.tables import markdown
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.settings import PRESETS

# an accelerator of 80 GB: dense bfloat16 operations per second by its maker, and the assumed share of them
PEAK, SHARE, MEMORY = 989e12, 0.35, 80e9
# bytes of training text for each parameter
BYTES_A_PARAMETER = 20
# bytes per parameter: float32 weights, gradients and AdamW's two moments (Muon has one). Tables keep one number a row
STATE, TABLE_STATE = 16, 8

GPU = PRESETS['gpu']
COMMON: dict[str, Any] = {**GPU['model'], 'num_tokens': 256, 'ignore_index': -1, 'seq_len': GPU['seq_len']}
SIZES: dict[str, dict[str, Any]] = {
    'gpu preset': {},
    '0.4 B': dict(dim=1280, depth=(16, 5), heads=20),
    '1.3 B': dict(dim=2048, depth=(20, 5), heads=32),
    '7 B': dict(dim=4096, depth=(28, 5), heads=64),
}


def row(name: str, settings: dict[str, Any]) -> list[str]:
    with torch.device('meta'):
        model = HierarchicalTransformer(**settings)
        ids = torch.zeros(1, model.seq_len + 1, dtype=torch.long)
    total = sum(cost.parameters_by_level(model).values())
    tables = model.ngram_emb.weight.numel() if model.ngram_emb is not None else 0
    flops = cost.step_flops(model, model.seq_len) / model.seq_len
    # counted in float32; bfloat16 takes half
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
    return [
        name, f'{settings["dim"]:,}, {settings["depth"]}', f'{(total - tables) / 1e9:.2f} + {tables / 1e9:.2f}',
        f'{flops / 1e9:.2f}', f'{state / 1e9:.0f}', f'{kept / 1e9:.1f}', share, f'{rows}',
        f'{learn / 1e9:.0f}', f'{days:.1f} days' if days > 1 else f'{24 * days:.1f} hours',
    ]  # fmt: skip


def table() -> list[str]:
    head = (
        '', 'width, depths', 'parameters, B + tables', 'GFLOP a byte', 'weights and optimizer, GB',
        'kept a sequence of 8,192, GB', 'shared out', 'sequences a device', 'GB of text', 'time',
    )  # fmt: skip
    return markdown(head, [row(name, {**COMMON, **settings}) for name, settings in SIZES.items()])


def main(argv: list[str] | None = None) -> None:
    new_parser(__doc__).parse_args(argv)
    print('\n'.join(table()))


if __name__ == '__main__':
    main()
