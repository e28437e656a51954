"""Embeddings of n-grams of ids and words, and of what followed an earlier occurrence (recall)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.configs import SEQ_LEN
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.embeddings import WORD_REACH, NGramEmbedding, RecallEmbedding
from simple_hierarchical_transformer.training import optim

SMALL: dict[str, Any] = dict(
    num_tokens=11, dim=8, depth=2, seq_len=SEQ_LEN, dim_head=4, heads=2, ignore_index=-1, recon_ignore_index=-1
)


def trained_loss(batch: Callable[[], Tensor], steps: int, **settings: Any) -> float:
    """Trains a small model of one layer on what `batch` returns. Returns the last loss."""
    torch.manual_seed(1)
    model = HierarchicalTransformer(**{**SMALL, 'depth': 1, **settings})
    optimizer = optim.build_optimizer(model, 'adamw', lr=1e-2, table_lr=5e-2, weight_decay=0.0)
    for _ in range(steps):
        loss = model(batch(), return_loss=True)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def random_table(dim: int, orders: tuple[int, ...], rows: int) -> NGramEmbedding:
    embedding = NGramEmbedding(dim, orders, rows).double()
    nn.init.normal_(embedding.weight)
    return embedding


def hashes(embedding: NGramEmbedding | RecallEmbedding, ids: Tensor, new: int | None = None) -> Tensor:
    """Hashes of the contexts that end at the last `new` ids, from only those ids that a state would hold."""
    padding = embedding.contexts.padding
    held = F.pad(ids + 1, (padding, 0))[:, -(new or ids.shape[1]) - padding :]
    return embedding.contexts.of(embedding.contexts.hashes(held))


def recalled(embedding: RecallEmbedding, ids: Tensor, new: int | None = None) -> Tensor:
    """The ids recalled for a whole text, or for its last `new` ids with only the past that a state would hold."""
    found = hashes(embedding, ids)
    if new is None:
        return embedding.find(ids + 1, found, ids.shape[1])
    held = embedding.reach + new
    found = torch.cat((found[:, :-new], hashes(embedding, ids, new)), dim=1)
    return embedding.find(
        F.pad(ids + 1, (embedding.reach, 0))[:, -held:], F.pad(found, (0, 0, embedding.reach, 0))[:, -held:], new
    )


# n-grams


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.sets(st.integers(2, 5), min_size=1))
def test_equal_n_grams_are_embedded_alike_and_others_are_told_apart(text: list[int], orders: set[int]) -> None:
    """Against a comparison of the n-grams themselves, padded where the text begins."""
    embedding = random_table(1, tuple(orders), 1 << 20)
    found = embedding(hashes(embedding, torch.tensor([text])))[0]
    padded = [-1] * max(orders) + text

    def grams(i: int) -> tuple[tuple[int, ...], ...]:
        end = i + 1 + max(orders)
        return tuple(tuple(padded[end - n : end]) for n in orders)

    for i in range(len(text)):
        for j in range(i):
            assert torch.equal(found[i], found[j]) == (grams(i) == grams(j))


def test_n_grams_spread_evenly_over_the_rows_of_their_table() -> None:
    """As random hashing does: m balls thrown into m bins leave a ball in 1 - 1/e of them."""
    rows = 1 << 12
    embedding = NGramEmbedding(1, (2, 3), rows)
    # ids that count up, and random ids
    for text in (torch.arange(rows)[None] % 64 * 64 + torch.arange(rows) // 64, torch.randint(0, 1 << 16, (1, rows))):
        found = embedding.find(hashes(embedding, text))[0]
        for k in range(2):
            assert found[:, k].min() >= k * rows
            assert found[:, k].max() < (k + 1) * rows
            assert abs(len(found[:, k].unique()) / rows - (1 - math.exp(-1))) < 0.03


def test_training_drops_n_grams_and_scoring_keeps_all() -> None:
    embedding = NGramEmbedding(1, (2, 3), 64, dropout=0.75)
    nn.init.ones_(embedding.weight)
    embedding.sparse = True
    ids = torch.randint(0, 256, (4, 500))
    found = embedding(hashes(embedding, ids))
    # none, one or both of the two n-grams, each scaled by 4
    assert set(found.flatten().tolist()) == {0.0, 4.0, 8.0}
    assert abs(found.mean() - 2) < 0.2
    found.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.to_dense().sum() == found.sum()
    # nothing is dropped in the first reading, and more in each later one
    assert set(embedding(hashes(embedding, ids), 0.0).flatten().tolist()) == {2.0}
    embedding.dropout = 0.5
    for readings in (1, 2, 5):
        found = embedding(hashes(embedding, ids), torch.tensor([readings] * 3 + [0]))
        # each row of the batch has its own number of readings: the last row is new text
        assert set(found[:3].flatten().tolist()) == {0.0, 1.0 + readings, 2.0 + 2 * readings}
        assert abs(found[:3].mean() - 2) < 0.3
        assert set(found[3].flatten().tolist()) == {2.0}
    with torch.no_grad():
        assert set(embedding(hashes(embedding, ids)).flatten().tolist()) == {2.0}
    assert set(embedding.eval()(hashes(embedding, ids)).flatten().tolist()) == {2.0}


@pytest.mark.slow
def test_an_n_gram_helps_where_nothing_looks_back() -> None:
    """The last three ids decide the next. Without attention, the token shift sees only the last two."""
    torch.manual_seed(0)
    table = torch.randint(0, 8, (8, 8, 8))
    text = [0, 1, 2]
    for _ in range(4000):
        text.append(int(table[text[-3], text[-2], text[-1]]) if len(text) % 5 else int(torch.randint(0, 8, ())))
    ids = torch.tensor(text)[: 62 * 64].view(62, 64)
    settings = dict(seq_len=64, window_sizes=0)
    plain = trained_loss(lambda: ids, 60, **settings)
    assert trained_loss(lambda: ids, 60, **settings, ngrams=(2, 3), ngram_rows=1 << 12) < plain - 0.5


PIECES = [b' ', b'ab', b'AB', b'Ab, ', b'\xc3\xa9', b'[[', b'c' * 40, b'. ' * 20, b'z@', b'Z{']


texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map(b''.join)


def words(text: bytes, i: int, order: int) -> tuple[bytes, ...]:
    """The last words at byte i, newest first, found by a regular expression."""
    seen = text[max(0, i - WORD_REACH + 1) : i + 1].lower()
    runs = re.findall(rb'[a-z\x80-\xff]+', seen)[::-1]
    inside = re.match(rb'[a-z\x80-\xff]', seen[-1:])
    found = [b'', *runs] if inside else [seen[-1:], b'', *runs]
    return tuple([*found, *[b''] * order][: order + 1])


@given(texts, st.sets(st.integers(1, 4), min_size=1), st.data())
def test_equal_words_are_embedded_alike_and_others_are_told_apart(
    text: bytes, orders: set[int], data: st.DataObject
) -> None:
    ids = torch.tensor([list(text)])
    embedding = NGramEmbedding(1, (), 1 << 20, words=tuple(orders))
    whole = embedding.find(hashes(embedding, ids))
    for k, order in enumerate(sorted(orders)):
        rows, contexts = whole[0, :, k].tolist(), [words(text, i, order) for i in range(len(text))]
        assert len(set(zip(rows, contexts, strict=True))) == len(set(contexts)) == len(set(rows))
    n = data.draw(st.integers(1, len(text)))
    assert torch.equal(embedding.find(hashes(embedding, ids, n)), whole[:, -n:])


def test_padding_ends_a_word() -> None:
    """An id beyond the bytes separates words as a space does."""
    embedding = NGramEmbedding(1, (), 1 << 20, words=(1, 2))
    between, ended = (torch.tensor([[*b'ab', mark, *b'cd']]) for mark in (ord(' '), 256))
    rows = [embedding.find(hashes(embedding, ids, 1)) for ids in (between, ended)]
    assert torch.equal(*rows)


@pytest.mark.slow
def test_a_word_helps_where_its_bytes_are_out_of_sight() -> None:
    """A word's first byte decides which mark ends it."""
    torch.manual_seed(0)
    ends = {word: int(mark) for word, mark in zip('abcdefghijklmnop', torch.randint(33, 40, (16,)), strict=True)}
    text = b''.join(f'{word}{"q" * 8}{chr(ends[word])}'.encode() for word in [*ends] * 25)
    ids = torch.tensor(list(text)).view(-1, 80)
    settings = dict(num_tokens=256, seq_len=80, window_sizes=0)
    plain = trained_loss(lambda: ids, 40, **settings)
    assert trained_loss(lambda: ids, 40, **settings, word_ngrams=(1,), ngram_rows=1 << 12) < plain - 0.1


