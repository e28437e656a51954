"""The benchmark of placed coarse tokens at toy size, and its arithmetic."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

FLAT, STRIDE = 'flat, window of 64', 'stride 4'


@pytest.fixture
def boundaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT)
    threads = torch.get_num_threads()
    yield importlib.import_module('benchmarks.quality.boundaries')
    torch.set_num_threads(threads)


def tuning(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob('*-tuning.json')}


def test_a_toy_continues_where_it_stopped_and_is_reported(
    boundaries: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(kind: str, *args: str) -> set[str]:
        boundaries.main([kind, '--data', str(corpus), '--toy', '--seeds', '1', '--out', str(tmp_path), *args])
        return {path.stem for path in tmp_path.glob('*.json')}

    assert ask('race', '--only', FLAT, '--rates', '1', '--for', '0', '--plan') == set()
    assert capsys.readouterr().out == 'race-flat-window-of-64-0.3-rate1-seed0\n'
    first = ask('race', '--only', FLAT, '--rates', '1')
    path = tmp_path / f'{first.pop()}.json'
    held = path.read_text()
    race = json.loads(held)
    assert race['seconds'] >= 0.3
    assert race['bytes'] == 2 * 64 * race['steps']
    assert len(race['streams']) == 2
    assert race['bits'] == pytest.approx(sum(race['streams']) / 2)
    # one stream is scored on the way
    assert 2 <= len(race['curve']) <= 1 + len(boundaries.MOMENTS)
    assert race['streams'][0] == race['curve'][-1]['bits'] < race['curve'][0]['bits']
    assert ask('race', '--only', FLAT, '--rates', '1') == {path.stem}
    assert path.read_text() == held

    # this package stands in for the published one, which has the same constructor
    peer = boundaries.race.Contestant('peer', 'torch', 'published', dict(dim=16, depth=1, heads=1, dim_head=8))
    monkeypatch.setattr(boundaries, 'PEERS', dict(peer=peer))
    monkeypatch.setattr(boundaries.race, 'PEER_PATH', str(ROOT))
    monkeypatch.setattr(boundaries.race, 'python_of', lambda *_: sys.executable)
    [peers] = ask('race', '--only', 'peer', '--rates', '1', '--tune', '0.1') - {path.stem} - tuning(tmp_path)
    assert 0 < json.loads((tmp_path / f'{peers}.json').read_text())['bits'] < 9

    # further runs in this process, which takes less time
    run = importlib.import_module('benchmarks.quality.boundaries_run')
    monkeypatch.setattr(boundaries.race, 'call', lambda _, given, **__: (json.dumps(run.train(json.loads(given))), 0))
    ask('scaling', '--only', FLAT, STRIDE, '--rates', '0.5', '1')
    scaling = [json.loads(each.read_text()) for each in tmp_path.glob('scaling-*.json')]
    # two rates of two models, then three sizes of them
    assert sorted(each['tuning'] for each in scaling) == [False] * 6 + [True] * 4
    for each in scaling:
        # the last step may go beyond the budget
        assert 1 <= each['operations'] / each['budget'] < 1 + 1 / (each['steps'] - 1)
        assert 0 < each['bits'] < 9

    boundaries.main(['report', '--out', str(tmp_path)])
    page = (tmp_path / 'boundaries.md').read_text()
    assert '| **flat, window of 64** |' in page
    assert '| stride 4 |' in page
    assert 'x operations^-' in page
    assert (tmp_path / 'scaling.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match='give another --out'):
        boundaries.main(['race', '--data', str(ROOT / 'train.py'), '--toy', '--out', str(tmp_path), '--only', FLAT,
                         '--rates', '1', '--seeds', '1'])  # fmt: skip


def test_no_run_reads_what_is_scored(boundaries: Any) -> None:
    spans = boundaries.split(100_000, 8000)
    assert spans['test'] == range(92_000, 100_000)
    assert len(spans['valid']) == 8000
    # and there is a gap before each of the two
    assert spans['train'].stop + 2000 == spans['valid'].start
    assert spans['valid'].stop + 2000 == spans['test'].start
    with pytest.raises(ValueError, match='too few to hold out'):
        boundaries.split(20_000, 8000)


def test_lines_cross_where_they_were_made_to_cross(boundaries: Any) -> None:
    report = importlib.import_module('benchmarks.quality.boundaries_report')
    noise = (1.001, 0.999, 1.0005, 0.9995, 1.0)
    sizes = [10.0**x for x in range(10, 15)]
    twins = [dict(budget=x, seed=seed, bits=9 * x**-0.04) for x in sizes for seed in (0, 1)]
    # equal at 1e13
    runs = [
        dict(budget=x, seed=0, bits=9 * x**-0.04 * (x / 1e13) ** -0.02 * e) for x, e in zip(sizes, noise, strict=True)
    ]
    ratios = report.ratios_of(runs, twins)
    found = report.cross(ratios)
    assert found.middle == pytest.approx(13, abs=0.05)
    assert 12.8 < found.low < 13 < found.high < 13.2
    assert found.falls == 1
    assert report.cross([(x, 1 / ratio) for x, ratio in ratios]).falls == 0
    # a run without a twin has no ratio
    assert report.ratios_of(runs, twins[2:]) == ratios[1:]


def test_flat_twins_cost_as_much(boundaries: Any) -> None:
    """At every size, a step of the strided model has the operations of a flat one, within a third."""
    run = importlib.import_module('benchmarks.quality.boundaries_run')
    terms = boundaries.Terms()
    for size in boundaries.SIZES.values():
        flat, strided = (
            run.operations_of(boundaries.OURS[name].settings(size, terms), terms.length)({}) for name in (FLAT, STRIDE)
        )
        assert 0.75 < strided / flat < 4 / 3


def test_operations_follow_the_share_of_boundaries(boundaries: Any) -> None:
    run = importlib.import_module('benchmarks.quality.boundaries_run')
    terms, word = boundaries.Terms(), boundaries.OURS['words'].settings(boundaries.RACE_SIZE, boundaries.Terms())
    count = run.operations_of(word, terms.length)
    for length in (2, 4, 8, 16):
        model = run.build({**word, 'hierarchies': (1, length)}, terms.length)
        assert count({1: 1 / length}) == run.cost.step_flops(model, terms.length)


def test_contestants_are_models(boundaries: Any) -> None:
    run = importlib.import_module('benchmarks.quality.boundaries_run')
    for name, contestant in boundaries.OURS.items():
        for kind, budget in (('race', 600.0), ('scaling', 1e13)):
            settings = boundaries.Run(kind, name, budget, 1.0, 0).settings(boundaries.Terms())
            model = run.build(settings['model'], settings['seq_len'])
            assert (len(model.levels) == 1) == (contestant.model is None)
            assert (model.ngram_emb is not None) == contestant.tables
            assert all(level.window is not None for level in model.levels)
