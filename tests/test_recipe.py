"""What a recipe has besides the hierarchy: n-grams, norms, activations, beginnings, and tables that move by rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQ_LEN, build
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import FeedForward
from simple_hierarchical_transformer.embeddings import WORD_REACH, NGramEmbedding, RecallEmbedding
from simple_hierarchical_transformer.levels import Level
from simple_hierarchical_transformer.merges.linear import LinearMerge
from simple_hierarchical_transformer.mixers import Attention
from simple_hierarchical_transformer.training import optim

SMALL: dict[str, Any] = dict(
    num_tokens=11, dim=8, depth=2, seq_len=SEQ_LEN, dim_head=4, heads=2, ignore_index=-1, recon_ignore_index=-1
)


def learnt(batch: Callable[[], Tensor], steps: int, **settings: Any) -> float:
    """The last loss of a small model of one layer after so many steps on what `batch` gives."""
    torch.manual_seed(1)
    model = HierarchicalTransformer(**{**SMALL, 'depth': 1, **settings})
    optimizer = optim.build_optimizer(model, 'adamw', lr=1e-2, table_lr=5e-2, weight_decay=0.0)
    for _ in range(steps):
        loss = model(batch(), return_loss=True)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def filled(dim: int, orders: tuple[int, ...], rows: int) -> NGramEmbedding:
    embedding = NGramEmbedding(dim, orders, rows).double()
    nn.init.normal_(embedding.weight)
    return embedding


def hashes(embedding: NGramEmbedding | RecallEmbedding, ids: Tensor, new: int | None = None) -> Tensor:
    """What ends at the last `new` ids, or at each, by no more of a text that begins there than a state would hold."""
    padding = embedding.contexts.padding
    held = F.pad(ids + 1, (padding, 0))[:, -(new or ids.shape[1]) - padding :]
    return embedding.contexts.of(embedding.contexts.hashes(held))


def recalled(embedding: RecallEmbedding, ids: Tensor, new: int | None = None) -> Tensor:
    """As a model asks for it: of a whole text, or of its last ids and what a state holds of those before."""
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
    """Against a table in which each n-gram, begun by nothing where the text begins, has a row of its own."""
    embedding = filled(3, tuple(orders), 1 << 20)
    found = embedding(hashes(embedding, torch.tensor([text])))[0]
    padded = [-1] * max(orders) + text

    def grams(i: int) -> tuple[tuple[int, ...], ...]:
        end = i + 1 + max(orders)
        return tuple(tuple(padded[end - n : end]) for n in orders)

    for i in range(len(text)):
        for j in range(i):
            assert torch.equal(found[i], found[j]) == (grams(i) == grams(j))


def test_n_grams_spread_evenly_over_the_rows_of_their_table() -> None:
    """As chance would have it: of m balls in as many bins, 1 - 1/e of the bins get one."""
    rows = 1 << 12
    embedding = NGramEmbedding(1, (2, 3), rows)
    # bytes that count up, and that are drawn
    for text in (torch.arange(rows)[None] % 64 * 64 + torch.arange(rows) // 64, torch.randint(0, 1 << 16, (1, rows))):
        found = embedding.find(hashes(embedding, text))[0]
        for k in range(2):
            assert found[:, k].min() >= k * rows
            assert found[:, k].max() < (k + 1) * rows
            assert abs(len(found[:, k].unique()) / rows - (1 - math.exp(-1))) < 0.03


def test_training_leaves_n_grams_out_and_scoring_none() -> None:
    embedding = NGramEmbedding(1, (2, 3), 64, dropout=0.75)
    nn.init.ones_(embedding.weight)
    embedding.sparse = True
    ids = torch.randint(0, 256, (4, 500))
    found = embedding(hashes(embedding, ids))
    # none, one or both of two, each of which counts fourfold
    assert set(found.flatten().tolist()) == {0.0, 4.0, 8.0}
    assert abs(found.mean() - 2) < 0.2
    found.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.to_dense().sum() == found.sum()
    # none of what is read for the first time, and the more the oftener: of the third time, at the odds of two to one
    assert set(embedding(hashes(embedding, ids), 0.0).flatten().tolist()) == {2.0}
    embedding.dropout = 0.5
    for readings in (1, 2, 5):
        found = embedding(hashes(embedding, ids), torch.tensor([readings] * 3 + [0]))
        # each row by its own: the last one has new text
        assert set(found[:3].flatten().tolist()) == {0.0, 1.0 + readings, 2.0 + 2 * readings}
        assert abs(found[:3].mean() - 2) < 0.3
        assert set(found[3].flatten().tolist()) == {2.0}
    with torch.no_grad():
        assert set(embedding(hashes(embedding, ids)).flatten().tolist()) == {2.0}
    assert set(embedding.eval()(hashes(embedding, ids)).flatten().tolist()) == {2.0}


def test_an_n_gram_helps_where_nothing_looks_back() -> None:
    """Two bytes decide the next: without attention or shift's memory of more than one, their pair has to be known."""
    torch.manual_seed(0)
    table = torch.randint(0, 8, (8, 8, 8))
    text = [0, 1, 2]
    for _ in range(4000):
        text.append(int(table[text[-3], text[-2], text[-1]]) if len(text) % 5 else int(torch.randint(0, 8, ())))
    ids = torch.tensor(text)[: 62 * 64].view(62, 64)
    settings = dict(seq_len=64, window_sizes=0)
    plain = learnt(lambda: ids, 60, **settings)
    assert learnt(lambda: ids, 60, **settings, ngrams=(2, 3), ngram_rows=1 << 12) < plain - 0.5


