"""Roles and costs of weights as the modules of this package declare them, against those that rules by name gave."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.cases import BASE, CASES

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.optim import build_optimizer
from simple_hierarchical_transformer.training.settings import BYTES, PRESETS

MODELS: dict[str, dict[str, Any]] = {
    **{f'preset {name}': {**BYTES, **each['model'], 'seq_len': each['seq_len']} for name, each in PRESETS.items()},
    **{name: {**BASE, **case} for name, case in CASES.items()},
}
# what rules by name gave for these models before modules declared roles, '*' for a number
SAVED = json.loads((Path(__file__).parent / 'accounting.json').read_text())
GROUP = {pattern: group for group, patterns in SAVED['groups'].items() for pattern in patterns}
NUMBER = re.compile(r'\.\d+(?=\.|$)')


# new cases need no saved numbers
@pytest.mark.parametrize('name', [name for name in MODELS if name in SAVED['costs']])
def test_groups_and_costs_are_those_of_the_rules_by_name(name: str) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**deepcopy(MODELS[name]))
    expected: dict[str, list[str]] = {group: [] for group in SAVED['groups']}
    for key, p in model.named_parameters():
        expected[GROUP[NUMBER.sub('.*', key)] if p.ndim > 1 else 'others'].append(key)
    names = {p: key for key, p in model.named_parameters()}
    for rule in ('muon', 'adamw'):
        optimizer = build_optimizer(model, rule, lr=1e-3, table_lr=2e-3, weight_decay=0.1)
        settings = dict(
            matrices=(rule, 1e-3, 1.0, 0.1),
            tables=('adamw', 2e-3, 2.0, 0.1),
            others=('adamw', 1e-3, 1.0, 0.0),
            rows=('rows', 2e-3, 2.0, 0.0),
        )
        assert [
            ([names[p] for p in group['params']], *(group[key] for key in ('rule', 'lr', 'scale', 'weight_decay')))
            for group in optimizer.param_groups
        ] == [(keys, *settings[group]) for group, keys in expected.items() if keys]

    saved = SAVED['costs'][name]
    assert {str(level): count for level, count in cost.parameters_by_level(model).items()} == saved['parameters']
    assert cost.step_flops(model, model.seq_len) == pytest.approx(saved['operations'], rel=1e-12)
