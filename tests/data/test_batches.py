"""Batches stay inside their split and text, cover all of it, and are the same for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import (
    END,
    IGNORED,
    PAD,
    Batches,
    evaluation_batches,
    seed_of,
    split_bytes,
    streaming_rows,
)
from simple_hierarchical_transformer.data.corpus import Corpus
from simple_hierarchical_transformer.training.settings import TEXTS

Make = Callable[..., Corpus]


@pytest.fixture(scope='module')
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Builds corpora whose byte at `i` is `(first + i) % 256`, in texts of the given lengths."""
    folder = tmp_path_factory.mktemp('corpora')
    made = iter(range(10**9))

    def build(*lengths: int, first: int = 0) -> Corpus:
        number = next(made)
        path, ends = folder / f'{number}.bytes', folder / f'{number}.ends'
        size = sum(lengths)
        path.write_bytes(bytes((first + i) % 256 for i in range(size)))
        ends.write_bytes(torch.tensor(lengths).cumsum(0).numpy().tobytes())
        return Corpus('corpus', path, ends)

    return build


def all_rows(batches: Batches, steps: int) -> Tensor:
    return torch.cat([batches[step] for step in range(steps)])


def test_splits_are_90_5_5() -> None:
    assert split_bytes(100_000_000, seq_len=1024) == {
        'train': range(90_000_000),
        'valid': range(90_000_000, 95_000_000),
        'test': range(95_000_000, 100_000_000),
    }


