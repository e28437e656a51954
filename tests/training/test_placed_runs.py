"""Runs of train.py with placed levels: their plan, their records, and their report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from support.placed import NESTED, PLACED, TEXT, placed
from support.resumed import assert_same, edit, outcome

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.resampling import DOWNSAMPLERS, UPSAMPLERS
from simple_hierarchical_transformer.segmentation import LevelPieces, Segmentation
from simple_hierarchical_transformer.training import checkpoints, cost, piece_report, run_tensors
from simple_hierarchical_transformer.training.optim import build_optimizer
from simple_hierarchical_transformer.training.plan import count_pieces, densest_spacing

RUN: tuple[object, ...] = (
    '--preset', 'cpu', '--seq-len', 64, '--batch-size', 2, '--valid-bytes', 1024, '--steps', 9, '--every', 6,
    '--checkpoint-every', 6, '--log-every', 3, '--model', 'dim=16', 'depth=2', 'heads=1', 'ngram_rows=64',
    'window_sizes=8', 'ff_mult=2', 'hierarchies=(1,8,32)', 'hierarchical_stride=1',
)  # fmt: skip


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / 'metrics.csv').open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('kind', ['one pass', 'segments'])
def test_a_run_records_pieces_resumes_and_reports(
    kind: str, corpus: Path, tmp_path: Path, train_here: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / 'run', ('--segment-length', 16) if kind == 'segments' else ()
    train_here('--data', corpus, '--out', out, *more, *RUN, "boundaries=(None,'surprise','learned')")
    rows = rows_of(out)
    assert [row['step'] for row in rows] == ['0', '3', '6', '9']
    for name in ('bytes_per_piece/8x', 'bytes_per_piece/32x', 'ratio/32x', 'surprise/8x'):
        # a segment may have no piece
        assert rows[0][name] == ''
        assert all(float(row[name]) >= 0 for row in rows[1:] if row[name]), name
    assert any(row['bytes_per_piece/8x'] for row in rows[1:])
    assert re.search(r'pieces of [\d.]+', capfd.readouterr().err)

    report = (out / 'report.md').read_text(encoding='utf-8')
    assert re.search(r'\| operations per byte \| [\d,]+ \|', report)
    assert re.search(r'\| 8x \| surprise \| [\d,]+ \|', report)
    assert re.search(r'\| 32x \| learned \| [\d,]+ \|', report)
    assert '![a text with its pieces, and the lengths of pieces](pieces.png)' in report
    assert matplotlib.image.imread(out / 'pieces.png').std() > 0
    assert 'Mean bytes in a piece of training text at the end' in (out / 'final' / 'README.md').read_text()
    assert '| 32x | learned | 16 |' in (out / 'final' / 'README.md').read_text()

    # the same numbers from a checkpoint, also from one of a version that did not record pieces
    whole = outcome(out, 9)
    assert whole['record']['sums'] == {}
    progress = checkpoints.read_record(out / 'checkpoint-6')['progress']
    del progress['sums']
    edit(out / 'checkpoint-6', progress=progress)
    train_here('--resume', out / 'checkpoint-6', '--out', tmp_path / 'again')
    assert_same(outcome(tmp_path / 'again', 9), whole)

    train_here('--eval', out / 'final', '--data', corpus)
    assert 'in one stream' in capfd.readouterr().out


def test_a_plan_counts_pieces_where_a_rule_reads_only_ids(
    corpus: Path, train_here: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    train_here('--dry-run', '--data', corpus, *RUN, "boundaries=(None,'words','learned')")
    said = capfd.readouterr().out
    text = corpus.read_text()
    # each word of this text ends with one byte that is no letter. Each sequence begins with one more boundary
    mean = len(text) / len(text.split())
    counted = re.search(r'bytes in a piece of level 8x: ([\d.]+), counted in a sample of the data', said)
    assert counted
    assert float(counted[1]) == pytest.approx(mean, rel=0.1)
    assert 'bytes in a piece of level 32x: 32.00, as intended, since its rule must first learn' in said
    assert 'warning' not in said


@pytest.mark.parametrize('boundaries', NESTED, ids=str)
def test_counted_pieces_are_those_of_the_model(boundaries: tuple[str | None, ...]) -> None:
    model = placed(boundaries)
    ids = torch.tensor([list(TEXT.encode()[:32]), list(b'ab ' * 10 + b'..')])
    with torch.no_grad():
        read = model.inspect(ids)
    with torch.device('meta'):
        planned = HierarchicalTransformer(**PLACED, boundaries=boundaries)
    counts = count_pieces(planned, ids)
    assert list(counts) == {'words': [1], 'learned': [], 'surprise': []}[str(boundaries[1])] + [2] * (
        boundaries[2] == 'sentences'
    )
    for i, count in counts.items():
        assert torch.equal(count, read.pieces[i].lengths)


@pytest.mark.parametrize('downsample', DOWNSAMPLERS)
@pytest.mark.parametrize('upsample', UPSAMPLERS)
def test_states_of_segments_are_restored(downsample: str, upsample: str) -> None:
    model = placed((None, 'learned', 'learned'), downsample=downsample, upsample=upsample)
    ids = torch.randint(0, 256, (4, 24))
    with torch.no_grad():
        states = [model(part, return_state=True)[1] for part in ids.split(2)]
        tensors = run_tensors.gather_segments(states, lambda tensor: tensor)
        restored = run_tensors.restore_segments(model, tensors, 24, count=2, part=(0, 1))
        for old, new in zip(states, restored, strict=True):
            logits = [model(ids[:2], state=state, return_state=True)[0] for state in (old, new)]
            assert torch.equal(*logits)


def test_costs_use_the_measured_length_of_pieces() -> None:
    model = placed((None, 'words', 'sentences'))
    intended = cost.step_flops(model, 320)
    # every level costs what it does at twice the distance
    model.measured_spacing = {1: 16.0, 2: 64.0}
    sparse = cost.step_flops(model, 320)
    twice = placed((None, 'words', 'sentences'), hierarchies=(1, 16, 64))
    assert sparse == cost.step_flops(twice, 320) < intended


@pytest.mark.parametrize('rule', ['words', 'learned', 'surprise', 'rise', 'every'])
def test_memory_is_planned_for_as_many_pieces_as_a_row_may_have(rule: str) -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(**PLACED, boundaries=(None, rule, 'every'))
    ids = torch.tensor([list(b'a b c d e f g h i j k l m n o p '), list(b'a' * 32)])

    def planned() -> int:
        optimizer = build_optimizer(model, 'muon', lr=1e-3, weight_decay=0.1, device=torch.device('cpu'))
        return sum(cost.step_memory(model, optimizer, rows=2, length=32).values())

    sparse = planned()
    counted = {i: 32 / int(each.max()) for i, each in count_pieces(model, ids).items()}
    model.measured_spacing = densest_spacing(model, counted)
    expected = dict(words=32 / 17, learned=2.0, surprise=4.0, rise=4.0, every=8.0)[rule]
    assert model.measured_spacing[1] == expected
    assert (planned() > sparse) == (rule != 'every')


def test_the_share_of_word_ends_is_that_of_the_word_rule() -> None:
    ids = torch.tensor(list(TEXT.encode()))
    ends = piece_report.word_boundaries(ids)
    found = placed((None, 'words', 'sentences')).pieces(TEXT)
    assert ends.offsets == found[8].offsets
    assert found[8].agreement(ends) == (1.0, 1.0)
    section = piece_report.section(found, None)
    assert '| 100% | 100% |' in section
    spaces = sum(TEXT.encode()[i : i + 1].isspace() for i in found[8].offsets[1:])
    assert piece_report.at_white_space(found[8]) == spaces / (len(found[8].offsets) - 1)
    assert '![' not in section


def test_the_first_bytes_of_a_text_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    text = TEXT * 20
    found = placed((None, 'words', 'learned')).pieces(text)
    begin = piece_report.first(found, 50)
    assert [level.offsets for level in begin.levels] == [
        [offset for offset in level.offsets if offset < 50] for level in found.levels
    ]
    assert f'In the first {len(text.encode()):,} bytes' in piece_report.section(found, 'pieces.png')
    piece_report.draw_pieces(found, tmp_path / 'pieces.png')
    assert matplotlib.image.imread(tmp_path / 'pieces.png').std() > 0


def test_any_bytes_can_be_drawn(tmp_path: Path) -> None:
    raw = b'\xff\x00$a_b$\n \xe6\x97\xa5\xe6\x97'
    assert piece_report.character_at(torch.tensor(list(raw))) == [
        '\ufffd', '\ufffd', *'$a_b$', '\u21b5', '\u00b7', '\u65e5', '', '', '\ufffd', '\ufffd',
    ]  # fmt: skip
    # one piece has no length, and a model that diverged has no probabilities
    nothing: dict[str, Any] = dict(probability=torch.full((14,), torch.nan), entropy=None)
    boundary = torch.arange(14) == 0
    ids = torch.tensor(list(raw))
    found = Segmentation(ids, [LevelPieces(8, 'learned', ids, boundary, **nothing)])
    piece_report.draw_pieces(found, tmp_path / 'pieces.png')
    assert '| 8x | learned | 1 | 14.00 | 8 | 14 | 14 |  |  | 0% |' in piece_report.section(found, None)


def test_edited_sums_are_refused(corpus: Path, tmp_path: Path, train_here: Any, refuse: Callable[..., str]) -> None:
    train_here('--data', corpus, '--out', tmp_path / 'run', *RUN, "boundaries=(None,'words','every')")
    folder = tmp_path / 'run' / 'checkpoint-6'
    progress = json.loads((folder / 'training.json').read_text())['progress']
    edit(folder, progress={**progress, 'sums': {'pieces/8x': 'many'}})
    assert 'progress.sums must be numbers by name' in refuse('--resume', folder, '--out', tmp_path / 'other')
