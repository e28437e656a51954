"""Embeddings of what the last few ids say: as n-grams, and by what followed them before.

Both look up contexts by numbers, which `Contexts` makes of a history: ids plus 1, and 0 where there was none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import Memory, State, keep, room_for
from .ops.tracing import is_exporting, stable_sort

if TYPE_CHECKING:
    from .model import HierarchicalTransformer

# odd, so that a product with it loses nothing modulo 2^64: 2^64 over the golden ratio, as a signed number (Knuth, The
# Art of Computer Programming, volume 3, section 6.4)
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# what gives 1 with it
INVERSE = pow(GOLDEN, -1, 1 << 64) - (1 << 64)
# what the kind of a context and its length find
Hashes = dict[tuple[str, int], Tensor]
# how many ids back words are looked for
WORD_REACH = 64
# a history has fewer ids than two to this power
PLACE_BITS = 32


def mixed(hashed: Tensor) -> Tensor:
    """So that the high bits hang on all bits, and sums of several on each of them. 0 stays 0."""
    return (hashed ^ (hashed >> 32)) * GOLDEN


def ngram_hashes(history: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """A number for each n-gram, smaller n first: `(batch, seq - max(orders) + 1)`, where all of them have all ids."""
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
    """`base ** (place + 1)` modulo 2^64 for places 0, 1, 2, ...: `(n,)`."""
    if not is_exporting():
        return torch.full_like(places, base).cumprod(0)
    # ONNX has no cumulative product: square and multiply
    power = torch.ones_like(places)
    for bit in range(PLACE_BITS):
        power = torch.where(((places + 1) >> bit) % 2 == 1, power * base, power)
        base = signed(base * base)
    return power


def latest(places: Tensor) -> Tensor:
    """The largest of the places up to each, `(batch, n)`, or of the last `WORD_REACH`, which are all that count."""
    if not is_exporting():
        return places.cummax(1).values
    # nor has it a cumulative maximum: over the last 2, 4, 8, ...
    back = 1
    while back < WORD_REACH:
        places = places.maximum(F.pad(places[:, :-back], (back, 0)))
        back *= 2
    return places


def signed(number: int) -> int:
    """Modulo 2^64, as an int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def word_hashes(history: Tensor, n: int, orders: Sequence[int]) -> list[Tensor]:
    """A number for the last words that are begun at each of the last n ids, fewer words first: `(batch, n)`.

    Ids are bytes. A word is a run of letters of ASCII, whose case does not count, and of bytes from 128 on; what stands
    between words does not count, but for the last byte where that is none of a word's. Of the last `WORD_REACH` ids.
    """
    ids = history - 1
    upper = (ids >= ord('A')) & (ids <= ord('Z'))
    letters = upper | (ids >= ord('a')) & (ids <= ord('z')) | (ids >= 128) & (ids < 256)
    folded = torch.where(upper, history + 32, history)
    places = torch.arange(history.shape[1], device=history.device)
    # of ids from one place to another a number that does not hang on where that is: a difference of sums, scaled
    powers, inverses = powers_of(GOLDEN, places), powers_of(INVERSE, places)
    sums = F.pad((folded * powers).cumsum(1), (1, 0))
    # at each place, where the letters that end there begin, and one after the last word that is over
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
        # mixed, since polynomials of two words may add up to those of two others
        hashed = (hashed + mixed(word)) * GOLDEN
        if order in orders:
            found.append(hashed)
        end = ended.gather(1, at).maximum(lowest)
        at = end - 1
    return found


