"""The report of made-up results."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module('benchmarks.quality.race'), importlib.import_module('benchmarks.quality.report')


@pytest.fixture
def results(modules: tuple[Any, Any], tmp_path: Path) -> Path:
    """A whole race: peers have 3 bits and more, our flat model 2.5, and the preset 2."""
    race, _ = modules
    folder = tmp_path / 'race'
    folder.mkdir()
    kept = race.Results(folder)
    rank = {peer.name: 3 + place / 10 for place, peer in enumerate(race.PEERS)}
    bits = rank | {'ours, flat': 2.5, 'ours, flat, window of 64': 2.4, 'ours, cpu preset': 2.0}
    for stage in race.stages(kept, (5.0, 10.0, 30.0), 2):
        for run in stage:
            score = bits[run.contestant] + (run.lr == 3e-3) + run.seed / 100
            held = dict(
                vars(run), bits=score, valid_bits=score, streaming_bits=score - 0.1, steps=100, bytes=10**6,
                parameters=10**6, peak_bytes=10**9, pace=[80.0, 90.0], data='text.bz2',
                machine=f'2026-01-0{run.seed + 1}, a machine',
                sample=dict(prompt='Once', text=f'upon {run.minutes:g} minutes'),
            )  # fmt: skip
            kept.path(run).write_text(json.dumps(held))
    return folder


def test_the_report_names_the_winner_the_targets_and_the_command(
    modules: tuple[Any, Any], results: Path, tmp_path: Path
) -> None:
    _, report = modules
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{report.BEGIN}\nold\n{report.END}\nafter\n')
    report.main(['--folder', str(results.parent), '--readme', str(readme)])
    text = (tmp_path / 'report.md').read_text()
    assert '`python benchmarks/quality/race.py --data text.bz2` on 2026-01-01 to 2026-01-02, a machine. ' in text
    assert (tmp_path / 'race.png').stat().st_size > 10_000
    # two seeds, their mean and spread, and a third fewer bits than the best peer
    assert '| **ours, cpu preset** | 2.005 ± 0.007 | 1.905 ± 0.007 | -33.3 % | 2 |' in text
    assert '| published, flat | 3.005 ± 0.007 |' in text
    # a peer is not shown at its worse learning rate
    assert '4.0' not in text
    assert (
        '| 30 % fewer bits than the best peer after 5 minutes | 33.3 % fewer than published, flat | 2 and 2 |' in text
    )
    # compared with the better of two flat models, or with the only one
    beaten = (
        '| 3 % fewer bits than our best flat model, 10 minutes, 1,024 bytes | 16.6 % fewer than flat, window of 64 |'
    )
    assert beaten in text
    alone = (
        '| 20 % fewer bits than our best flat model, 30 minutes, 16,384 bytes | 20.0 % fewer than flat, the only one'
    )
    assert alone in text
    assert '| in 4 minutes the score of the best peer after 30 (3.000) | 2.005 after 4 minutes | 2 and 1 |' in text

    said = readme.read_text()
    assert said.startswith('before\n')
    assert said.endswith('\nafter\n')
    assert 'old' not in said
    assert '| **ours, cpu preset** | 1.0 | 2.005 ± 0.007 | 2.005 ± 0.007 | 2.000 |' in said
    # both have the table of longer contexts
    for where in (text, said):
        assert (
            '| 1,024 | 10 | 2.505 ± 0.007 (1.0 MB) | 2.405 ± 0.007 (1.0 MB) | 2.005 ± 0.007 (1.0 MB) | -20.0 % |'
            in where
        )
        assert '| 16,384 | 30 | 2.500 (1.0 MB) |  | 2.000 (1.0 MB) | -20.0 % |' in where
        # a time with only one length has no row
        assert '| 1,024 | 5 |' not in where


def test_the_results_of_other_scripts_are_in_the_report(
    modules: tuple[Any, Any], results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scripts, with a model built for each of their options, and nothing trained."""
    _, report = modules
    resolutions, scaling, recipe, paced = report.resolutions, report.scaling, report.recipe, report.recipe.paced
    asked: list[tuple[Any, int]] = []

    def train(option: Any, args: Any, *, seed: int, steps: int, length: int, batch: int, look: Any) -> dict[str, Any]:
        settings, flags = paced.split(option)
        asked.append((option, steps))
        model = HierarchicalTransformer(**{**settings, 'num_tokens': 256, 'seq_len': length, 'ngram_rows': 64})
        assert flags['lr'] > 0
        return dict(
            bits=3 - len(asked) / 100, streaming=2.0, steps=steps, parameters=10**6, tables=10**5, **look(model)
        )

    def pace(options: Any, default: str, **_: int) -> tuple[float, dict[str, float]]:
        return 60.0, {name: 1.0 if name == default else 2.0 for name in options}

    monkeypatch.setattr(paced, 'train', train)
    monkeypatch.setattr(paced, 'pace', pace)
    costs = dict(kept=1e6, bytes_a_second=100.0)
    monkeypatch.setattr(resolutions, 'costs', lambda: dict.fromkeys(resolutions.OPTIONS, costs))
    for module in (resolutions, recipe):
        module.main(['--data', 'text.bz2', '--minutes', '1', '--seeds', '1', '--out', str(tmp_path)])
    # a thousand steps of the flat model, and as many of the others or half
    assert [steps for option, steps in asked if option == resolutions.OPTIONS['1, 1/8']] == [500, 1000]
    scaling.main(['--data', 'text.bz2', '--compute', '1e10', '1e11', '1e12', '1e13', '--out', str(tmp_path)])
    small, large = asked[-len(scaling.RUNS)], asked[-1]
    assert small[1] * scaling.operations(small[0]) == pytest.approx(1e10, rel=0.5)
    assert large[1] * scaling.operations(large[0]) == pytest.approx(1e13, rel=0.01)
    trained = len(asked)
    for path in tmp_path.glob('*.png'):
        path.unlink()

    report.main(['--folder', str(tmp_path)])
    text = (tmp_path / 'report.md').read_text()
    assert len(asked) == trained
    assert [line[:4] for line in text.splitlines() if line.startswith('## ')] == [f'## {k}' for k in (1, 2, 3, 4, 5)]
    for name in (*resolutions.OPTIONS, *scaling.RUNS, *recipe.OPTIONS):
        assert f'| {name} |' in text
    assert 'upon 30 minutes' in text
    for name in ('race', 'scaling', 'recipe'):
        assert (tmp_path / f'{name}.png').stat().st_size > 10_000

    with pytest.raises(SystemExit, match='was made with'):
        resolutions.main(['--data', 'text.bz2', '--minutes', '2', '--out', str(tmp_path)])


