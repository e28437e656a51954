"""The benchmarks run, whatever the figures are."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    module = importlib.import_module('ablations')
    monkeypatch.setattr(module, 'HERE', tmp_path)
    monkeypatch.setattr(module, 'RESULTS', tmp_path / 'ablations.json')
    return module


def test_each_ablation_changes_the_model(ablations: Any) -> None:
    outs: list[float] = []
    weights: dict[str, torch.Tensor] = {}
    for changes in ablations.OPTIONS.values():
        torch.manual_seed(0)
        model = HierarchicalTransformer(num_tokens=256, seq_len=64, **{**ablations.BASE, 'dim': 8, **changes})
        # the default's weights wherever there are such, so that what is built and never used changes nothing
        held = dict(model.named_parameters())
        weights = weights or {name: p.detach().clone() for name, p in held.items()}
        for name, p in held.items():
            if name in weights and weights[name].shape == p.shape:
                p.data.copy_(weights[name])
        torch.manual_seed(0)
        loss, _ = model(torch.randint(1, 256, (1, 33)), return_loss=True)
        outs.append(loss.item())
    # in so short a text the half of each window is all there is, or less: every option gives another loss
    assert len(set(outs)) == len(outs)


def test_ablations_go_on_where_they_stopped(
    ablations: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(ablations.BASE, 'dim', 8)
    monkeypatch.setattr(ablations, 'ROUNDS', 1)

    def ask(*args: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, 'argv', ['ablations.py', '--data', str(corpus), *map(str, args)])
        ablations.main()
        return json.loads((tmp_path / 'ablations.json').read_text())['runs']

    settings = ('--minutes', 0.01, '--valid-bytes', 2048)
    first = ask(*settings, '--seeds', 1, '--only', 'default')
    runs = ask(*settings, '--seeds', 1, '--only', 'default', 'hourglass')
    assert runs['default'] == first['default']
    assert set(first['default']['0']['silent']) == {'4x', '16x', '4x, 16x'}
    assert 2 < runs['hourglass']['0']['bits'] < 9

    table = (tmp_path / 'ablations.md').read_text()
    assert '| default |' in table
    assert '| hourglass |' in table
    assert (tmp_path / 'ablations.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match='was made with'):
        ask('--minutes', 0.02, '--only', 'default')