# recall


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=17, max_size=17), min_size=1, max_size=2),
    st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True),
    st.integers(1, 20),
    st.integers(1, 17),
)
def test_what_followed_the_last_time_is_found_as_by_looking(
    texts: list[list[int]], orders: list[int], reach: int, new: int
) -> None:
    embedding = RecallEmbedding(3, 4, orders, reach)
    ids = torch.tensor(texts)
    whole = recalled(embedding, ids)
    for text, found in zip(texts, whole.tolist(), strict=True):
        for i in range(17):
            for k, n in enumerate(sorted(orders)):
                ends = [
                    j for j in range(max(i - reach, n - 1), i)
                    if i + 1 >= n and text[j + 1 - n : j + 1] == text[i + 1 - n : i + 1]
                ]  # fmt: skip
                assert found[i][k] == (text[ends[-1] + 1] + 1 if ends else 0)
    # from the past that a state would hold
    assert torch.equal(recalled(embedding, ids, new), whole[:, -new:])


@given(texts, st.sets(st.integers(1, 3), min_size=1), st.sampled_from([(), (2,)]), st.integers(1, 80), st.data())
def test_what_followed_the_same_words_is_found_as_by_looking(
    text: bytes, counts: set[int], orders: tuple[int, ...], reach: int, data: st.DataObject
) -> None:
    embedding = RecallEmbedding(256, 4, orders, reach, tuple(counts))
    ids = torch.tensor([list(text)])
    whole = recalled(embedding, ids)
    for k, count in enumerate(sorted(counts)):
        contexts = [words(text, i, count) for i in range(len(text))]
        for i in range(len(text)):
            ends = [j for j in range(max(i - reach, 0), i) if contexts[j] == contexts[i]]
            assert whole[0, i, len(orders) + k] == (text[ends[-1] + 1] + 1 if ends else 0)
    for n in (1, data.draw(st.integers(1, len(text)))):
        assert torch.equal(recalled(embedding, ids, n), whole[:, -n:])


def test_what_was_recalled_is_embedded_by_order() -> None:
    embedding = RecallEmbedding(3, 2, (1, 2), 8)
    nn.init.normal_(embedding.weight)
    once, twice = embedding.weight[:4], embedding.weight[4:]
    ids = torch.tensor([[2, 0, 2, 0]])
    found = embedding(ids + 1, hashes(embedding, ids), 4)[0]
    torch.testing.assert_close(found, torch.stack([once[0], once[0], once[1], once[3]]) + twice[[0, 0, 0, 3]])


@pytest.mark.slow
def test_what_is_repeated_is_recalled_where_attention_does_not_reach() -> None:
    """Each sequence is a random half, repeated: recall predicts the second half from the first."""

    def repeated() -> Tensor:
        half = torch.randint(0, 11, (8, 32))
        return torch.cat((half, half), dim=1)

    settings = dict(seq_len=64, window_sizes=4)
    # the first half is random, so its loss stays at log(11)
    assert trained_loss(repeated, 60, **settings) > 0.95 * math.log(11)
    assert trained_loss(repeated, 60, **settings, recall=(3,)) < 0.65 * math.log(11)
