"""Each rule that places tokens against a loop over the positions of each row."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.configs import SMALL, build
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Marks, Surprise
from simple_hierarchical_transformer.boundaries.surprise import RATE

BYTES: dict[str, Any] = dict(
    SMALL,
    num_tokens=256,
    seq_len=64,
    arrangement='hourglass',
    hierarchies=(1, 4),
    boundaries=(None, 'words'),
    ignore_index=-1,
)
TEXTS = [
    'The end.  A start; x = 3.14!',
    'überall naïve 東京は夜の七時。 Привет, мир\n',
    'ไม่มีช่องว่าง',
    '    ',
    'aaaaaaaa',
    ' .\n\t- ',
    '🙂🙂 ok 🙂',
]


def boundary_of(model: HierarchicalTransformer, ids: Tensor, level: int = 1) -> Tensor:
    with torch.no_grad():
        return model.inspect(ids).pieces[level].boundary


def is_spacelike(byte: int) -> bool:
    """Slagle 2024, arXiv 2404.14408, section 2: no letter, no digit and no continuation byte."""
    return (
        byte < ord('0') or ord('9') < byte < ord('A') or ord('Z') < byte < ord('a') or ord('z') < byte < 0x80
    ) or byte >= 0xC0


def ends_of_words(text: bytes) -> list[bool]:
    return [i == 0 or (is_spacelike(b) and not is_spacelike(text[i - 1])) for i, b in enumerate(text)]


@pytest.mark.parametrize('text', TEXTS)
def test_words_end_at_the_first_spacelike_byte(text: str) -> None:
    read = text.encode()
    found = boundary_of(build(BYTES), torch.tensor([list(read)]))
    assert found[0].tolist() == ends_of_words(read)


@given(rows=st.lists(st.binary(min_size=30, max_size=30), min_size=1, max_size=3))
def test_words_of_random_bytes(rows: list[bytes]) -> None:
    found = boundary_of(build(BYTES), torch.tensor([list(row) for row in rows]))
    assert found.tolist() == [ends_of_words(row) for row in rows]


@pytest.mark.parametrize('num_tokens', [257, 258])
def test_special_ids_count_as_spacelike(num_tokens: int) -> None:
    ids = torch.tensor([[num_tokens - 1, 97, 97, 256, 32, 97, 256, 256]])
    found = boundary_of(build(dict(BYTES, num_tokens=num_tokens)), ids)
    assert found[0].tolist() == [True, False, False, True, False, False, True, False]


@given(text=st.text('ab.!?\n ', min_size=1, max_size=40))
def test_sentences_end_at_the_first_of_their_marks(text: str) -> None:
    found = boundary_of(build(dict(BYTES, boundaries=(None, 'sentences'))), torch.tensor([list(text.encode())]))
    marks = '.!?\n'
    expected = [i == 0 or (c in marks and text[i - 1] not in marks) for i, c in enumerate(text)]
    assert found[0].tolist() == expected


@pytest.mark.parametrize(
    ('boundaries', 'strides'),
    [
        ((None, 'words', 'sentences'), (1, 1, 1)),
        ((None, 'every', 'words'), (1, 1, 1)),
        ((None, None, 'words'), (1, 2, 1)),
    ],
)
def test_rules_on_ids_see_all_ids_between_finer_tokens(
    boundaries: tuple[str | None, ...], strides: tuple[int, ...]
) -> None:
    """A piece ends at the first finer token from a marked id on, in one pass and in chunks."""
    config = dict(BYTES, hierarchies=(1, 2, 12), boundaries=boundaries, hierarchical_stride=strides, seq_len=128)
    texts = [
        'It ends (in 1984). No, 3.5 "does"\n\nnot? Yes! Yes! ...and so on.',
        'a.b c. d e f g. h i jklmnopq. rst. u vw',
    ]
    ids = torch.tensor([list(text.encode().ljust(64, b' ')[:64]) for text in texts])
    model = build(config)
    with torch.no_grad():
        pieces = model.inspect(ids).pieces
        state, found = None, []
        for chunk in ids.split([1, 3, 1, 20, 2, 1, 36], dim=1):
            read = model.inspect(chunk, state=state, return_state=True)
            state = read.state
            found.append(read.pieces[2].at_positions)
    assert torch.equal(torch.cat(found, dim=1), pieces[2].at_positions)
    for row, text in enumerate(ids.tolist()):
        finer = range(0, 64, 2) if boundaries[1] is None else pieces[1].at_positions[row].nonzero()[:, 0].tolist()
        if boundaries[2] == 'words':
            marked = ends_of_words(bytes(text))
        else:
            inside = [chr(c) in '.!?\n' for c in text]
            marked = [now and not before for now, before in zip(inside, [False, *inside], strict=False)]
        expected, last = [], -1
        for i in finer:
            if i == 0 or any(marked[last + 1 : i + 1]):
                expected.append(i)
            last = i
        assert pieces[2].at_positions[row].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize('rule', ['learned', 'surprise', 'rise'])
def test_an_intended_length_need_not_be_a_power_of_two(rule: str) -> None:
    model = build(dict(BYTES, hierarchies=(1, 6), boundaries=rule, prophet_loss_weight=0.1, recon_loss_weight=0.1))
    loss, parts = model(torch.randint(0, 256, (2, 64)), return_loss=True)
    loss.backward()
    assert {'pieces/6x', 'prophet/6x', 'recon/6x'} <= set(parts.named)


# the finest level has a token at each position whatever its compression
@pytest.mark.parametrize('spacings', [(1, 4), (2, 8), (1, 4, 8), (1, 2, 8)])
def test_every_has_a_boundary_at_a_fixed_number_of_finer_tokens(spacings: tuple[int, ...]) -> None:
    rules = (None, *['every'] * (len(spacings) - 1))
    config = dict(SMALL, arrangement='hourglass', hierarchies=spacings, boundaries=rules)
    with torch.no_grad():
        pieces = build(config).inspect(torch.randint(0, 11, (2, 29))).pieces
    for i, spacing in enumerate(spacings[1:], 1):
        positions = list(range(0, 29, spacing))
        assert pieces[i].positions.tolist() == [positions] * 2
        assert pieces[i].lengths.tolist() == [len(positions)] * 2


def test_the_router_is_that_of_h_net() -> None:
    model = build(dict(SMALL, arrangement='hourglass', hierarchies=(1, 4), boundaries=(None, 'learned')))
    ids = torch.randint(0, 11, (3, 40))
    pieces = model.inspect(ids).pieces[1]
    x, rule = pieces.tokens, model.boundaries['1']
    assert pieces.probability is not None
    for r in range(3):
        for t in range(40):
            p = torch.ones((), dtype=torch.float64)
            if t > 0:
                q, k = rule.to_q.weight @ x[r, t - 1], rule.to_k.weight @ x[r, t]
                p = (1 - (q @ k) / (q.norm() * k.norm())) / 2
            torch.testing.assert_close(pieces.probability[r, t], p, rtol=0, atol=1e-10)
            assert pieces.boundary[r, t] == (p > 0.5)


def test_the_router_starts_as_the_distance_of_neighbors() -> None:
    config = dict(SMALL, arrangement='hourglass', hierarchies=(1, 4), boundaries=(None, 'learned'))
    model = HierarchicalTransformer(**config)
    rule = model.boundaries['1']
    assert torch.equal(rule.to_q.weight, torch.eye(8))
    assert torch.equal(rule.to_k.weight, torch.eye(8))
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    x = F.pad(x, (0, 6))[None]
    marks = rule(x, torch.zeros(1, 5, dtype=torch.long), torch.arange(4)[None])
    # equal, opposite and orthogonal neighbors. A tie is no boundary
    torch.testing.assert_close(marks.probability[0], torch.tensor([1.0, 0.0, 1.0, 0.5]))
    assert marks.boundary[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize('rise', [False, True])
def test_surprise_compares_the_entropy_of_the_next_id(rise: bool) -> None:
    rule = 'rise' if rise else 'surprise'
    model = build(dict(SMALL, arrangement='hourglass', hierarchies=(1, 4), boundaries=(None, rule)))
    ids = torch.randint(0, 11, (2, 40))
    pieces, part = model.inspect(ids).pieces[1], model.boundaries['1']
    seen = set()
    for r in range(2):
        before = 0.0
        for t in range(40):
            x = pieces.tokens[r, t]
            normed = x / x.norm() * math.sqrt(8) * part.norm.gamma
            p = (part.to_logits.weight @ normed).softmax(0)
            entropy = -(p * p.log()).sum().item()
            expected = t == 0 or entropy - (before if rise else 0.0) > part.threshold.item()
            assert bool(pieces.boundary[r, t]) == expected
            seen.add(expected)
            before = entropy
    assert seen == {False, True}


@pytest.mark.parametrize('rise', [False, True])
def test_the_threshold_follows_the_intended_share(rise: bool) -> None:
    """A moving average of the quantile of each batch, which takes effect in the next one."""
    torch.manual_seed(0)
    rule = Surprise(8, 11, 4, rise).double()
    torch.nn.init.normal_(rule.to_logits.weight)
    index = torch.arange(50).expand(3, -1)
    expected = math.inf
    for step in range(4):
        x = torch.randn(3, 51, 8, dtype=torch.float64)
        entropy = rule.entropy(x)
        measure = (entropy[:, 1:] - entropy[:, :-1]) if rise else entropy[:, 1:]
        before = rule.threshold.item()
        assert before == pytest.approx(expected, abs=1e-12)
        marks = rule(x, torch.zeros(3, 51, dtype=torch.long), index)
        assert torch.equal(marks, measure > before)
        # without the first token of each row, which is always a boundary
        found = measure[:, 1:].quantile(0.75).item()
        expected = found if step == 0 else expected + RATE * (found - expected)
    # neither scoring nor evaluation mode moves it
    for train, grad in ((False, True), (True, False)):
        with torch.set_grad_enabled(grad):
            rule.train(train)(x, torch.zeros(3, 51, dtype=torch.long), index)
        assert rule.threshold.item() == pytest.approx(expected, abs=1e-12)


def test_calibration_skips_padding_and_works_without_tokens() -> None:
    rule = Surprise(8, 11, 2).double()
    x, ids = torch.randn(2, 6, 8, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.long)
    rule(x, ids, torch.tensor([[0, -1, -1, -1, -1], [0, -1, -1, -1, -1]]))
    assert rule.threshold.isinf()
    rule(x, ids, torch.tensor([[0, 1, 2, -1, -1], [0, -1, -1, -1, -1]]))
    expected = rule.entropy(x[:, 1:])[0, 1:3].quantile(0.5)
    torch.testing.assert_close(rule.threshold, expected)


@pytest.mark.parametrize('rule', ['surprise', 'rise'])
def test_training_makes_pieces_of_the_intended_length(rule: str) -> None:
    """The threshold keeps up with a head whose entropy falls fast."""
    config = dict(BYTES, boundaries=(None, rule), dim=16)
    model, draw = HierarchicalTransformer(**config), random.Random(0)
    words = ['the', 'old', 'king', 'sees', 'young', 'foxes']
    text = torch.tensor(list(' '.join(draw.choice(words) for _ in range(2000)).encode()))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    share = []
    for _ in range(50):
        ids = torch.stack([text[at : at + 64] for at in torch.randint(0, len(text) - 64, (8,))])
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        share.append(parts.named['pieces/4x'].item())
    # before the first step only the first id is a boundary, and what the longest piece demands
    assert share[0] == pytest.approx(2 / 63)
    assert min(share[1:]) > 1 / 20
    assert sum(share[10:]) / 40 == pytest.approx(1 / 4, abs=0.1)


class Wrong(torch.nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Any:
        return self.change(index)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda index: index[:, 1:] == 0, 'boundaries'),
        (lambda index: index, 'boundaries must return a bool tensor, got torch.int64'),
        (lambda index: None, 'boundaries'),
        (lambda index: 'here', 'boundaries'),
        (lambda index: (index == 0)[..., None], 'boundaries'),
        (lambda index: Marks(index == 0, index[:, 1:].double()), 'boundaries'),
        (lambda index: Marks(index == 0, index), 'boundaries'),
        (lambda index: (index == 0, index.double()), 'boundaries'),
    ],
)
def test_a_rule_with_wrong_outputs_is_named(change: Any, message: str) -> None:
    rules = (None, Wrong(change))
    model = build(dict(SMALL, arrangement='hourglass', hierarchies=(1, 4), boundaries=rules, upsample='smooth'))
    with pytest.raises(ValueError, match=message):
        model(torch.randint(0, 11, (2, 9)))


@pytest.mark.parametrize('rule', ['words', 'learned', 'surprise', 'rise'])
@pytest.mark.parametrize('longest', [None, 5])
def test_no_piece_is_longer_than_max_piece(rule: str, longest: int | None) -> None:
    """Texts without boundaries are cut after so many tokens, counted from the last boundary of the rule."""
    config = dict(BYTES, boundaries=(None, rule), max_piece=longest, seq_len=512)
    model, limit = build(config), longest or 32
    letters, draw = torch.randint(97, 123, (512,)), torch.randint(0, 256, (512,))
    ids = torch.stack((torch.full((512,), 97), torch.full((512,), 32), letters, draw))
    with torch.no_grad():
        whole = model.inspect(ids)
        pieces = whole.pieces[1]
        free = build({**config, 'max_piece': 512}).inspect(ids).pieces[1]
        state, found = None, []
        for chunk in ids.split([1, 40, 3, 200, 1, 267], dim=1):
            read = model.inspect(chunk, state=state, return_state=True)
            state = read.state
            found.append(read.pieces[1].boundary)
    assert torch.equal(torch.cat(found, dim=1), pieces.boundary)
    for row, own in zip(pieces.boundary, free.boundary, strict=True):
        expected, last = [], 0
        for i, ends in enumerate(own.tolist()):
            last = i if ends else last
            expected.append(ends or (i - last) % limit == 0)
        assert row.tolist() == expected
        assert row.nonzero()[:, 0].diff(append=torch.tensor([512])).max() <= limit
    if rule == 'words':
        # equal bytes, letters or spaces, have no boundary of their own
        assert pieces.lengths[:2].tolist() == [-(-512 // limit)] * 2


@pytest.mark.parametrize('rule', ['words', 'learned', 'surprise'])
def test_ten_thousand_equal_bytes(rule: str) -> None:
    model = build(dict(BYTES, boundaries=(None, rule), seq_len=512, window_sizes=8))
    found = model.pieces(b'a' * 10_000)[4]
    assert max(map(len, found.pieces)) <= 32
    assert torch.isfinite(torch.tensor(model.score(torch.full((1, 10_000), 97))))