@given(
    sizes=st.lists(st.integers(40, 400), min_size=1, max_size=3),
    seq_len=st.integers(1, 12),
    segments=st.integers(1, 3),
    rows=st.integers(1, 5),
    weighted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_pass_reads_each_corpus_once_before_any_of_it_again(
    make: Make, sizes: list[int], seq_len: int, segments: int, rows: int, weighted: bool, seed: int
) -> None:
    corpora = [make(size) for size in sizes]
    weights = [1.0, 2.5, 0.7][: len(sizes)] if weighted else None
    spans = [range(3, size) for size in sizes]
    settings: dict[str, Any] = dict(rows=rows, seq_len=seq_len, segments=segments, weights=weights, seed=seed)
    batches = Batches(corpora, spans, **settings)
    length = segments * seq_len
    times = [torch.zeros(size, dtype=torch.long) for size in sizes]
    rows_of = [0] * len(sizes)
    for stretch in range(60):
        which, passed, number = batches.schedule(stretch * segments)
        for i, turn, k in zip(which.tolist(), passed.tolist(), number.tolist(), strict=True):
            [start], [stop] = batches.locate(i, turn, torch.tensor([k]))
            assert stop - start == length + 1
            assert (turn, k) == divmod(rows_of[i], batches.counts[i])
            rows_of[i] += 1
            times[i][start : stop - 1] += 1
        parts = [Batches(corpora, spans, **settings, part=(i, rows)) for i in range(rows)]
        assert [part.readings(stretch * segments).item() for part in parts] == passed.tolist()
    shares = torch.tensor(weights or [len(span) for span in spans], dtype=torch.float64)
    for i, share in enumerate((shares / shares.sum()).tolist()):
        assert abs(rows_of[i] - 60 * rows * share) < len(sizes)
        whole, begun = divmod(rows_of[i], batches.counts[i])
        # A pass reads every byte once, except at the ends of the span, where it leaves bytes out or reads them twice.
        inner = times[i][3 + length : max(sizes[i] - 2 * length, 0)]
        assert (inner >= whole).all()
        assert (inner <= whole + (begun > 0)).all()


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    split_bytes(2040, seq_len=101)
    with pytest.raises(ValueError, match='data has 2,040 bytes, of which the shortest split has 102'):
        split_bytes(2040, seq_len=102)


@given(size=st.integers(60, 250), seq_len=st.integers(1, 12), segments=st.integers(1, 4), seed=st.integers(0, 9))
def test_sequences_are_runs_of_the_split(make: Make, size: int, seq_len: int, segments: int, seed: int) -> None:
    span = range(size // 4, size // 2 + 8)
    batches = Batches([make(size)], [span], rows=20, seq_len=seq_len, segments=segments, seed=seed)
    last = torch.empty(0)
    for step in range(4 * batches.segments):
        ids = batches[step]
        assert ids.shape == (20, seq_len + 1)
        assert ids.dtype == torch.int64
        assert (ids.diff() == 1).all()
        assert span.start <= ids.min()
        assert ids.max() < span.stop
        assert batches.begins(step) == (step % batches.segments == 0)
        assert batches.begins(step) or torch.equal(ids[:, 0], last)
        last = ids[:, -1]


def test_sequences_reach_both_ends_of_the_split(make: Make) -> None:
    ids = Batches([make(30)], [range(10, 20)], rows=500, seq_len=4)[0]
    assert ids.min() == 10
    assert ids.max() == 19


def test_steps_and_seeds_differ_and_stay_the_same(make: Make) -> None:
    def draw(seed: int) -> Tensor:
        return all_rows(Batches([make(256)], [range(256)], rows=4, seq_len=8, seed=seed), 50)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len(draw(1)[:, 0].unique()) > 100
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900


@given(
    parts=st.sampled_from([1, 2, 3, 6]), segments=st.integers(1, 3), documents=st.booleans(), step=st.integers(0, 99)
)
def test_processes_share_what_one_would_see(make: Make, parts: int, segments: int, documents: bool, step: int) -> None:
    corpora = [make(90, 3, 107), make(150, first=50)]
    spans = [range(200), range(10, 150)]

    def read(part: tuple[int, int]) -> Tensor:
        settings: dict[str, Any] = dict(rows=6, seq_len=9, segments=segments, documents=documents, seed=3, part=part)
        return Batches(corpora, spans, **settings)[step]

    assert torch.equal(torch.cat([read((i, parts)) for i in range(parts)]), read((0, 1)))


@pytest.mark.parametrize(('workers', 'context'), [(0, None), (1, 'fork'), (2, 'fork'), (2, 'spawn')])
def test_workers_change_nothing(make: Make, workers: int, context: str | None) -> None:
    batches = Batches([make(250)], [range(250)], rows=2, seq_len=9)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(5, 25), num_workers=workers, multiprocessing_context=context
    )
    assert torch.equal(torch.cat(list(loader)), torch.cat([batches[step] for step in range(5, 25)]))


def test_corpora_come_by_their_weights(make: Make) -> None:
    corpora, spans = [make(120), make(60, first=150)], [range(120), range(60)]

    def share(weights: list[float] | None) -> float:
        ids = Batches(corpora, spans, rows=5000, seq_len=4, weights=weights)[0]
        return (ids[:, 0] < 150).double().mean().item()

    assert share(None) == pytest.approx(2 / 3, abs=0.03)
    assert share([1, 9]) == pytest.approx(0.1, abs=0.02)
    # Each weight is finite, and their sum is not.
    assert share([1e308, 1e308]) == pytest.approx(0.5, abs=0.02)
    assert share([2e-320, 2e-320]) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match=r'weights must each be at least 1e-06 of their sum, got 1e\+308, 1'):
        share([1e308, 1])


