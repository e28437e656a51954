"""Where a model cuts a text, and the text with its pieces visible."""

from __future__ import annotations

import math

import pytest
import torch
from support.placed import NESTED, TEXT, placed

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Surprise
from simple_hierarchical_transformer.segmentation import LevelPieces, Marker


@pytest.mark.parametrize('boundaries', NESTED, ids=str)
def test_pieces_join_to_the_text_and_nest(boundaries: tuple[str | None, ...]) -> None:
    found = placed(boundaries).pieces(TEXT)
    fine, coarse = found.levels
    for level, name in zip(found.levels, boundaries[1:], strict=True):
        assert level.rule == name
        assert b''.join(level.pieces) == TEXT.encode()
        assert level.offsets[0] == 0
        assert all(len(piece) for piece in level.pieces)
        assert len(level.lengths) == len(level.offsets) - 1
        assert found[level.compression] is level
    assert set(coarse.offsets) <= set(fine.offsets)
    assert found.depths == [(i in fine.offsets) + (i in coarse.offsets) for i in range(len(TEXT.encode()))]
    with pytest.raises(KeyError):
        found[1]


@pytest.mark.parametrize('boundaries', NESTED, ids=str)
@pytest.mark.parametrize('chunk_size', [1, 7])
def test_chunks_of_any_length_find_the_pieces_of_one_pass(boundaries: tuple[str | None, ...], chunk_size: int) -> None:
    model, text = placed(boundaries, seq_len=128), TEXT.encode()
    whole, parts = model.pieces(text), model.pieces(text, chunk_size=chunk_size)
    with torch.no_grad():
        read = model.inspect(torch.tensor([list(text)]))
    for place, (level, other) in enumerate(zip(whole.levels, parts.levels, strict=True)):
        # one pass without a state
        assert torch.equal(level.boundary, read.pieces[place + 1].at_positions[0])
        assert torch.equal(level.boundary, other.boundary)
        for ours, theirs in ((level.probability, other.probability), (level.entropy, other.entropy)):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, equal_nan=True)


def test_what_learned_rules_see_is_that_of_each_byte() -> None:
    model = placed((None, 'learned', 'surprise'))
    found = model.pieces(TEXT)
    fine, coarse = found.levels
    assert fine.probability is not None
    assert torch.equal(fine.probability > 0.5, fine.boundary)
    assert coarse.entropy is not None
    # only where the finer level has a token
    assert torch.equal(~coarse.entropy.isnan(), fine.boundary)
    rule = model.boundaries['2']
    assert isinstance(rule, Surprise)
    over = coarse.entropy * math.log(2) > rule.threshold
    # the first id always has a boundary
    assert torch.equal(over[1:], coarse.boundary[1:])


def test_words_are_marked_after_whole_characters() -> None:
    text = 'The cat. \u00dcber \u65e5\u672c\u8a9e is fun.\nA \U0001f600 | too\n'
    shown = str(placed((None, 'words', 'sentences')).pieces(text))
    # the byte that begins a character ends a piece, if it follows a character
    assert shown == 'T||he |cat.|| \u00dcber |\u65e5\u672c|\u8a9e| |is |fun.||\nA |\U0001f600 || too||\n'


def test_bytes_that_are_no_text_are_marked_too() -> None:
    assert Marker().show(b'a\xffb', [0, 1, 0]) == 'a\\xff|b'
    marker = Marker()
    # a character that never ends, then another one
    assert marker.show(b'\xe6\x97', [1, 0]) == ''
    assert marker.show(b'a\xc3', [0, 2]) == '\\xe6\\x97|a'
    assert marker.finish() == '\\xc3||'
    coloured = Marker(colours=True).show(b'a b', [0, 1, 2])
    assert coloured == 'a \033[33m|\033[0mb\033[35m||\033[0m'


def test_agreement_is_precision_and_recall() -> None:
    def pieces(*offsets: int) -> LevelPieces:
        boundary = torch.zeros(9, dtype=torch.bool)
        boundary[[0, *offsets]] = True
        return LevelPieces(8, 'words', torch.zeros(9, dtype=torch.long), boundary)

    assert pieces(2, 4, 6, 8).agreement(pieces(2, 4, 5)) == (0.5, pytest.approx(2 / 3))
    assert math.isnan(pieces().agreement(pieces(2))[0])
    with pytest.raises(ValueError, match='a text of 9 ids, got 0'):
        pieces().agreement(LevelPieces(8, 'words', torch.zeros(0), torch.zeros(0)))


def test_ids_of_other_vocabularies_have_pieces() -> None:
    ids = torch.randint(0, 4, (50,))
    level = placed((None, 'learned', 'every'), num_tokens=4).pieces(ids)[8]
    assert [i for span in level.spans for i in ids[span.start : span.stop].tolist()] == ids.tolist()


def test_what_has_no_pieces_is_refused() -> None:
    model = placed((None, 'words', 'sentences'))
    with pytest.raises(ValueError, match='this model has none'):
        HierarchicalTransformer(num_tokens=256, dim=8, depth=1, heads=1).pieces('text')
    for text, said in (
        ('', 'at least one token'),
        (torch.zeros(2, 3, dtype=torch.long), 'got 2 rows'),
        ([300], r'in \[0, 256\)'),
    ):
        with pytest.raises(ValueError, match=said):
            model.pieces(text)
    with pytest.raises(ValueError, match='chunk_size'):
        model.pieces('text', chunk_size=0)
    with pytest.raises(ValueError, match='num_tokens is 4'):
        placed((None, 'learned', 'every'), num_tokens=4).pieces('text')


def test_ids_that_are_no_bytes_are_shown_as_numbers() -> None:
    model = placed((None, 'every', 'every'), num_tokens=5, hierarchies=(1, 2, 4))
    assert str(model.pieces(torch.tensor([4, 3, 2, 1, 0]))) == '4|| 3 2| 1 0||'