@dataclass(frozen=True)
class Contexts:
    """What ends at an id: the last n ids for each n of `orders`, and the last n words for each n of `words`.

    Both are in rising order, whatever they were given in.
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
        """How many ids before an id count: as many zeros have to be where a sequence begins."""
        return max(*(order - 1 for order in self.orders), WORD_REACH if self.words else 0, 0)

    def hashes(self, history: Tensor) -> Hashes:
        """A number `(batch, n)` for each context of the n ids that have `padding` others before them."""
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
        """Those of these contexts among others: `(batch, n, contexts)`."""
        own = [('ids', order) for order in self.orders] + [('words', count) for count in self.words]
        return torch.stack([hashes[name] for name in own], dim=-1)


class ContextEmbedding(nn.EmbeddingBag):
    """A table for each context: the sum of one vector of each, `(batch, n, dim)`.

    What subclasses find in it, by numbers of the contexts that end at each id, is a row of each table.
    """

    def __init__(self, dim: int, contexts: Contexts, rows: int) -> None:
        # a table begins where the one before ends
        super().__init__(len(contexts) * rows, dim, mode='sum')
        self.contexts = contexts
        self.rows = rows

    def reset_parameters(self) -> None:
        # what was never read says nothing
        nn.init.zeros_(self.weight)

    def in_table(self, found: Tensor) -> Tensor:
        """Rows of each table `(batch, n, tables)` as those of all tables together."""
        return found + torch.arange(found.shape[-1], device=found.device) * self.rows

    def look_up(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sums of `rows` `(batch, n, tables)` of all tables, weighted where `weights` are given."""
        weights = None if weights is None else weights.flatten(0, 1)
        return super().forward(rows.flatten(0, 1), per_sample_weights=weights).unflatten(0, rows.shape[:2])