@given(weights=st.lists(st.floats(0.1, 1e5), min_size=1, max_size=4), scale=st.integers(-900, 900))
def test_weights_are_scaled_without_rounding(make: Make, weights: list[float], scale: int) -> None:
    def turns(each: list[float]) -> Tensor:
        return Batches([make(50)] * len(each), [range(50)] * len(each), rows=50, seq_len=4, weights=each).schedule(7)[0]

    plain = Batches([make(50)] * len(weights), [range(50)] * len(weights), rows=50, seq_len=4, weights=weights)
    scaled = plain.weights.clone()
    plain.weights = torch.tensor(weights, dtype=torch.float64)
    assert torch.equal(turns(weights), plain.schedule(7)[0])
    assert torch.equal(turns([math.ldexp(weight, scale) for weight in weights]), plain.schedule(7)[0])
    assert 0.5 <= scaled.max() < 1


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    seq_len=st.integers(1, 10),
    segments=st.integers(1, 3),
    data=st.data(),
)
def test_no_sequence_crosses_from_one_text_into_the_next(
    make: Make, lengths: list[int], seq_len: int, segments: int, data: st.DataObject
) -> None:
    size = sum(lengths)
    corpus = make(*lengths)
    if size < 30:
        return
    span = range(data.draw(st.integers(0, 5)), size - data.draw(st.integers(0, 5)))
    batches = Batches([corpus], [span], rows=40, seq_len=seq_len, segments=segments, documents=True)
    edges = [0, *corpus.ends.tolist()]
    text_of = {i % 256: text for text, (a, b) in enumerate(pairwise(edges)) for i in range(a, b)}
    if size > 256:
        return
    seen = set()
    for first in range(0, 3 * batches.segments, batches.segments):
        # Consecutive sequences of a stretch overlap by one id. Join them.
        stretch = torch.cat([batches[first + i][:, i > 0 :] for i in range(batches.segments)], dim=1)
        for row in stretch.tolist():
            ids = [i for i in row if i < END]
            assert ids
            # A text that the span cuts off has no END.
            end = [END] if len(ids) < len(row) and ids[-1] + 1 in edges else []
            assert row == ids + end + [PAD] * (len(row) - len(ids) - len(end))
            assert ids == list(range(ids[0], ids[0] + len(ids)))
            assert len({text_of[i] for i in ids}) == 1
            assert span.start <= ids[0] <= ids[-1] < span.stop
            # The text ends early, or it fills the stretch.
            assert len(ids) == len(row) or ids[-1] + 1 in (*edges, span.stop)
            seen.add(text_of[ids[0]])
    longest = max(range(len(lengths)), key=lambda i: min(edges[i + 1], span.stop) - max(edges[i], span.start))
    assert longest in seen


def test_the_end_of_each_text_is_learnt(make: Make) -> None:
    """For texts shorter than a sequence, equally long and longer, but not for a text that the span cuts off."""
    corpus = make(3, 8, 9, 60, 30)
    for span, ends in ((range(110), {3, 11, 20, 80, 110}), (range(100), {3, 11, 20, 80})):
        ids = all_rows(Batches([corpus], [span], rows=200, seq_len=8, documents=True), 5)
        row, at = (ids == END).nonzero().unbind(1)
        assert {*(ids[row, at - 1] + 1).tolist()} == ends
        # Each text has one END, which is predicted, and only PAD after it.
        assert len(row) == len(row.unique())
        assert at.min() > 0
        assert all((ids[i, j + 1 :] == PAD).all() for i, j in zip(row, at, strict=True))


