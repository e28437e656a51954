"""Batches of sequences to train and evaluate on.

A batch is a function of its step alone, with no state between batches. A run can therefore resume at any step, and any
number of processes and workers together read the same sequences as one process.
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
# Ids above those of bytes. END follows the last byte of a text and is predicted. PAD follows END and is not predicted.
END, PAD = 256, 257
IGNORED = -1
MIN_SHARE = 1e-6
GOLDEN = (math.sqrt(5) - 1) / 2


def split_bytes(size: int, *, seq_len: int) -> dict[str, range]:
    """Splits a corpus of `size` bytes into 90 % train, 5 % valid and 5 % test, as is customary for enwik8 and text8.

    Returns:
        The positions of each split, by the names in `SPLITS`.

    Raises:
        ValueError: a split is too short for a sequence of `seq_len` bytes and the byte after it.
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
    """Returns a seed that depends on all of the numbers. Seeds of neighbouring numbers are unrelated."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], 'little', signed=True)


def scale_weights(weights: Sequence[float]) -> list[float]:
    """Scales weights by a power of 2, which is exact, so that the largest is in [0.5, 1) and their sum is finite.

    Raises:
        ValueError: a weight is not finite and above 0, or is less than `MIN_SHARE` of the sum. Its corpus would hardly
            be read, or never because of rounding.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f'weights must be finite and above 0, got {", ".join(map(str, weights))}')
    _, exponent = math.frexp(max(weights))
    scaled = [math.ldexp(weight, -exponent) for weight in weights]
    if min(scaled) < MIN_SHARE * sum(scaled):
        raise ValueError(f'weights must each be at least {MIN_SHARE} of their sum, got {", ".join(map(str, weights))}')
    return scaled


