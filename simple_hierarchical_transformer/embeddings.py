"""Embeddings of the last few ids: of their n-grams, and of the id that followed them before.

Both look up contexts by hashes, which `Contexts` computes from a history. A history holds ids plus 1, and 0 before the
first id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_number
from .memory import Memory, State, keep, room_for
from .ops.tracing import is_exporting, is_traced, stable_sort

if TYPE_CHECKING:
    from .model import HierarchicalTransformer

# 2^64 over the golden ratio, as a signed number (Knuth, The Art of Computer Programming, volume 3, section 6.4). It is
# odd, so multiplication by it is a bijection modulo 2^64
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# its inverse modulo 2^64
INVERSE = pow(GOLDEN, -1, 1 << 64) - (1 << 64)
# by the kind of a context, 'ids' or 'words', and its length
Hashes = dict[tuple[str, int], Tensor]
# words are searched for among this many last ids
WORD_REACH = 64
# a history has less than 2^32 ids
PLACE_BITS = 32


def mixed(hashed: Tensor) -> Tensor:
    """Mixes the bits of hashes: the high bits then depend on all bits. 0 stays 0."""
    return (hashed ^ (hashed >> 32)) * GOLDEN


def ngram_hashes(history: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """The hashes of the n-grams of a history `(batch, seq)`: for each n `(batch, seq - max(orders) + 1)`."""
    before = max(orders) - 1
    n = history.shape[1] - before
    found: list[Tensor] = []
    hashed = torch.zeros_like(history[:, :n])
    for back in range(before + 1):
        hashed = (hashed + history[:, before - back : before - back + n]) * GOLDEN
        if back + 1 in orders:
            found.append(hashed)
    return found


def powers_of(base: int, places: Tensor) -> Tensor:
    """`base ** (place + 1)` modulo 2^64 for the places 0, 1, 2, ..., `(n,)`."""
    if not is_exporting():
        return torch.full_like(places, base).cumprod(0)
    # ONNX has no cumulative product: square and multiply instead
    power = torch.ones_like(places)
    for bit in range(PLACE_BITS):
        power = torch.where(((places + 1) >> bit) % 2 == 1, power * base, power)
        base = signed(base * base)
    return power


def latest(places: Tensor) -> Tensor:
    """The cumulative maximum of places `(batch, n)`. It only has to cover the last `WORD_REACH` places."""
    if not is_exporting():
        return places.cummax(1).values
    # ONNX has no cumulative maximum: take the maximum of the last 2, 4, 8, ... places
    back = 1
    while back < WORD_REACH:
        places = places.maximum(F.pad(places[:, :-back], (back, 0)))
        back *= 2
    return places


def signed(number: int) -> int:
    """A number modulo 2^64 as a signed int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def word_hashes(history: Tensor, n: int, orders: Sequence[int]) -> list[Tensor]:
    """The hash of the last words at each of the last n ids of a history: for each order `(batch, n)`, smallest first.

    Ids are bytes. A word is a run of ASCII letters, whose case is ignored, and of bytes from 128 on. Bytes between
    words are ignored, except for the last byte if it is no part of a word. Only the last `WORD_REACH` ids are used.
    """
    ids = history - 1
    upper = (ids >= ord('A')) & (ids <= ord('Z'))
    letters = upper | (ids >= ord('a')) & (ids <= ord('z')) | (ids >= 128) & (ids < 256)
    folded = torch.where(upper, history + 32, history)
    places = torch.arange(history.shape[1], device=history.device)
    # the hash of the ids between two places is a scaled difference of sums, so that it does not depend on the place
    powers, inverses = powers_of(GOLDEN, places), powers_of(INVERSE, places)
    sums = F.pad((folded * powers).cumsum(1), (1, 0))
    # for each place: the start of the word that ends there, and the place after the last complete word
    begun = latest(torch.where(letters, 0, places + 1))
    over = F.pad(letters[:, :-1], (1, 0)) & ~letters
    ended = latest(torch.where(over, places, 0))

    at = places[-n:].expand(history.shape[0], n)
    lowest, end = at - (WORD_REACH - 1), at + 1
    found: list[Tensor] = []
    hashed = torch.where(letters, 0, history)[:, -n:]
    for order in range(1, max(orders) + 1):
        start = begun.gather(1, at).maximum(lowest).minimum(end)
        word = (sums.gather(1, end) - sums.gather(1, start)) * inverses[start.clamp(max=places.shape[0] - 1)]
        # mixed, because the polynomials of two words may have the same sum as those of two other words
        hashed = (hashed + mixed(word)) * GOLDEN
        if order in orders:
            found.append(hashed)
        end = ended.gather(1, at).maximum(lowest)
        at = end - 1
    return found


