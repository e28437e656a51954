"""What a model learns from and is scored on: sequences of corpora, each a function of its number alone.

Nothing is remembered from one batch to the next. So a run goes on where it stopped, and any number of processes and
workers see together what one would.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .corpus import Corpus

SPLITS = ('train', 'valid', 'test')
# what no byte is: where a text has ended, which is learnt, and what fills up after it, which is not
END, PAD = 256, 257
IGNORED = -1
LEAST_SHARE = 1e-6
GOLDEN = (math.sqrt(5) - 1) / 2


def split_bytes(size: int, *, seq_len: int) -> dict[str, range]:
    """The first 90 %, the next 5 % and the last 5 % of a corpus, as is the custom for enwik8 and text8.

    Raises ValueError where one of them is too short for a sequence of `seq_len` and the byte after it.
    """
    valid, test = size * 90 // 100, size * 95 // 100
    spans = dict(zip(SPLITS, (range(valid), range(valid, test), range(test, size)), strict=True))
    shortest = min(map(len, spans.values()))
    if shortest <= seq_len:
        raise ValueError(
            f'data has {size:,} bytes, of which the shortest split has {shortest:,}: '
            f'too few for one sequence of seq_len {seq_len:,} and the byte after it'
        )
    return spans


def seed_of(*parts: int) -> int:
    """A seed for every combination of numbers, as unlike each other as those of neighbours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], 'little', signed=True)