PIECES = [b' ', b'ab', b'AB', b'Ab, ', b'\xc3\xa9', b'[[', b'c' * 40, b'. ' * 20, b'z@', b'Z{']


texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map(b''.join)


def words(text: bytes, i: int, order: int) -> tuple[bytes, ...]:
    """What the last words at byte i are, the last first: by a pattern in the last bytes."""
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


def test_what_fills_up_a_row_is_none_of_a_words() -> None:
    """Two words, and the end of a text in the place of what stands between them."""
    embedding = NGramEmbedding(1, (), 1 << 20, words=(1, 2))
    between, ended = (torch.tensor([[*b'ab', mark, *b'cd']]) for mark in (ord(' '), 256))
    rows = [embedding.find(hashes(embedding, ids, 1)) for ids in (between, ended)]
    assert torch.equal(*rows)


def test_a_word_helps_where_its_bytes_are_out_of_sight() -> None:
    """A word's first byte decides which mark ends it."""
    torch.manual_seed(0)
    ends = {word: int(mark) for word, mark in zip('abcdefghijklmnop', torch.randint(33, 40, (16,)), strict=True)}
    text = b''.join(f'{word}{"q" * 8}{chr(ends[word])}'.encode() for word in [*ends] * 25)
    ids = torch.tensor(list(text)).view(-1, 80)
    settings = dict(num_tokens=256, seq_len=80, window_sizes=0)
    plain = learnt(lambda: ids, 40, **settings)
    assert learnt(lambda: ids, 40, **settings, word_ngrams=(1,), ngram_rows=1 << 12) < plain - 0.1


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
    # from what a state holds at any place
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


def test_what_is_repeated_is_recalled_where_attention_does_not_reach() -> None:
    """Bytes drawn by chance, each sequence twice: the second half is known where the first is looked up."""

    def repeated() -> Tensor:
        half = torch.randint(0, 11, (8, 32))
        return torch.cat((half, half), dim=1)

    settings = dict(seq_len=64, window_sizes=4)
    # of what is drawn nothing can be known, and that is half of it
    assert learnt(repeated, 60, **settings) > 0.95 * math.log(11)
    assert learnt(repeated, 60, **settings, recall=(3,)) < 0.65 * math.log(11)


# the parts, written out


def test_normed_queries_and_keys_written_out() -> None:
    torch.manual_seed(0)
    mixer = Attention(dim=6, dim_head=4, heads=2, window=3, qk_norm=True).double()
    assert mixer.qk_norm is not None
    nn.init.normal_(mixer.qk_norm.gamma)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    q, k, v = mixer.to_qkv(mixer.norm(x)).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = (t / t.square().mean(dim=-1, keepdim=True).sqrt() * mixer.qk_norm.gamma for t in (q, k))
    q, k = mixer.rotary_emb(torch.stack((q, k)))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    scores = (q @ k.mT / 2).masked_fill((distance < 0) | (distance > 3), -torch.inf)
    expected = mixer.to_out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('activation', ['relu2', 'swiglu'])