@dataclass(frozen=True)
class Contexts:
    """The contexts that end at an id: the last n ids for each n of `orders`, the last n words for each n of `words`.

    Both are sorted.
    """

    orders: tuple[int, ...]
    words: tuple[int, ...]

    @classmethod
    def among(cls, orders: Sequence[int], words: Sequence[int]) -> Contexts:
        return cls(tuple(sorted({*orders})), tuple(sorted({*words})))

    def __len__(self) -> int:
        return len(self.orders) + len(self.words)

    @property
    def padding(self) -> int:
        """The number of earlier ids that a context can contain, and of zeros that a history starts with."""
        return max(*(order - 1 for order in self.orders), WORD_REACH if self.words else 0, 0)

    def hashes(self, history: Tensor) -> Hashes:
        """The hashes `(batch, n)` of each context at the ids of a history `(batch, padding + n)`."""
        n = history.shape[1] - self.padding
        found: Hashes = {}
        if self.orders:
            of_ids = ngram_hashes(history[:, -n - max(self.orders) + 1 :], self.orders)
            found |= {('ids', order): hashed for order, hashed in zip(self.orders, of_ids, strict=True)}
        if self.words:
            of_words = word_hashes(history, n, self.words)
            found |= {('words', count): hashed for count, hashed in zip(self.words, of_words, strict=True)}
        return found

    def of(self, hashes: Hashes) -> Tensor:
        """The hashes of these contexts, from those of more contexts: `(batch, n, contexts)`."""
        names = [('ids', order) for order in self.orders] + [('words', count) for count in self.words]
        return torch.stack([hashes[name] for name in names], dim=-1)


