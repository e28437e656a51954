"""The benchmarks of quality run at toy size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module('benchmarks.quality.ablations')


def test_each_ablation_changes_the_model(ablations: Any) -> None:
    outs: list[float] = []
    weights: dict[str, torch.Tensor] = {}
    for changes in ablations.OPTIONS.values():
        torch.manual_seed(0)
        model = HierarchicalTransformer(num_tokens=256, seq_len=64, **{**ablations.BASE, 'dim': 8, **changes})
        # weights of the default where shapes match, so that an unused module changes nothing
        held = dict(model.named_parameters())
        weights = weights or {name: p.detach().clone() for name, p in held.items()}
        for name, p in held.items():
            if name in weights and weights[name].shape == p.shape:
                p.data.copy_(weights[name])
        torch.manual_seed(0)
        loss, _ = model(torch.randint(1, 256, (1, 33)), return_loss=True)
        outs.append(loss.item())
    # every option gives another loss, even though the text is as short as half of a window
    assert len(set(outs)) == len(outs)


def test_ablations_continue_where_they_stopped(
    ablations: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(ablations.BASE, 'dim', 8)
    monkeypatch.setattr(ablations, 'LENGTH', 64)
    monkeypatch.setattr(ablations.paced, 'ROUNDS', 1)

    def ask(*args: object) -> dict[str, Any]:
        ablations.main(['--data', str(corpus), '--out', str(tmp_path), *map(str, args)])
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


def test_options_that_compute_the_same_have_one_pace(
    ablations: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    monkeypatch.setattr(ablations.paced, 'ROUNDS', 1)
    plain = dict(dim=8, depth=1, heads=1, dim_head=8)
    options = dict(plain=plain, faster=plain | dict(train=dict(lr=1.0)), averaged=plain | dict(train=dict(ema=0.9)))
    ms, ratios = ablations.paced.pace(options, 'plain', data=str(corpus), length=32, batch=1)
    assert ms > 0
    assert ratios['faster'] == ratios['plain'] == 1
    assert ratios['averaged'] != 1


def test_mixers_are_timed_trained_and_reported(monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT)
    mixers = importlib.import_module('benchmarks.quality.mixers')
    mixer_costs = importlib.import_module('benchmarks.speed.mixer_costs')
    monkeypatch.setattr(mixers, 'LENGTH', 64)
    monkeypatch.setattr(mixers.paced, 'ROUNDS', 1)
    monkeypatch.setitem(mixers.BASE, 'dim', 8)
    shared = ['--out', str(tmp_path), '--only', 'attention', 's4d']
    mixers.main([*shared, '--data', str(corpus), '--minutes', '0.002', '--valid-bytes', '1024', '--seeds', '1'])
    mixer_costs.main([*shared, '--lengths', '1024'])
    held = json.loads((tmp_path / 'mixers.json').read_text())
    assert 2 < held['runs']['s4d']['0']['bits'] < 9
    costs = json.loads((tmp_path / 'mixer_costs.json').read_text())['found']
    assert costs['s4d']['writing']['state'] < costs['attention']['writing']['state']
    assert '| s4d |' in (tmp_path / 'mixers.md').read_text()
    assert '| s4d |' in (tmp_path / 'mixer_costs.md').read_text()
    assert (tmp_path / 'mixer_costs.png').stat().st_size > 1000


def test_synthetic_tasks_have_one_answer_and_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT)
    synthetics = importlib.import_module('benchmarks.quality.synthetics')
    ids, answers = synthetics.recall(50)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        # every value that follows the key of the question
        assert {row[i + 1] for i in range(0, len(row) - 1, 2) if row[i] == row[-1]} == {answer}
    ids, answers = synthetics.induction(50)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        assert [row[i + 1] for i in range(len(row) - 1) if row[i] == row[-1]] == [answer]

    asked = ['--seeds', '1', '--only', 'hyena', '--out', str(tmp_path)]
    synthetics.main([*asked, '--steps', '5'])
    with pytest.raises(SystemExit, match='was made with'):
        synthetics.main([*asked, '--steps', '6'])
    assert '| hyena |' in (tmp_path / 'synthetics.md').read_text()