class Batches(Dataset[Tensor]):
    """The sequences of each step of a training run: `batches[step]` is int64 `(rows, seq_len + 1)`.

    A span is read in passes. Each pass cuts it into stretches at different places, and reads each stretch once. A
    stretch is `segments` sequences long, and is read in as many consecutive steps, for a model that carries its state
    from step to step. The last id of a sequence is the first id of the next one of its stretch.

    Args:
        corpora: the corpora to read.
        spans: for each corpus, the positions to read.
        rows: number of sequences of a step, over all processes.
        seq_len: number of bytes that are predicted in a sequence.
        weights: for each corpus, how often to read it. The default is the length of its span.
        segments: number of sequences of a stretch. Fewer are used if the shortest span has no room for them.
        documents: keep texts separate. No sequence then crosses from one text into the next: `END` follows the last
            byte of a text, then `PAD`. A text is read wherever a pass without this option would start a stretch in it,
            so longer texts are read proportionally more often.
        seed: determines the sequences and their order.
        part: `(i, n)` reads the i-th of n equal parts of the rows: those of process i of n.

    Raises:
        ValueError: a span has no room for a sequence; `rows` is not divisible by the number of parts; `weights` has the
            wrong length, or a weight is 0 or almost 0.
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
        # For each corpus, the number of stretches of a pass.
        self.counts = [(len(span) - 1) // (self.segments * seq_len) for span in spans]
        self.documents, self.seed, self.part = documents, seed, part

    def begins(self, step: int) -> bool:
        """Returns whether the sequences of this step are the first of their stretch."""
        return step % self.segments == 0

    def schedule(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what each row of this step reads, over all processes.

        Returns:
            The corpus, the number of completed passes over it, and the index of the stretch in its pass: int64
            `(rows,)` each.
        """
        number = step // self.segments * self.rows + torch.arange(self.rows)
        which, free = torch.full_like(number, -1), torch.ones_like(number, dtype=torch.bool)
        left = self.weights.flip(0).cumsum(0).flip(0)
        # Each corpus takes its share of the rows that previous corpora have not taken, evenly spaced.
        for i, share in enumerate((self.weights / left).tolist()):
            before, after = ((k.double() * share).floor().long() for k in (number, number + 1))
            taken = free & (after > before)
            which[taken] = i
            number = torch.where(taken, before, torch.where(free, number - before, number))
            free &= ~taken
        count = torch.tensor(self.counts)[which]
        return which, number // count, number % count

    def local_schedule(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the `schedule` of this process's rows."""
        # Computed for all rows first, so that the result does not depend on the number of processes.
        index, count = self.part
        local = slice(self.rows // count * index, self.rows // count * (index + 1))
        which, passed, number = self.schedule(step)
        return which[local], passed[local], number[local]

    def readings(self, step: int) -> Tensor:
        """Returns how often each of this process's rows was read before: int64 `(rows,)`."""
        return self.local_schedule(step)[1]

    def __getitem__(self, step: int) -> Tensor:
        which, passed, number = self.local_schedule(step)
        ids = torch.empty(len(which), self.seq_len + 1, dtype=torch.int64)
        for i, passes in {*zip(which.tolist(), passed.tolist(), strict=True)}:
            rows = (which == i) & (passed == passes)
            start, stop = self.locate(i, passes, number[rows])
            start = start + step % self.segments * self.seq_len
            read = self.corpora[i].read(start, stop, self.seq_len + 1, pad=PAD)
            if self.documents:
                # A text that the span cuts off has no END.
                ended = find_ends(self.corpora[i], stop)[1] == stop
                read[ended[:, None] & (torch.arange(self.seq_len + 1) == (stop - start)[:, None])] = END
            ids[rows] = read
        return ids

    def locate(self, which: int, passes: int, number: Tensor) -> tuple[Tensor, Tensor]:
        """Returns where stretches start and stop in their corpus: int64 `(rows,)` each.

        Args:
            which: index of the corpus.
            passes: number of completed passes over it.
            number: `(rows,)`, indices of the stretches in their pass.
        """
        corpus, span, count = self.corpora[which], self.spans[which], self.counts[which]
        length = self.segments * self.seq_len
        generator = torch.Generator().manual_seed(seed_of(self.seed, which, passes))
        first, offset = (int(torch.randint(high, (), generator=generator)) for high in (count, length))
        # Steps of the golden ratio spread any number of consecutive stretches evenly over the span.
        stride = next(a for a in range(round(count * GOLDEN), 2 * count + 1) if math.gcd(a, count) == 1)
        position = span.start + (first + number * stride) % count * length + offset
        if not self.documents:
            start = position.clamp(max=span.stop - length - 1)
            return start, start + length + 1
        begin, end = find_ends(corpus, position + 1)
        begin, stop = begin.clamp(min=span.start), end.clamp(max=span.stop)
        # END is one more id, at the end of a text.
        last = stop - length - (end > span.stop).long()
        return torch.maximum(torch.minimum(position, last), begin), stop


def find_ends(corpus: Corpus, position: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the ends of texts around positions above 0.

    Args:
        corpus: the corpus.
        position: int64 `(rows,)`.

    Returns:
        The last end before each position, or 0, and the first end at or after it: int64 `(rows,)` each.
    """
    text = torch.searchsorted(corpus.ends, position)
    return torch.where(text > 0, corpus.ends[text - 1], 0), corpus.ends[text]


def find_windows(corpus: Corpus, span: range, seq_len: int, documents: bool) -> tuple[Tensor, Tensor]:
    """Splits a span into windows of up to `seq_len` bytes to predict.

    Returns:
        The start and the stop of each window: int64 `(windows,)` each.
    """
    if not documents:
        # The first byte of a corpus cannot be predicted, because no byte precedes it.
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
    """Yields the windows of a span, which do not overlap, in batches.

    Every byte of the span is a label once. The first byte of a window is predicted from the byte before it alone.

    Args:
        corpus: the corpus to read.
        span: the positions whose bytes are labels.
        seq_len: the longest window.
        batch_size: number of windows of a batch.
        max_bytes: read about this many bytes only, in whole windows that are evenly spaced and always the same.
        documents: end windows at the ends of texts. The first byte of a text is then not predicted, since no byte of
            the text precedes it.
        part: `(i, n)` yields the i-th of n parts. All parts have the same number of batches.

    Yields:
        Ids and labels, int64 `(batch, seq)` each, with `seq` at most `seq_len`. After the end of a window the id is 0
        and the label is `IGNORED`.

    Raises:
        ValueError: the span has no byte to predict, so that it has no score.
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
        # A part without a window left yields an empty one.
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
    """Reads evenly spaced pieces of a span, for a model that reads each as a stream.

    Args:
        corpus: the corpus to read.
        span: the positions to read.
        rows: number of pieces. Fewer are read from a span that is too short.
        size: number of bytes of all pieces together.

    Returns:
        Ids, int64 `(rows, size // rows)`.
    """
    # A row needs at least two bytes, to predict one from the other.
    rows = max(min(rows, len(span) // 2), 1)
    length = min(size, len(span)) // rows
    start = torch.tensor([span.start + i * (len(span) // rows) for i in range(rows)])
    return corpus.read(start, start + length, length, pad=0)