class ContextEmbedding(nn.EmbeddingBag):
    """One table for each context. The embedding is the sum of one row of each table, `(batch, n, dim)`.

    Subclasses choose the rows from the hashes of the contexts that end at each id.
    """

    def __init__(self, dim: int, contexts: Contexts, rows: int) -> None:
        # the tables lie one after the other
        super().__init__(len(contexts) * rows, dim, mode='sum')
        self.contexts = contexts
        self.rows = rows

    def reset_parameters(self) -> None:
        # rows that were never trained have no effect
        nn.init.zeros_(self.weight)

    def in_table(self, found: Tensor) -> Tensor:
        """Rows of each table, `(batch, n, tables)`, as rows of the weight."""
        return found + torch.arange(found.shape[-1], device=found.device) * self.rows

    def look_up(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of the rows `(batch, n, tables)` of the weight, optionally weighted: `(batch, n, dim)`."""
        weights = None if weights is None else weights.flatten(0, 1)
        return super().forward(rows.flatten(0, 1), per_sample_weights=weights).unflatten(0, rows.shape[:2])


class NGramEmbedding(ContextEmbedding):
    """The sum of one embedding for each n in `orders`, of the n ids that end at a position: `(batch, n, dim)`.

    There is one table for each n. The n-gram is hashed to a row of it, so n-grams may share a row (Pagnoni et al. 2024,
    arXiv 2412.09871; here the hash is multiplicative). Time is `O(seq * len(orders) * dim)` for any number of rows.

    n-grams of words reach further back than a few bytes, and ignore the characters between words. They are the word
    contexts of data compressors (Mahoney 2005, PAQ8) as embeddings.

    With `sparse`, the gradient is a sparse tensor of the rows that were read. `training.optim.build_optimizer` turns
    this on for a CPU and updates only these rows. torch.optim.AdamW and other optimizers do not accept sparse
    gradients.

    Args:
        dim: the width of the embeddings.
        orders: the lengths of the n-grams, each at least 2.
        rows: the number of rows of each table, a power of two.
        dropout: the share of embeddings that training drops at random; the others are scaled up. A table memorizes
            which id followed each rare n-gram. When a text is read again, the model would rely on that memory. So the
            odds of dropping are multiplied by how often the text was read before, the `readings` of a call. Default:
            1. At 0, the first reading, nothing is dropped.
        words: the lengths of the n-grams of words, the incomplete last word included, each at least 1. Ids must be
            bytes.
    """

    roles: ClassVar[Mapping[str, str]] = dict(weight='rows')

    def __init__(
        self, dim: int, orders: Sequence[int], rows: int, dropout: float = 0.0, words: Sequence[int] = ()
    ) -> None:
        super().__init__(dim, Contexts.among(orders, words), rows)
        self.dropout = dropout

    def forward(self, hashes: Tensor, readings: Tensor | float = 1.0) -> Tensor:  # type: ignore[override]
        """The embeddings `(batch, n, dim)` of the n-grams that end at each id.

        Args:
            hashes: the number of each n-gram, `(batch, n, contexts)`.
            readings: how often the text was read before, for all rows or for each, `(batch,)`. See `dropout`.
        """
        rows = self.find(hashes)
        weights = None
        # scoring and sampling during training run without gradients
        if self.dropout and self.training and torch.is_grad_enabled():
            readings = torch.as_tensor(readings, dtype=self.weight.dtype, device=rows.device).view(-1, 1, 1)
            odds = readings * self.dropout / (1 - self.dropout)
            weights = (torch.rand(rows.shape, device=rows.device) * (1 + odds) < 1).to(self.weight.dtype) * (1 + odds)
        return self.look_up(rows, weights)

    def find(self, hashes: Tensor) -> Tensor:
        """The rows of n-grams, `(batch, n, contexts)`, from their hashes in the same shape."""
        bits = self.rows.bit_length() - 1
        # shifting a negative number fills in ones, which are masked out
        return self.in_table((mixed(hashes) >> (64 - bits)) & (self.rows - 1))


class RecallEmbedding(ContextEmbedding):
    """For each n in `orders`, the embedding of the id that followed the last n ids when they occurred before.

    An induction head (Olsson et al. 2022, arXiv 2209.11895) learns the same with two layers of long attention. This is
    the match model of data compressors (Mahoney 2005, PAQ8) as an embedding. If the n ids did not occur in
    the last `reach` ids, it is the embedding of "not found". Time is `O(seq * log(seq) * len(orders))`. The result is
    `(batch, n, dim)`.

    Args:
        num_tokens: the size of the vocabulary.
        dim: the width of the embeddings.
        orders: the numbers of ids that must match, each at least 1.
        reach: the largest distance to the earlier occurrence, in ids.
        words: the numbers of words that must match, the incomplete last word included, each at least 1. Ids must be
            bytes. `word_hashes` defines words.
    """

    roles: ClassVar[Mapping[str, str]] = dict(weight='lookup')

    def __init__(self, num_tokens: int, dim: int, orders: Sequence[int], reach: int, words: Sequence[int] = ()) -> None:
        # one row for "not found", and one for each id
        super().__init__(dim, Contexts.among(orders, words), num_tokens + 1)
        self.reach = reach

    def forward(self, read: Tensor, hashes: Tensor, n: int) -> Tensor:  # type: ignore[override]
        """The embeddings `(batch, n, dim)` of the last n ids.

        Args:
            read: the history, `(batch, seq)`: all ids plus 1, or at least the last `reach + n`.
            hashes: the hashes of the contexts that end at each of them, `(batch, seq, contexts)`.
            n: the number of ids to embed.
        """
        return self.look_up(self.in_table(self.find(read, hashes, n)))

    def find(self, read: Tensor, hashes: Tensor, n: int) -> Tensor:
        """The ids plus 1 that followed at the last occurrence. 0 means "not found". `(batch, n, contexts)`."""
        return self.find_next(read, hashes) if n == 1 else self.find_all(read, hashes)[:, -n:]

    def find_all(self, read: Tensor, hashes: Tensor) -> Tensor:
        found = []
        for hashed in hashes.unbind(-1):
            # sorting puts equal contexts next to each other in reading order, so the neighbor is the previous
            # occurrence
            hashed, places = stable_sort(hashed)
            before, place = places[:, :-1], places[:, 1:]
            last = (hashed[:, 1:] == hashed[:, :-1]) & (place - before <= self.reach)
            # n-grams cut off by the start differ in their zeros. The last place precedes none
            ids = read.gather(1, (before + 1).clamp(max=read.shape[1] - 1))
            found.append(torch.zeros_like(places).scatter(1, place, ids.where(last, 0)))
        return torch.stack(found, dim=-1)

    def find_next(self, read: Tensor, hashes: Tensor) -> Tensor:
        """Like `find_all`, for the last id only: compares it with all earlier ids instead of sorting."""
        same = hashes == hashes[:, -1:]
        # the place of the id that followed, from 1 on; none followed the last
        places = torch.arange(1, read.shape[1] + 1, device=read.device) % read.shape[1]
        last = (same * places[:, None]).amax(1)
        return read.gather(1, last).where(last > 0, 0)[:, None]


def embed(
    model: HierarchicalTransformer, ids: Tensor, memory: Memory, readings: Tensor | float | None = None
) -> Tensor:
    """The embeddings `(batch, n, dim_embed)` of ids `(batch, n)`: of each id, its n-grams, and recall.

    Also puts the ids and contexts that later chunks need into `memory`.
    """
    check_readings(readings, ids.shape[0])
    embeds = model.token_emb(ids)
    if not len(model.contexts):
        return embeds
    n, padding = ids.shape[1], model.contexts.padding
    # 0 means no id
    history = ids.long() + 1
    state = None if memory.state is None else with_room(model, memory.state, n)
    before = history.new_zeros(ids.shape[0], padding) if state is None else cast(Tensor, state.ids)
    history = torch.cat((before, history), dim=1)
    hashes = model.contexts.hashes(history[:, -n - padding :])
    if model.ngram_emb is not None:
        given = model.ngram_emb.contexts.of(hashes)
        embeds = embeds + (model.ngram_emb(given) if readings is None else model.ngram_emb(given, readings))
    recalled = None
    if model.recall_emb is not None:
        recalled = model.recall_emb.contexts.of(hashes)
        if state is not None:
            recalled = torch.cat((cast(Tensor, state.contexts), recalled), dim=1)
        embeds = embeds + model.recall_emb(history[:, -recalled.shape[1] :], recalled, n)
    if state is not None:
        kept = None if recalled is None else keep(state.contexts, recalled[:, n:])
        memory.put_ids(keep(state.ids, history[:, n:]), kept)
    return embeds


def check_readings(readings: Tensor | float | None, batch: int) -> None:
    """Raises ValueError where `readings` is no number of at least 0, and no tensor `()` or `(batch,)` of such."""
    if not isinstance(readings, Tensor):
        if readings is not None:
            check_number('readings', readings)
        return
    if readings.shape not in ((), (batch,)):
        raise ValueError(f'readings must be a number or a tensor of shape ({batch},), got {tuple(readings.shape)}')
    # reading values would make an accelerator wait, or break a compiled graph
    if readings.device.type == 'cpu' and not is_traced() and not (readings >= 0).all():
        raise ValueError(f'readings must be at least 0, got {readings.tolist()}')


def with_room(model: HierarchicalTransformer, state: State, n: int) -> State:
    """`state` with room for `n` more ids, if the model has recall. Blocks make room in their own parts of the state."""
    if model.recall_emb is None:
        return state
    ids, contexts = cast(Tensor, state.ids), cast(Tensor, state.contexts)
    room = room_for(state.position + n, model.recall_emb.reach)
    more_ids = max(room, model.contexts.padding) - ids.shape[1]
    more_contexts = room - contexts.shape[1]
    if more_ids <= 0 and more_contexts <= 0:
        return state
    # the newest ids are last
    return replace(
        state,
        ids=F.pad(ids, (max(more_ids, 0), 0)),
        contexts=F.pad(contexts, (0, 0, max(more_contexts, 0), 0)),
    )