def scale_weights(weights: Sequence[float]) -> list[float]:
    """The same weights with the largest between 0.5 and 1, so that their sum is finite. Exact: by a power of 2.

    Raises ValueError where one is not finite and above 0, or where the smallest is less than `LEAST_SHARE` of all:
    its corpus would hardly be read, or by rounding never.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f'weights must be finite and above 0, got {", ".join(map(str, weights))}')
    _, exponent = math.frexp(max(weights))
    scaled = [math.ldexp(weight, -exponent) for weight in weights]
    if min(scaled) < LEAST_SHARE * sum(scaled):
        raise ValueError(
            f'weights must each be at least {LEAST_SHARE} of their sum, got {", ".join(map(str, weights))}'
        )
    return scaled


class Batches(Dataset):
    """The sequences of each step of a run: `batches[step]` is int64 `(rows, seq_len + 1)`.

    A span is gone through in passes, each of which cuts it at other places and reads all of it once. With `segments`
    above 1, a stretch of that many times seq_len is read in as many steps, for a model that carries its state along:
    the last id of one step is the first of the next.

    Args:
        corpora: what to read from.
        spans: of each corpus, the positions to read from.
        weights: of each corpus, how often to read from it; by default as its span is long.
        rows: how many sequences a step has, over all processes.
        seq_len: how many bytes of each are predicted.
        segments: how many steps a stretch lasts. Made fewer where the shortest span has no room for them.
        documents: no sequence crosses from one text into the next: `END` follows its last byte, then `PAD`. Longer
            texts are read more often, in proportion: each where a pass without this would begin a stretch in it.
        seed: another seed, other sequences in another order.
        part: `(i, n)`, the i-th of n equal parts of the rows, that of one process.

    Raises:
        ValueError: a span has no room for a sequence; rows do not divide; weights do not fit, or one is 0 or nearly.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        spans: Sequence[range],
        *,
        rows: int,
        seq_len: int,
        weights: Sequence[float] | None = None,
        segments: int = 1,
        documents: bool = False,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        shortest = min(map(len, spans))
        if shortest <= seq_len:
            raise ValueError(f'data has {shortest:,} bytes to draw from, too few for sequences of {seq_len:,}')
        if rows % part[1]:
            raise ValueError(f'rows must divide by the {part[1]} processes, got {rows}')
        if weights is not None and len(weights) != len(corpora):
            raise ValueError(f'weights must be one for each of {len(corpora)} corpora, got {list(weights)}')
        self.corpora, self.spans = corpora, spans
        each = [len(span) for span in spans] if weights is None else scale_weights(weights)
        self.weights = torch.tensor(each, dtype=torch.float64)
        self.rows, self.seq_len = rows, seq_len
        self.segments = min(segments, (shortest - 1) // seq_len)
        # stretches in a pass of each
        self.counts = [(len(span) - 1) // (self.segments * seq_len) for span in spans]
        self.documents, self.seed, self.part = documents, seed, part

    def begins(self, step: int) -> bool:
        """Whether the sequences of that step are the first of their stretch."""
        return step % self.segments == 0

    def turns(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row of that step the corpus, how many passes of it are over, and the stretch's number in its pass."""
        number = step // self.segments * self.rows + torch.arange(self.rows)
        which, free = torch.full_like(number, -1), torch.ones_like(number, dtype=torch.bool)
        left = self.weights.flip(0).cumsum(0).flip(0)
        # each corpus takes its share of the rows that those before it left, evenly spread
        for i, share in enumerate((self.weights / left).tolist()):
            before, after = ((k.double() * share).floor().long() for k in (number, number + 1))
            mine = free & (after > before)
            which[mine] = i
            number = torch.where(mine, before, torch.where(free, number - before, number))
            free &= ~mine
        count = torch.tensor(self.counts)[which]
        return which, number // count, number % count

    def own(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """`turns` of this process's rows."""
        # every process counts for all, so that how many there are changes nothing
        index, count = self.part
        mine = slice(self.rows // count * index, self.rows // count * (index + 1))
        which, passed, number = self.turns(step)
        return which[mine], passed[mine], number[mine]

    def readings(self, step: int) -> Tensor:
        """How often what each of this process's rows reads in that step was read before: `(rows,)`."""
        return self.own(step)[1]

    def __getitem__(self, step: int) -> Tensor:
        which, passed, number = self.own(step)
        ids = torch.empty(len(which), self.seq_len + 1, dtype=torch.int64)
        for i, turn in {*zip(which.tolist(), passed.tolist(), strict=True)}:
            rows = (which == i) & (passed == turn)
            start, stop = self.find(i, turn, number[rows])
            start = start + step % self.segments * self.seq_len
            read = self.corpora[i].read(start, stop, self.seq_len + 1, pad=PAD)
            if self.documents:
                # a text that the span cuts off has not ended
                ended = find_ends(self.corpora[i], stop)[1] == stop
                read[ended[:, None] & (torch.arange(self.seq_len + 1) == (stop - start)[:, None])] = END
            ids[rows] = read
        return ids

    def find(self, which: int, turn: int, number: Tensor) -> tuple[Tensor, Tensor]:
        """Where stretches of a pass of a corpus begin and end, `(rows,)` both, by their numbers `(rows,)`."""
        corpus, span, count = self.corpora[which], self.spans[which], self.counts[which]
        length = self.segments * self.seq_len
        generator = torch.Generator().manual_seed(seed_of(self.seed, which, turn))
        first, offset = (int(torch.randint(high, (), generator=generator)) for high in (count, length))
        # stretches that follow each other lie far apart, and any number of them evenly over the span
        stride = next(a for a in range(round(count * GOLDEN), 2 * count + 1) if math.gcd(a, count) == 1)
        position = span.start + (first + number * stride) % count * length + offset
        if not self.documents:
            start = position.clamp(max=span.stop - length - 1)
            return start, start + length + 1
        begin, end = find_ends(corpus, position + 1)
        begin, stop = begin.clamp(min=span.start), end.clamp(max=span.stop)
        # the end of a text is one id more
        last = stop - length - (end > span.stop).long()
        return torch.maximum(torch.minimum(position, last), begin), stop


def find_ends(corpus: Corpus, position: Tensor) -> tuple[Tensor, Tensor]:
    """Of positions `(rows,)` above 0, the last end of a text before each, or 0, and the first at it or after."""
    text = torch.searchsorted(corpus.ends, position)
    return torch.where(text > 0, corpus.ends[text - 1], 0), corpus.ends[text]


def find_windows(corpus: Corpus, span: range, seq_len: int, documents: bool) -> tuple[Tensor, Tensor]:
    """Runs of up to `seq_len` bytes to predict, that together are the span: where they begin and end, `(windows,)`."""
    if not documents:
        # only the very first byte of a corpus has none before it
        start = torch.arange(max(span.start, 1), span.stop, seq_len)
        return start, (start + seq_len).clamp(max=span.stop)
    first, last = torch.searchsorted(corpus.ends, torch.tensor([span.start, span.stop - 1]), right=True)
    inner = corpus.ends[first:last]
    begin = torch.cat((torch.tensor([span.start]), inner)) + 1
    end = torch.cat((inner, torch.tensor([span.stop])))
    count = (end - begin + seq_len - 1).clamp(min=0) // seq_len
    text = torch.repeat_interleave(count)
    start = begin[text] + (torch.arange(len(text)) - (count.cumsum(0) - count)[text]) * seq_len
    return start, torch.minimum(start + seq_len, end[text])


def evaluation_batches(
    corpus: Corpus,
    span: range,
    *,
    seq_len: int,
    batch_size: int,
    max_bytes: int | None = None,
    documents: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Goes through `span` in windows that do not overlap: ids and labels, int64 `(batch, up to seq_len)` each.

    Every byte of the span is a label once: the first of a window is predicted from the byte before it alone. Where a
    window has ended, the id is 0 and the label `IGNORED`. With `max_bytes`, that many bytes are taken, in whole windows
    spread evenly, the same ones each time. With `documents`, windows end with their text, whose first byte, which
    nothing announces, is not predicted. `part` `(i, n)` is the i-th of n parts, all of as many batches.

    Raises ValueError where the span has no byte to predict: it has no score, and 0 would be the best of all.
    """
    start, stop = find_windows(corpus, span, seq_len, documents)
    if not len(start):
        raise ValueError(
            f'{corpus.name}: none of the bytes from {span.start:,} to {span.stop:,} can be predicted from the one '
            'before it'
        )
    if max_bytes is not None and (count := max(max_bytes // seq_len, 1)) < len(start):
        taken = torch.arange(count) * len(start) // count
        start, stop = start[taken], stop[taken]

    index, parts = part
    for begin in range(0, len(start), batch_size * parts):
        row = torch.arange(begin + index, begin + batch_size * parts, parts)
        # beyond the last window, a window of nothing
        beyond = row >= len(start)
        row = row[~beyond] if not beyond.all() else row[:1].clamp(max=len(start) - 1)
        first, last = start[row], stop[row]
        if beyond.all():
            last = first
        length = max(int((last - first).max()), 1)
        ids = corpus.read(first - 1, last, length + 1, pad=0)
        outside = torch.arange(length) >= (last - first)[:, None]
        yield ids[:, :-1], ids[:, 1:].masked_fill(outside, IGNORED)


def streaming_rows(corpus: Corpus, span: range, *, rows: int, size: int) -> Tensor:
    """Texts spread over the span, `size` bytes in all, to be read side by side: int64 `(rows, size / rows)`."""
    # none without two bytes, one to predict from the other
    rows = max(min(rows, len(span) // 2), 1)
    length = min(size, len(span)) // rows
    start = torch.tensor([span.start + i * (len(span) // rows) for i in range(rows)])
    return corpus.read(start, start + length, length, pad=0)
