"""The race with tiny budgets: its runs, their order, its files, and its scores."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training.settings import BYTES, new_settings, parse_args

TINY = ('--model', 'dim=16', 'depth=1', 'heads=1', 'dim_head=8', 'ngram_rows=64')


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT)
    threads = torch.get_num_threads()
    yield importlib.import_module('benchmarks.quality.race')
    torch.set_num_threads(threads)


def test_each_stage_depends_on_earlier_ones(race: Any, tmp_path: Path) -> None:
    """With made-up scores: the fourth peer is the best, and the second rate is better."""
    results = race.Results(tmp_path)
    rank = {peer.name: place for place, peer in enumerate((race.PEERS * 2)[3 : 3 + len(race.PEERS)])}
    stages = []
    for stage in race.stages(results, (5, 10, 30), 2):
        stages.append([(run.contestant, run.minutes, run.seed, run.lr, run.seq_len) for run in stage])
        for run in stage:
            bits = 3 + rank.get(run.contestant, 0) / 10 + (run.lr == 1e-3)
            results.path(run).write_text(json.dumps(dict(valid_bits=bits)))
    first, *_ = rank
    best, ours = list(rank)[:3], [each.name for each in race.OURS]
    rates, short, middle, rest = stages
    assert set(rates) == {(name, 5, 0, lr, 1024) for name in rank for lr in (1e-3, 3e-3)}
    assert set(short) == {(name, 5, s, 3e-3 if name in rank else None, 1024) for name in (*rank, *ours) for s in (0, 1)}
    assert {name for name, *_ in middle} == {*best, *ours}
    assert {run[1] for run in middle} == {10}
    preset, flat = 'ours, cpu preset', 'ours, flat'
    soon = {(preset, 4, seed, None, 1024) for seed in (0, 1)}
    long = {(first, 30, 0, 3e-3, 1024), *((name, 30, 0, None, 1024) for name in (flat, preset))}
    longer = {(name, 10, 0, None, length) for name in ours for length in (4096, 16384)}
    longest = {(name, 30, 0, None, length) for name in (flat, preset) for length in (4096, 16384)}
    assert set(rest) == soon | long | longer | longest


def test_our_contestants_are_models_at_every_length(race: Any) -> None:
    for contestant in race.OURS:
        for length in race.LENGTHS:
            options = ['--preset', 'cpu', *race.LENGTHS[length], *contestant.options]
            settings = new_settings(parse_args(options, None))
            with torch.device('meta'):
                model = HierarchicalTransformer(**BYTES, **settings['model'], seq_len=settings['seq_len'])
            assert model.seq_len == length
            assert (len(model.levels) == 1) == ('flat' in contestant.name)


def test_a_race_finishes_and_continues_where_it_stopped(
    race: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny budget. This package stands in for the published one, which has the same constructor."""
    peer = race.Contestant('peer', 'torch', 'published', dict(dim=16, depth=1, heads=1, dim_head=8))
    ours = race.Contestant('ours', options=TINY)
    for name, value in dict(
        PEERS=[peer], OURS=[ours], PRESET=ours, FLAT=ours, CONTESTANTS=dict(peer=peer, ours=ours), RATES=(1e-3,),
        LENGTH=64, LENGTHS={64: ('--seq-len', '64')}, PEER_PATH=str(ROOT), python_of=lambda *_: sys.executable,
    ).items():  # fmt: skip
        monkeypatch.setattr(race, name, value)
    corpus, folder = tmp_path / 'text.txt', tmp_path / 'race'
    corpus.write_bytes(b'The quick brown fox jumps over the lazy dog. ' * 400)
    asked = ['--data', str(corpus), '--minutes', '0.005', '0.005', '0.005', '--seeds', '1', '--threads', '1',
             '--results', str(folder), '--environments', str(tmp_path / 'env'),
             '--score-bytes', '600', '--streaming-bytes', '300']  # fmt: skip

    race.main([*asked, '--only', 'peer'])
    assert [path.name for path in folder.iterdir()] == ['peer-64-0.005m-lr0.001-seed0.json']
    first = (folder / 'peer-64-0.005m-lr0.001-seed0.json').read_text()

    race.main(asked)
    found = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert set(found) == {
        'peer-64-0.005m-lr0.001-seed0.json', 'ours-64-0.005m-seed0.json', 'ours-64-0.004m-seed0.json'
    }  # fmt: skip
    # the finished run is not repeated
    assert (folder / 'peer-64-0.005m-lr0.001-seed0.json').read_text() == first
    assert len(found['ours-64-0.005m-seed0.json']['sample']['prompt']) == 256
    for run in found.values():
        assert 0 < run['bits'] < 9
        assert math.isfinite(run['streaming_bits'])
        assert run['steps'] > 0
        assert run['parameters'] > 0
        assert run['peak_bytes'] > 1 << 20
        assert '1 thread,' in run['machine']

    # a race with other settings does not continue
    with pytest.raises(SystemExit, match='give another --results'):
        race.main([*asked, '--score-bytes', '500'])


def test_a_missing_corpus_is_named(race: Any, tmp_path: Path) -> None:
    missing = tmp_path / 'missing'
    with pytest.raises(SystemExit, match=str(missing)):
        race.main(['--data', str(missing), '--results', str(tmp_path), '--environments', str(tmp_path)])


def test_no_run_starts_that_would_end_too_late(race: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    class Instant:
        def __init__(self, args: Any, results: Any) -> None:
            self.results = results

        def begin(self, run: Any) -> None:
            begun.append(run)
            self.results.path(run).write_text(json.dumps(dict(self.results.terms, valid_bits=1.0)))

    monkeypatch.setattr(race, 'Race', Instant)
    race.main(['--results', str(tmp_path), '--for', '13'])
    # runs of 10 minutes fit with their overhead, even after runs that do not fit
    assert {run.minutes for run in begun} == {4, 5, 10}
    assert {run.seq_len for run in begun} == {1024, 4096, 16384}
    begun.clear()
    race.main(['--results', str(tmp_path), '--for', '33'])
    assert {run.minutes for run in begun} == {30}


class Unigram(nn.Module):
    """Predicts from the last byte only, so that its score does not depend on the context."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


@pytest.mark.parametrize('fresh', [None, 8, 4])
@pytest.mark.parametrize('length', [64, 65, 96])
def test_each_byte_is_scored_once_in_any_windows(race: Any, length: int, fresh: int | None) -> None:
    contestants = importlib.import_module('benchmarks.quality.contestants')
    model, text = Unigram(), torch.randint(0, 256, (length + 1,), dtype=torch.uint8)
    step = fresh or 16
    scored = 16 + (length - 16) // step * step
    expected = F.cross_entropy(model(text[:scored].long()), text[1 : scored + 1].long()) / math.log(2)
    assert contestants.windowed_bits(model, text, 16, fresh=fresh) == pytest.approx(expected.item())


def test_a_contestant_that_looks_ahead_is_not_scored(race: Any) -> None:
    contestants = importlib.import_module('benchmarks.quality.contestants')

    class Ahead(Unigram):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.roll(-1, dims=1))

    contestants.check_causal(Unigram(), 16)
    with pytest.raises(ValueError, match='changes predictions before it'):
        contestants.check_causal(Ahead(), 16)