class NGramEmbedding(ContextEmbedding):
    """The sum of one vector for each n in `orders`, found by the n ids that end at a position: `(batch, n, dim)`.

    The ids are hashed to a row of a table, one table for each n, so that n-grams may share a row. Pagnoni et al. 2024,
    arXiv 2412.09871; the hash is multiplicative. Time `O(seq * len(orders) * dim)`, whatever the rows.

    n-grams of words say what goes on beyond a few bytes, whatever stands between words: the word contexts of
    compressors (Mahoney 2005, PAQ8) as embeddings.

    With `sparse` its gradient is a sparse tensor of the rows that were read. `training.optim.build_optimizer` turns it
    on for a CPU and moves those rows alone; torch.optim.AdamW and others take no sparse gradients.

    Args:
        dim: width of the vectors.
        orders: how many ids an n-gram has, each at least 2.
        rows: of each table, a power of two.
        dropout: share of the vectors that training leaves out, each by chance, the others grown in turn. A table keeps
            what followed each rare n-gram, and from the second reading of a text on that is mistaken for knowledge.
            So its odds are multiplied by how often the text was read before, the `readings` of a call. Default: 1. At
            0, the first reading, nothing is left out.
        words: how many words a n-gram of words has, the one that is being read among them, each at least 1. Its ids
            are bytes.
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
        # what is scored or written on the way through a training run is without gradients
        if self.dropout and self.training and torch.is_grad_enabled():
            readings = torch.as_tensor(readings, dtype=self.weight.dtype, device=rows.device).view(-1, 1, 1)
            odds = readings * self.dropout / (1 - self.dropout)
            weights = (torch.rand(rows.shape, device=rows.device) * (1 + odds) < 1).to(self.weight.dtype) * (1 + odds)
        return self.look_up(rows, weights)

    def find(self, hashes: Tensor) -> Tensor:
        """Their rows: `(batch, n, contexts)`."""
        bits = self.rows.bit_length() - 1
        # a shift of a negative number brings ones along
        return self.in_table((mixed(hashes) >> (64 - bits)) & (self.rows - 1))


class RecallEmbedding(ContextEmbedding):
    """For each n in `orders` a vector of the id that followed when the last n ids were read before: `(batch, n, dim)`.

    What an induction head (Olsson et al. 2022, arXiv 2209.11895) has to learn, and needs two layers that reach as far
    for, looked up: the match model of compressors (Mahoney 2005, PAQ8) as an embedding. Where the n ids were not read
    in the last `reach`, there is a vector for that. Time `O(seq * log(seq) * len(orders))`.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the vectors.
        orders: how many ids have to be the same, each at least 1.
        reach: how many ids ago they may have ended.
        words: how many words have to be the same, the one that is being read among them, each at least 1. Ids are
            bytes, and words what they are in `word_hashes`.
    """

    roles: ClassVar[Mapping[str, str]] = dict(weight='lookup')

    def __init__(self, num_tokens: int, dim: int, orders: Sequence[int], reach: int, words: Sequence[int] = ()) -> None:
        # one of none, and one of each id
        super().__init__(dim, Contexts.among(orders, words), num_tokens + 1)
        self.reach = reach

    def forward(self, read: Tensor, hashes: Tensor, n: int) -> Tensor:  # type: ignore[override]
        """`(batch, n, dim)` for the last n of the ids plus 1 that were read, `(batch, seq)`, at least `reach` of them
        or all. `hashes` are the numbers of what ends at each: `(batch, seq, contexts)`.
        """
        return self.look_up(self.in_table(self.find(read, hashes, n)))

    def find(self, read: Tensor, hashes: Tensor, n: int) -> Tensor:
        """The ids, plus 1, that followed the last time, and 0 where there was none: `(batch, n, contexts)`."""
        return self.find_next(read, hashes) if n == 1 else self.find_all(read, hashes)[:, -n:]

    def find_all(self, read: Tensor, hashes: Tensor) -> Tensor:
        found = []
        for hashed in hashes.unbind(-1):
            # the same side by side, in the order in which they were read: each one's neighbour is the last
            hashed, places = stable_sort(hashed)
            before, place = places[:, :-1], places[:, 1:]
            last = (hashed[:, 1:] == hashed[:, :-1]) & (place - before <= self.reach)
            # n-grams that the beginning cuts short differ in their zeros. The last place of all comes before none
            ids = read.gather(1, (before + 1).clamp(max=read.shape[1] - 1))
            found.append(torch.zeros_like(places).scatter(1, place, ids.where(last, 0)))
        return torch.stack(found, dim=-1)

    def find_next(self, read: Tensor, hashes: Tensor) -> Tensor:
        """The same for the last id alone, without a sort: held against all before."""
        same = hashes == hashes[:, -1:]
        # the place of the id that followed, from 1 on; nothing has followed the last
        places = torch.arange(1, read.shape[1] + 1, device=read.device) % read.shape[1]
        last = (same * places[:, None]).amax(1)
        return read.gather(1, last).where(last > 0, 0)[:, None]


def embed(
    model: HierarchicalTransformer, ids: Tensor, memory: Memory, readings: Tensor | float | None = None
) -> Tensor:
    """The embeddings `(batch, n, dim_embed)` of ids `(batch, n)`: of each id, of its n-grams, and of what is recalled.

    It puts the ids and contexts that later chunks look back to into `memory`.
    """
    embeds = model.token_emb(ids)
    if not len(model.contexts):
        return embeds
    n, padding = ids.shape[1], model.contexts.padding
    # 0 stands for no id
    history = ids.long() + 1
    state = None if memory.state is None else with_room(model, memory.state, n)
    before = history.new_zeros(len(ids), padding) if state is None else cast(Tensor, state.ids)
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


def with_room(model: HierarchicalTransformer, state: State, n: int) -> State:
    """`state` with room for `n` more ids, if the model recalls. Blocks make room in their own parts of it."""
    if model.recall_emb is None:
        return state
    ids, contexts = cast(Tensor, state.ids), cast(Tensor, state.contexts)
    room = room_for(state.position + n, model.recall_emb.reach)
    more_ids = max(room, model.contexts.padding) - ids.shape[1]
    more_contexts = room - contexts.shape[1]
    if more_ids <= 0 and more_contexts <= 0:
        return state
    # the newest are last
    return replace(
        state,
        ids=F.pad(ids, (max(more_ids, 0), 0)),
        contexts=F.pad(contexts, (0, 0, max(more_contexts, 0), 0)),
    )
