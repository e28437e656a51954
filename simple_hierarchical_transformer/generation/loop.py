"""The generation loop."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int
from ..memory import State
from .captured import CapturedSteps, pays_to_capture
from .prompts import NUM_BYTES, Decoded, Prompt, PromptLike, check_prompt, check_stops
from .protocol import StatefulModel
from .sampler import Sampler

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Sampling(TypedDict, total=False):
    """Settings of `generate` that are usually given by keyword, for type checkers."""

    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop_ids: int | Iterable[int] | Tensor | None
    generator: torch.Generator | None
    use_cache: bool
    state: State | None
    stop: str | bytes | Iterable[str | bytes] | None
    repetition_penalty: float
    max_new_tokens: int | None


class Settings(Sampling, total=False):
    """All settings of `stream`. `generate` also has `return_state`."""

    temperature: float
    filter_thres: float


class Reader:
    """Feeds ids to a model and keeps what the next call needs: the state or, without a cache, all ids so far.

    Args:
        model: the model to read with.
        ids: the first ids to read, int64 `(batch, n)`.
        state: the state before these ids. None is the beginning of a sequence.
        use_cache: whether to keep a state. If not, each read starts again at position 0.
        steps: an upper bound on how many reads of a single id will follow.
        watched: whether the caller may change the model between two reads.
    """

    def __init__(
        self,
        model: StatefulModel,
        ids: Tensor,
        state: State | None = None,
        *,
        use_cache: bool = True,
        steps: int = 0,
        watched: bool = False,
    ) -> None:
        self.model: Callable[..., tuple[Tensor, State]] = partial(model, return_state=True)
        if takes_logits_to_keep(model):
            self.model = partial(self.model, logits_to_keep=1)
        self.state = state
        self.steps = steps
        self.captured: CapturedSteps | None = None
        if use_cache and pays_to_capture(model, steps):
            self.captured = CapturedSteps(model, watched=watched)
        self.unread: Tensor | None = ids
        """Ids `(batch, n)` that the model reads next."""
        self.seen: Tensor | None = None
        """Without a cache, all ids read so far, `(batch, n)`."""
        self.use_cache = use_cache

    def read(self) -> Tensor:
        """Reads the unread ids. Returns the logits of the id that follows, `(batch, num_tokens)`."""
        assert self.unread is not None
        if self.captured is not None and self.state is not None and self.unread.shape[1] == 1:
            logits, state = self.captured(self.unread, self.state, self.steps)
        elif self.use_cache:
            logits, state = self.model(self.unread, state=self.state)
        else:
            seen = self.unread if self.seen is None else torch.cat((self.seen, self.unread), dim=1)
            logits, state = self.model(seen)
            self.seen = seen
        # assigned together, so that no id is read twice if anything fails later
        self.state, self.unread = state, None
        return logits[:, -1]

    @torch.no_grad()
    def finish(self) -> State:
        """Reads the unread ids, if there are any, and returns the state after them."""
        if self.unread is not None:
            self.read()
        assert self.state is not None
        return self.state


def takes_logits_to_keep(model: StatefulModel) -> bool:
    """Whether the model's `forward` names the argument `logits_to_keep`.

    `**kwargs` do not count: a wrapper may pass them to a model that does not accept the argument.
    """
    try:
        forward = getattr(model, 'forward', model)
        outer = signature(forward, follow_wrapped=False).parameters
        passes = 'logits_to_keep' in outer or any(each.kind is each.VAR_KEYWORD for each in outer.values())
        return passes and 'logits_to_keep' in signature(forward).parameters
    except (TypeError, ValueError):
        # functions of extension modules may have no signature
        return False


class Generation(NamedTuple):
    """The checked arguments of `generate` and `stream`."""

    reader: Reader
    """Its unread ids are the prompt, up to the length of the shortest row."""
    prompt: Prompt
    seq_len: int
    """The maximum number of new ids of each row."""
    sampler: Sampler
    stops: Sequence[Sequence[int]]
    """The sequences of ids that end a row."""


def prepare(
    model: StatefulModel,
    prompt: PromptLike,
    seq_len: int | None,
    *,
    stop_ids: object = None,
    stop: object = None,
    max_new_tokens: int | None = None,
    use_cache: bool = True,
    state: State | None = None,
    watched: bool = False,
    **sampling: Any,
) -> Generation:
    """Checks the arguments of `generate`. Raises ValueError if one is not allowed."""
    prompts = check_prompt(prompt, model.num_tokens, model.token_emb.weight.device)
    if (seq_len is None) == (max_new_tokens is None):
        raise ValueError(
            f'seq_len or max_new_tokens must be given, and not both, got {seq_len!r} and {max_new_tokens!r}'
        )
    name, length = ('seq_len', seq_len) if max_new_tokens is None else ('max_new_tokens', max_new_tokens)
    length = check_int(name, length, 0)
    stops = check_stops(stop_ids, stop, model.num_tokens, text=prompts.text is not None)
    if not isinstance(use_cache, bool):
        raise ValueError(f'use_cache must be True or False, got {use_cache!r}')
    if state is not None:
        if not use_cache:
            raise ValueError('use_cache = False reads from position 0, so it takes no state')
        model.check_state(state, torch.stack([row[:1] for row in prompts.rows]))
    sampler = Sampler(**sampling)

    shortest = min(map(len, prompts.rows))
    first = torch.stack([row[:shortest] for row in prompts.rows])
    steps = max(map(len, prompts.rows)) - shortest + length
    reader = Reader(model, first, state, use_cache=use_cache, steps=steps, watched=watched)
    return Generation(reader, prompts, length, sampler, stops)


def find_stops(new: Tensor, stops: Tensor) -> Tensor:
    """Whether each row ends with one of the stops.

    Args:
        new: the last ids of each row, int64 `(batch, n)`.
        stops: int64 `(stops, n)`, where -1 matches every id.

    Returns:
        bool `(batch,)`.
    """
    return ((new[:, None] == stops) | (stops == -1)).all(dim=-1).any(dim=-1)


def draw(generation: Generation) -> Generator[tuple[Tensor, Tensor | None], None, None]:
    """Draws ids until each row has `seq_len` new ones or ends with a stop.

    All rows start at the end of the shortest prompt. In rows with longer prompts, the ids of the prompt replace the
    drawn ids until it ends. So each row gets the ids that it would get alone.

    Yields, for each step, the ids `(batch,)` and a bool mask `(batch,)` of the rows for which the id is new. The mask
    is None if it is new for all rows. A stopped row repeats its last id. The last ids are not read.
    """
    reader, prompts, seq_len, sampler, stops = generation
    rows = prompts.rows
    device = rows[0].device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ends = lengths + seq_len
    shortest, longest = int(lengths.min()), int(lengths.max())
    given = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
    window = max(map(len, stops), default=0)
    endings = torch.tensor([[-1] * (window - len(each)) + list(each) for each in stops], device=device)
    # -2 is not an id: only -1 matches it
    recent = given.new_full((len(rows), window), -2)
    last, seen = given[:, shortest - 1], None

    for at in range(shortest, longest + seq_len):
        logits = reader.read()
        if sampler.repetition_penalty != 1 and seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen = torch.stack([mask.scatter(0, ids, True) for mask, ids in zip(seen, rows, strict=True)])
        ids, fresh = sampler(logits, seen), None
        if stops:
            fresh = ~stopped
        if shortest < longest:
            within = (at >= lengths) & (at < ends)
            fresh = within if fresh is None else within & fresh
        if at < longest:
            ids = torch.where(at < lengths, given[:, at], ids)
        if stops:
            assert fresh is not None
            ids = torch.where(stopped, last, ids)
            recent = torch.where(fresh[:, None], torch.cat((recent[:, 1:], ids[:, None]), dim=1), recent)
            stopped = stopped | (fresh & find_stops(recent, endings))
        if seen is not None:
            seen = seen.scatter(1, ids[:, None], True)
        last, reader.unread = ids, ids[:, None]
        yield ids, fresh
        if stops and bool((stopped if shortest == longest else stopped | (at >= ends - 1)).all()):
            return


def draw_rows(generation: Generation) -> list[Tensor]:
    """The new ids of each row, int64 `(n,)`: `seq_len`, or fewer if the row ended with a stop."""
    steps = list(draw(generation)) if generation.seq_len else []
    if not steps:
        return [row.new_empty(0) for row in generation.prompt.rows]
    ids = torch.stack([ids for ids, _ in steps], dim=1)
    if steps[0][1] is None:
        return list(ids)
    fresh = torch.stack([mask for _, mask in steps if mask is not None], dim=1)
    return [row[mask] for row, mask in zip(ids, fresh, strict=True)]


class Stream:
    """Iterates over the ids of `generate` as they are drawn, int64 `(batch,)` each."""

    def __init__(self, generation: Generation) -> None:
        self.reader = generation.reader
        self.steps = draw(generation)

    def __iter__(self) -> Self:
        return self

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor | None]:
        return next(self.steps)

    def __next__(self) -> Tensor:
        return self.step()[0]

    @property
    def state(self) -> State:
        """The state after the prompt and all ids drawn so far. Reading it ends the stream.

        Raises ValueError if a step failed halfway and left no valid state.
        """
        self.steps.close()
        return self.reader.finish()


class TextStream(Stream):
    """Iterates over the text of `generate` as it is drawn. For several prompts, each item is a list of pieces.

    A piece is never empty. For several prompts, at least one piece of each list is not. Joined, the pieces are what
    `generate` returns. A `str` holds whole characters: a character of several bytes is yielded with its last byte.
    """

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation)
        self.prompt = generation.prompt
        make = codecs.getincrementaldecoder('utf-8')
        self.decoders = [make('replace') for _ in self.prompt.rows] if self.prompt.text is str else None

    # the type depends on the prompt: str, bytes, or a list of either
    def __next__(self) -> Any:
        pieces: Sequence[str | bytes] = []
        while not any(pieces):
            try:
                ids, fresh = self.step()
            except StopIteration:
                # the last character may be incomplete
                pieces = [decoder.decode(b'', final=True) for decoder in self.decoders or ()]
                self.decoders = None
                if any(pieces):
                    break
                raise
            is_new = [True] * len(ids) if fresh is None else fresh.tolist()
            encoded = [
                bytes([i]) if new and i < NUM_BYTES else b'' for i, new in zip(ids.tolist(), is_new, strict=True)
            ]
            pieces = (
                encoded
                if self.decoders is None
                else [decoder.decode(piece) for decoder, piece in zip(self.decoders, encoded, strict=True)]
            )
        return pieces if self.prompt.many else pieces[0]


Generated = Tensor | Decoded


@torch.no_grad()
def generate(
    model: StatefulModel,
    prompt: PromptLike,
    seq_len: int | None = None,
    *,
    return_state: bool = False,
    **settings: Unpack[Settings],
) -> Generated | tuple[Generated, State]:
    """Samples up to `seq_len` new ids after `prompt`. See `Generative.generate`."""
    generation = prepare(model, prompt, seq_len, **settings)
    if return_state and not generation.prompt.equal:
        raise ValueError('prompt must have rows of equal length where return_state is given: a state has one position')
    rows = draw_rows(generation)
    new: Generated
    if generation.prompt.text is not None:
        new = generation.prompt.decode(rows)
    else:
        longest = max(map(len, rows))
        new = torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])
    return (new, generation.reader.finish()) if return_state else new


def stream(
    model: StatefulModel, prompt: PromptLike, seq_len: int | None = None, **settings: Unpack[Settings]
) -> Stream:
    """Yields what `generate` returns as it is drawn. See `Generative.stream`."""
    if unknown := sorted(set(settings) - set(Settings.__annotations__)):
        raise ValueError(f'stream takes the settings of generate except return_state, got {", ".join(unknown)}')
    generation = prepare(model, prompt, seq_len, watched=True, **settings)
    if not generation.prompt.equal:
        raise ValueError('prompt must have rows of equal length: stream yields their ids together')
    return (Stream if generation.prompt.text is None else TextStream)(generation)
