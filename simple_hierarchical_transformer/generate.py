"""Sampling and the generation loop, over any model that answers `logits, state = model(ids, state, return_state)`."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import check_int, check_number, is_int
from .state import State


def check_ids(name: str, ids: Any, num_tokens: int, also: int | None = None) -> Tensor:
    """The ids `(batch, n)` as int64, any integer dtype taken. Refuses others than `[0, num_tokens)` and `also`."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f'{name} must be a tensor of integers, got {getattr(ids, "dtype", type(ids).__name__)}')
    if ids.ndim != 2:
        raise ValueError(f'{name} must have shape (batch, seq), got {tuple(ids.shape)}')
    if 0 in ids.shape:
        raise ValueError(f'{name} must hold at least one token, got shape {tuple(ids.shape)}')
    ids = ids.long()

    # reading values would make an accelerator wait, or break a compiled graph
    if ids.device.type == 'cpu' and not torch.compiler.is_compiling():
        allowed = ids if also is None else ids[ids != also]
        if allowed.numel():
            low, high = (int(value) for value in allowed.aminmax())
            if low < 0 or high >= num_tokens:
                raise ValueError(f'{name} must be in [0, {num_tokens}), got values from {low} to {high}')
    return ids


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


def generate_ids(
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


class Generative:
    """`generate`, `stream` and `score` for a module that answers the state call.

    It has `num_tokens`, `seq_len`, `ignore_index`, `check_state(state, ids)` and `token_emb`.
    """

    @torch.no_grad()
    def generate(
        self: Any,
        prompt: Tensor | Sequence[Tensor],
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        return_state: bool = False,
        state: State | None = None,
    ) -> Any:
        """Samples `seq_len` new ids after `prompt`: `(batch, n)` to `(batch, seq_len)`, without the prompt.

        The prompt is read in one pass, each new id in a step that costs the same however many came before. There
        is no limit to their number.

        Args:
            prompt: ids to go on from, at least one a row; or a list of `(n,)`, prompts of unequal length, each of
                which gets what it would get alone.
            seq_len: how many new ids.
            temperature: divides the logits; 0 takes the likeliest id each time.
            filter_thres: share of the vocabulary, the least likely, that is never drawn; acts only where none of
                the next three is given.
            top_k: draw from that many of the likeliest ids.
            top_p: draw from the likeliest ids that together reach this probability.
            min_p: draw from ids of at least this share of the likeliest one's probability.
            stop_ids: ids that end a row. It is filled up with the one that ended it, and once all rows have ended
                fewer than `seq_len` ids are returned.
            generator: where randomness comes from, for the same ids again.
            use_cache: False reads everything from position 0 at each step: the same ids, slowly.
            return_state: return `(ids, state)`, with a state that has read the prompt and all new ids.
            state: what was read before the prompt. It is consumed.

        Raises:
            ValueError: an empty prompt, or one of the wrong rank, dtype or range; a setting that is not allowed.
        """
        reader, prompts, sampler, stops = self._prepare_generation(
            prompt,
            seq_len,
            temperature=temperature,
            filter_thres=filter_thres,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_ids=stop_ids,
            generator=generator,
            use_cache=use_cache,
            state=state,
        )
        if return_state and len({len(row) for row in prompts}) > 1:
            raise ValueError(
                'prompt must have rows of equal length where return_state is given: a state has one position'
            )

        new = generate_ids(reader, prompts, seq_len, sampler=sampler, stop_ids=stops)
        if not return_state:
            return new
        reader.read(new[:, -1:] if seq_len else torch.stack(prompts))
        return new, reader.state

    def stream(self: Any, prompt: Tensor | Sequence[Tensor], seq_len: int, **settings: Any) -> Stream:
        """The ids of `generate` as they come, `(batch,)` each. Takes its settings but `return_state`.

        What it returns is iterated over; its `state` is the state after the prompt and what came, and ends the stream.

        Raises:
            ValueError: as `generate`; or prompts of unequal length.
        """
        if unknown := sorted(set(settings) - (set(signature(self.generate).parameters) - {'return_state'})):
            raise ValueError(f'stream takes the settings of generate but return_state, got {", ".join(unknown)}')
        reader, prompts, sampler, stops = self._prepare_generation(prompt, seq_len, **settings)
        if len({len(row) for row in prompts}) > 1:
            raise ValueError('prompt must have rows of equal length: stream yields their ids together')
        return Stream(reader, prompts, seq_len, sampler=sampler, stop_ids=stops)

    def _prepare_generation(
        self: Any,
        prompt: Tensor | Sequence[Tensor],
        seq_len: int,
        *,
        stop_ids: Sequence[int] | None = None,
        use_cache: bool = True,
        state: State | None = None,
        **sampling: Any,
    ) -> tuple[Reader, list[Tensor], Sampler, list[int]]:
        """What the generation loop runs on, once all of it is seen to be allowed."""
        if isinstance(prompt, (list, tuple)):
            if not prompt:
                raise ValueError('prompt must hold at least one row, got an empty list')
            prompts = [
                check_ids('prompt', row[None] if isinstance(row, Tensor) else row, self.num_tokens) for row in prompt
            ]
            prompts = [row[0] for row in prompts]
        else:
            prompts = list(check_ids('prompt', prompt, self.num_tokens))

        check_int('seq_len', seq_len, 0)
        stops = list(stop_ids or ())
        for stop in stops:
            if not is_int(stop) or not 0 <= stop < self.num_tokens:
                raise ValueError(f'stop_ids must be in [0, {self.num_tokens}), got {stop!r}')
        if state is not None and not use_cache:
            raise ValueError('use_cache = False reads from position 0, so it takes no state')
        if state is not None:
            self.check_state(state, torch.stack([row[:1] for row in prompts]))

        return Reader(self, state, use_cache=use_cache), prompts, Sampler(**sampling), stops

    @torch.no_grad()
    def score(self: Any, ids: Tensor | bytes, *, chunk_size: int | None = None, return_log_probs: bool = False) -> Any:
        """How many bits the model needs for each id after the first: bits per byte, for a model of bytes.

        One pass with the state carried along, so each id is predicted from all that the model can remember, in
        memory that does not grow with the length.

        Args:
            ids: `(n,)` or `(batch, n)` of any length from 2 up, or bytes.
            chunk_size: how many ids are read at a time, `seq_len` by default. Changes no number.
            return_log_probs: also return the natural logarithm of each id's probability, `(..., n - 1)`.

        Returns a float, or `(float, log_probs)`: the mean over all ids but each row's first and those equal to
        `ignore_index`.

        Raises:
            ValueError: ids of the wrong rank, dtype, length or range, or nothing but ignored ones.
        """
        if isinstance(ids, (bytes, bytearray)):
            ids = torch.frombuffer(bytearray(ids), dtype=torch.uint8) if ids else torch.empty(0, dtype=torch.uint8)
        single = isinstance(ids, Tensor) and ids.ndim == 1
        rows = ids[None] if single else ids
        # chunk by chunk, since a long text of bytes is eight times as large as the ids that are read
        check_ids('ids', rows[:, :2] if isinstance(rows, Tensor) and rows.ndim == 2 else rows, self.num_tokens)
        if rows.shape[1] < 2:
            raise ValueError(f'ids must have at least 2 tokens to predict one from another, got {rows.shape[1]}')
        chunk_size = check_int('chunk_size', self.seq_len if chunk_size is None else chunk_size)

        device = self.token_emb.weight.device
        total, count, state, log_probs = 0.0, 0, None, []
        for begin in range(0, rows.shape[1] - 1, chunk_size):
            window = check_ids('ids', rows[:, begin : begin + chunk_size + 1], self.num_tokens).to(device)
            logits, state = self(window[:, :-1], state=state, return_state=True)
            targets = window[:, 1:]
            picked = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
            picked = picked.gather(-1, targets[..., None])[..., 0]
            counted = targets != self.ignore_index
            # added up on the CPU: not every device has float64
            total -= (picked * counted).cpu().double().sum().item()
            count += int(counted.sum())
            if return_log_probs:
                log_probs.append(picked)

        if not count:
            raise ValueError(f'ids must hold more than ignore_index = {self.ignore_index}, got nothing else to predict')
        bits = total / count / math.log(2)
        if not return_log_probs:
            return bits
        joined = torch.cat(log_probs, dim=1)
        return bits, joined[0] if single else joined