def test_costs_of_resolutions_are_measured(modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resolutions = modules[1].resolutions
    tiny = dict(dim=8, depth=1, heads=1, dim_head=8)
    for name, value in dict(OPTIONS=dict(one=tiny, two=tiny | dict(depth=2)), LENGTH=32, ROUNDS=1).items():
        monkeypatch.setattr(resolutions, name, value)
    found = resolutions.costs()
    assert found['two']['kept'] > found['one']['kept'] > 0
    assert all(each['bytes_a_second'] > 0 for each in found.values())


def test_slopes_of_a_power_law_are_found(modules: tuple[Any, Any]) -> None:
    found = modules[1].scaling.slope([(x, 3 * x**-0.1) for x in (1e10, 1e11, 1e12)])
    assert found == pytest.approx((3, 0.1))


def test_memory_on_paper_is_that_of_fused_attention(modules: tuple[Any, Any]) -> None:
    """On the meta device, the plan counts the bytes that a real pass keeps."""
    plan = modules[1].plan
    sizes = dict(seq_len=1024, dim=(32, 64), depth=(2, 3), heads=(1, 2), ngram_rows=256)
    kept = {}
    for device in ('cpu', 'meta'):
        with torch.device(device), cost.FusedKernels() if device == 'meta' else nullcontext():
            model = HierarchicalTransformer(**{**plan.COMMON, **sizes})
            kept[device] = cost.bytes_kept(model, torch.zeros(1, 1025, dtype=torch.long), return_loss=True)
    assert kept['meta'] == pytest.approx(kept['cpu'], rel=0.05)


def test_a_missed_target_is_marked(modules: tuple[Any, Any], results: Path, tmp_path: Path) -> None:
    _, report = modules
    for path in results.glob('ours-cpu-preset*'):
        held = json.loads(path.read_text())
        path.write_text(json.dumps(held | dict(bits=3.1)))
    report.main(['--folder', str(results.parent)])
    text = (tmp_path / 'report.md').read_text()
    assert text.count(': missed |') == text.count('fewer bits than') + 1
    assert '| +24.0 % |' in text
    readme = tmp_path / 'README.md'
    readme.write_text('nothing to fill in\n')
    with pytest.raises(SystemExit, match='where the race would go'):
        report.main(['--folder', str(results.parent), '--readme', str(readme)])
    assert readme.read_text() == 'nothing to fill in\n'


def test_runs_of_the_race_go_to_a_tracker(modules: tuple[Any, Any], results: Path, tmp_path: Path) -> None:
    _, report = modules
    for path in results.iterdir():
        if '-1024-5m-' not in path.name or 'seed0' not in path.name:
            path.unlink()
    kept = [json.loads(path.read_text()) for path in results.iterdir()]
    (tmp_path / 'recipe.json').write_text(json.dumps(dict(runs={'GELU': {'0': dict(bits=1.25, steps=3)}})))
    two = dict(runs={'a': {'0': dict(bits=1)}, 'b': {'0': dict(bits=2)}})
    report.comparison.draw(tmp_path / 'recipe.png', two, 'a')
    report.track(report.race_report.chosen(kept), tmp_path, tmp_path, ['tensorboard'])
    found, pictures = [], []
    for folder in {path.parent for path in (tmp_path / 'tracked').rglob('events*')}:
        events = EventAccumulator(str(folder)).Reload()
        if 'bits' in events.Tags()['scalars']:
            # each run has its own folder
            [event] = events.Scalars('bits')
            found.append(round(event.value, 4))
        pictures += events.Tags()['images']
    assert sorted(found) == sorted([1.25, *(round(run['bits'], 4) for run in report.race_report.chosen(kept))])
    assert pictures == ['recipe']
