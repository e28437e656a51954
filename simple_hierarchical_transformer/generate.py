"""Sampling and the generation loop, over any model that answers `logits, state = model(ids, state, return_state)`."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import check_int, check_number


@dataclass(frozen=True)
class Sampler:
    """How the next id is drawn from logits.

    temperature: divides the logits; 0 takes the likeliest id each time.
    top_k: only that many of the likeliest ids.
    top_p: only the likeliest ids that together reach this probability (Holtzman et al. 2019, arXiv 1904.09751).
    min_p: only ids of at least this share of the likeliest one's probability (Nguyen et al. 2024, arXiv 2407.01082).
    filter_thres: where none of these three is given, the share of the vocabulary, the least likely, never drawn.
    generator: where randomness comes from.

    Raises ValueError where a value is not allowed.
    """

    temperature: float = 1.0
    filter_thres: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_number('temperature', self.temperature)
        if self.top_k is not None:
            check_int('top_k', self.top_k)
        if self.filter_thres is None:
            raise ValueError('filter_thres must be between 0 and 1, got None')
        for name in ('filter_thres', 'top_p', 'min_p'):
            value = getattr(self, name)
            if value is not None and (check_number(name, value) > 1 or (name == 'top_p' and value == 0)):
                raise ValueError(
                    f'{name} must be {"above" if name == "top_p" else "between"} 0 and at most 1, got {value!r}'
                )

    def __call__(self, logits: Tensor) -> Tensor:
        """One id a row: `(batch, num_tokens)` to `(batch,)`."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)

        vocabulary = logits.shape[-1]
        kept = min(self.top_k or vocabulary, vocabulary)
        if self.top_k is None and self.top_p is None and self.min_p is None:
            # rounded first: (1 - 0.9) * 30 is a hair off 3, and a ceiling would make a whole id of it
            kept = max(math.ceil(round((1 - self.filter_thres) * vocabulary, 6)), 1)

        values, ids = logits.float().topk(kept, dim=-1)
        # from the likeliest down, so that no temperature above 0 is too small
        exact = torch.float32 if logits.device.type == 'mps' else torch.float64
        probs = ((values - values[:, :1]).to(exact) / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= self.top_p, 0)
        if self.min_p is not None:
            probs = probs.masked_fill(probs < self.min_p * probs[:, :1], 0)
        return ids.gather(-1, torch.multinomial(probs, 1, generator=self.generator)).squeeze(-1)


class Reader:
    """Feeds ids to a model and keeps what it needs to go on: the state, or without a cache all ids from the first."""

    def __init__(self, model: Any, state: Any = None, *, use_cache: bool = True) -> None:
        self.model = model
        self.state = state
        self.seen: Tensor | None = None
        self.use_cache = use_cache

    def read(self, ids: Tensor) -> Tensor:
        """Ids `(batch, n)` to the logits `(batch, num_tokens)` of the id after them."""
        if self.use_cache:
            logits, self.state = self.model(ids, state=self.state, return_state=True)
        else:
            self.seen = ids if self.seen is None else torch.cat((self.seen, ids), dim=1)
            logits, self.state = self.model(self.seen, return_state=True)
        return logits[:, -1]


def stream(
    reader: Reader, prompts: Sequence[Tensor], seq_len: int, *, sampler: Sampler, stop_ids: Sequence[int] = ()
) -> Generator[Tensor, None, None]:
    """Draws ids after prompts, one int64 `(n,)` a row, until each row has `seq_len` or has met one of `stop_ids`.

    Rows begin together, and while a longer prompt lasts, its ids are read in place of what is drawn: so each row
    gets what it would get alone. Yields the ids `(batch,)` that follow the shortest prompt, one step after the
    other; a row that has stopped repeats the id that stopped it. The last ids are not read.
    """
    device = prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    given = torch.stack([F.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
    stops = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    ids = given[:, :shortest]
    for at in range(shortest, longest + seq_len):
        drawn = sampler(reader.read(ids))
        if at < longest:
            drawn = torch.where(at < lengths, given[:, at], drawn)
        if stop_ids:
            drawn = torch.where(stopped, ids[:, -1], drawn)
            stopped |= (at >= lengths) & torch.isin(drawn, stops)
        yield drawn
        if stop_ids and bool((stopped | (at >= lengths + seq_len - 1)).all()):
            return
        ids = drawn[:, None]


class Stream:
    """An iterator over the ids of `stream`, for prompts of equal length, that can tell its state."""

    def __init__(self, reader: Reader, prompts: Sequence[Tensor], seq_len: int, **settings: Any) -> None:
        self.reader = reader
        self.unread: Tensor | None = torch.stack(list(prompts))
        self.steps = stream(reader, prompts, seq_len, **settings)

    def __iter__(self) -> Stream:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        drawn = next(self.steps)
        self.unread = drawn[:, None]
        return drawn

    @property
    @torch.no_grad()
    def state(self) -> Any:
        """The state after the prompt and all ids that came. It ends the stream: what reads on from it is another."""
        self.steps.close()
        if self.unread is not None:
            self.reader.read(self.unread)
            self.unread = None
        return self.reader.state


def generate(
    reader: Reader, prompts: Sequence[Tensor], seq_len: int, *, sampler: Sampler, stop_ids: Sequence[int] = ()
) -> Tensor:
    """The new ids of each row, `(batch, seq_len)`, or fewer where all rows stopped before.

    A row that stopped earlier than others is filled up with the id that stopped it.
    """
    shortest = min(map(len, prompts))
    steps = list(stream(reader, prompts, seq_len, sampler=sampler, stop_ids=stop_ids)) if seq_len else []
    if not steps:
        return prompts[0].new_empty((len(prompts), 0), dtype=torch.long)

    drawn = torch.stack(steps, dim=1)
    rows = []
    for row, prompt in zip(drawn, prompts, strict=True):
        new = row[len(prompt) - shortest :][:seq_len]
        ends = [i for i, id in enumerate(new.tolist()) if id in stop_ids] if stop_ids else []
        rows.append(new[: ends[0] + 1] if ends else new)

    longest = max(map(len, rows))
    return torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])