def test_activations_written_out(activation: str) -> None:
    torch.manual_seed(0)
    ff = FeedForward(4, 2, activation=activation).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    hidden = ff.net[1](ff.net[0](x))
    assert hidden.shape[-1] == (16 if activation == 'swiglu' else 8)
    value, gate = hidden[..., :8], hidden[..., 8:]
    hidden = value * gate / (1 + (-gate).exp()) if activation == 'swiglu' else hidden.clamp(min=0) ** 2
    torch.testing.assert_close(ff(x), ff.net[3](hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize('into', [(0,), (1,), (0, 2, 1)])
def test_linear_merge_written_out(into: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dims, strides, n = (4, 6, 5), (1, 4, 2), 11
    levels = [Level(c, s, d, 4, 2, 2, None) for c, s, d in zip((1, 4, 2), strides, dims, strict=True)]
    merge = LinearMerge(levels, into).double()
    tokens = [torch.randn(2, level.length(n), level.dim, dtype=torch.float64) for level in levels]
    merged, _ = merge(tokens)
    for i, (x, level) in enumerate(zip(tokens, levels, strict=True)):
        expected = x.clone()
        for j in range(3) if i in into else ():
            if j == i:
                continue
            heard = [k for k in into if k != j]
            first = sum(dims[k] for k in heard[: heard.index(i)])
            weight = merge.to_others[j].weight[first : first + dims[i]]  # type: ignore[index]
            for t in range(x.shape[1]):
                other = tokens[j][:, t * level.stride // strides[j]]
                expected[:, t] += merge.norms[j](other) @ weight.T  # type: ignore[operator]
        torch.testing.assert_close(merged[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(merge='attention', merge_into='all'),
        dict(merge='linear', arrangement='hourglass', depth=(1, 3)),
        dict(mixer='s4d', mixer_kwargs=dict(), dim=8),
    ],
    ids=['concat', 'attention', 'linear', 's4d'],
)
def test_a_model_that_begins_at_zero_is_its_embeddings_alone_and_learns(settings: dict[str, Any]) -> None:
    config = {**SMALL, 'hierarchies': (1, 4), 'zero_init': True, **settings}
    model = HierarchicalTransformer(**config)
    ids = torch.randint(0, 11, (4, 24))
    with torch.no_grad():
        embeds = model(ids, return_hierarchical_embeds=True)[0]
        assert not model(ids).any()
        # the finest level's tokens pass through unchanged
        tokens = model.norms[0](model(ids, return_hierarchical_token_embeds=True)[0])
    torch.testing.assert_close(embeds, tokens)
    optimizer = optim.build_optimizer(model, 'adamw', lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(25):
        loss = model(ids, return_loss=True)[0]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # all weights have left zero
    assert losses[-1] < losses[0] - 0.5
    assert all(p.abs().sum() > 0 for p in model.parameters())


def test_levels_of_an_hourglass_have_their_own_depth() -> None:
    config = {**SMALL, 'hierarchies': (4, 1), 'arrangement': 'hourglass', 'depth': (3, 1)}
    model = build(config)
    there = [[block is not None for block in layer] for layer in model.layers]
    assert there == [[True, True], [True, False], [True, False]]
    # a layer of the coarse level that the fine one has none beside is heard
    ids = torch.randint(0, 11, (1, 24))
    before = model(ids)
    with torch.no_grad():
        model.layers[2][0].ff.net[-1].weight.add_(0.1)  # type: ignore[index, union-attr]
    assert not torch.equal(before, model(ids))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(ngrams=3), 'ngrams must be a tuple or list, got 3'),
        (dict(ngrams=(1, 2)), 'ngrams must be an integer of at least 2, got 1'),
        (dict(ngrams=(2, 2)), r'ngrams must all differ, got \(2, 2\)'),
        (dict(recall=4), 'recall must be a tuple or list, got 4'),
        (dict(recall=(0,)), 'recall must be an integer of at least 1, got 0'),
        (dict(word_ngrams=(1,)), 'word_ngrams reads ids as bytes: num_tokens must be 256, 257 or 258, got 11'),
        (dict(word_recall=(1,)), 'word_recall reads ids as bytes: num_tokens must be 256, 257 or 258, got 11'),
        (dict(num_tokens=256, word_ngrams=(0,)), 'word_ngrams must be an integer of at least 1, got 0'),
        (dict(recall=(2, 2)), r'recall must all differ, got \(2, 2\)'),
        (dict(ngrams=(2,), ngram_rows=100), 'ngram_rows must be a power of two, got 100'),
        (dict(ngrams=(2,), ngram_dropout=1), 'ngram_dropout must be at least 0 and below 1, got 1'),
        (dict(ff_activation='relu'), "ff_activation must be one of gelu, relu2, swiglu, got 'relu'"),
        (dict(zero_init=1), 'zero_init must be True or False, got 1'),
        (dict(mixer_kwargs=dict(qk_norm=1)), 'qk_norm must be True or False, got 1'),
        (dict(depth=0), 'depth must be an integer of at least 1, got 0'),
        (dict(depth=(1, 2)), 'depth must be one value or one for each of the 1 hierarchies'),
        (dict(depth=(1, 2), hierarchies=(1, 2)), "depth may differ between hierarchies with arrangement = 'hourglass'"),
        (
            dict(depth=(1, 2), hierarchies=(1, 2), arrangement='hourglass', share_layers=True),
            'depth may differ between hierarchies',
        ),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchicalTransformer(**{**SMALL, **settings})