def test_a_model_of_texts_stops_by_itself(tmp_path: Path) -> None:
    (tmp_path / 'bytes').write_bytes(b'01234' * 20)
    (tmp_path / 'ends').write_bytes(torch.arange(5, 101, 5).numpy().tobytes())
    corpus = Corpus('corpus', tmp_path / 'bytes', tmp_path / 'ends')
    batches = Batches([corpus], [range(100)], rows=8, seq_len=8, documents=True)
    model = HierarchicalTransformer(
        **TEXTS, dim=16, depth=1, seq_len=8, dim_head=8, heads=1, hierarchies=(1, 2), window_sizes=2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        model(batches[step], return_loss=True)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.generate('01', 50, temperature=0) == '234'
    assert model.generate(torch.tensor([[*b'01']]), 3 + 1, temperature=0).tolist() == [[*b'234', END]]


def test_what_cannot_be_drawn_is_refused(make: Make) -> None:
    corpus = make(100)
    for settings, message in (
        (dict(seq_len=100), 'data has 100 bytes to draw from, too few for sequences of 100'),
        (dict(part=(0, 3)), 'rows must divide by the 3 processes, got 4'),
        (dict(weights=[1, 2]), 'weights must be one for each of 1 corpora'),
        *((dict(weights=[bad]), 'weights must be finite and above 0') for bad in (0.0, -1.0, math.inf, math.nan)),
    ):
        with pytest.raises(ValueError, match=message):
            Batches([corpus], [range(100)], **{'rows': 4, 'seq_len': 8, **settings})


# Evaluation.


def labels_of(corpus: Corpus, span: range, **settings: Any) -> list[int]:
    labels = []
    for ids, targets in evaluation_batches(corpus, span, **settings):
        assert ids.shape == targets.shape
        assert ids.shape[1] <= settings['seq_len']
        counted = targets != IGNORED
        assert torch.equal((ids + 1)[counted], targets[counted])
        # Ignored labels come last.
        assert (counted.long().diff(dim=1) <= 0).all()
        labels += targets[counted].tolist()
    return labels


@given(
    size=st.integers(2, 250),
    start=st.integers(0, 200),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    parts=st.integers(1, 4),
)
def test_evaluation_counts_every_byte_once(
    make: Make, size: int, start: int, seq_len: int, batch_size: int, parts: int
) -> None:
    span = range(min(start, size - 2), size)
    shares = [dict(seq_len=seq_len, batch_size=batch_size, part=(i, parts)) for i in range(parts)]
    labels = [label for settings in shares for label in labels_of(make(size), span, **settings)]
    assert sorted(labels) == list(range(max(span.start, 1), span.stop))
    # All processes need the same number of batches, or they would wait for each other.
    assert len({len(list(evaluation_batches(make(size), span, **settings))) for settings in shares}) == 1


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), seq_len=st.integers(1, 12), cut=st.integers(0, 9))
def test_evaluation_of_texts_leaves_out_the_first_byte_of_each(
    make: Make, lengths: list[int], seq_len: int, cut: int
) -> None:
    corpus = make(*lengths)
    size = sum(lengths)
    if size < 2 * cut + 2:
        return
    span = range(cut, size - cut)
    firsts = {span.start, 0, *corpus.ends.tolist()}
    expected = [i for i in span if i not in firsts]
    if not expected:
        with pytest.raises(ValueError, match=r'none of the bytes from \d+ to \d+ can be predicted'):
            labels_of(corpus, span, seq_len=seq_len, batch_size=3, documents=True)
        return
    got = labels_of(corpus, span, seq_len=seq_len, batch_size=3, documents=True)
    assert sorted(got) == expected


def test_what_has_nothing_to_predict_has_no_score(make: Make) -> None:
    corpus = make(*[1] * 40)
    with pytest.raises(ValueError, match='none of the bytes from 10 to 30 can be predicted'):
        labels_of(corpus, range(10, 30), seq_len=4, batch_size=3, documents=True)
    assert len(labels_of(corpus, range(10, 30), seq_len=4, batch_size=3)) == 20


def test_evaluation_of_a_part_is_fixed_and_spread(make: Make) -> None:
    def labels(max_bytes: int) -> list[int]:
        return labels_of(make(250), range(50, 250), seq_len=5, batch_size=3, max_bytes=max_bytes)

    part = labels(50)
    assert len(part) == len(set(part)) == 50
    assert part == labels(50)
    assert min(part) < 60
    assert max(part) > 230
    assert len(labels(5000)) == 200


@given(size=st.integers(2, 250), start=st.integers(0, 100), rows=st.integers(1, 9), count=st.integers(2, 300))
def test_streams_lie_apart_in_the_split(make: Make, size: int, start: int, rows: int, count: int) -> None:
    span = range(min(start, size - 2), size)
    texts = streaming_rows(make(size), span, rows=rows, size=max(count, 2 * rows))
    assert 1 <= len(texts) <= rows
    assert texts.shape[1] >= 2
    flat = texts.flatten().tolist()
    assert len(set(flat)) == len(flat)
    assert all(i in span for i in flat)
    assert (texts.diff(dim=1) == 1).all()


def test_a_corpus_is_not_read_into_memory(tmp_path: Path) -> None:
    """Reads batches of a sparse file of 64 GiB."""
    size = 1 << 36
    with open(tmp_path / 'huge', 'wb') as file:
        file.truncate(size)
        file.seek(size - 5)
        file.write(b'bytes')
    corpus = Corpus('huge', tmp_path / 'huge')
    span = split_bytes(size, seq_len=1024)['train']
    ids = Batches([corpus], [span], rows=4, seq_len=1024)[0]
    assert ids.shape == (4, 1025)
    last = corpus.read(torch.tensor([size - 5]), torch.tensor([size]), 6, pad=PAD)
    assert bytes(last[0, :5].tolist()) == b'bytes'
    assert corpus.fingerprint().startswith(f'{size}:')
