"""Sampling and the generation loop, over any model that answers `logits, state = model(ids, state, return_state)`."""

from __future__ import annotations

import codecs
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int, check_int_list, check_number, is_int, plain
from ..memory import State
from ..ops.tracing import is_traced
from .captured import CapturedSteps, pays_to_capture

NUM_BYTES = 256
# of the vocabularies whose ids are bytes: with none besides, or also with an end of text, and with what fills up
BYTE_VOCABULARIES = range(NUM_BYTES, NUM_BYTES + 3)
TEXT = (str, bytes, bytearray)


if TYPE_CHECKING:
    from typing_extensions import Unpack

Text = TypeVar('Text', str, bytes)
Self = TypeVar('Self', bound='Stream')
Ids = Tensor | list[Tensor] | tuple[Tensor, ...] | list[int] | list[list[int]]


class Sampling(TypedDict, total=False):
    """Further settings of `generate`, for type checkers."""

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
    """The settings of `stream`, likewise."""

    temperature: float
    filter_thres: float


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
    if ids.device.type == 'cpu' and not is_traced():
        allowed = ids if also is None else ids[ids != also]
        if allowed.numel():
            low, high = (int(value) for value in allowed.aminmax())
            if low < 0 or high >= num_tokens:
                raise ValueError(f'{name} must be in [0, {num_tokens}), got values from {low} to {high}')
    return ids


def as_tensor(value: Any) -> Any:
    """An array or a sequence of numbers as a tensor. What cannot be one comes back as it is: `check_ids` refuses it."""
    if isinstance(value, (Tensor, *TEXT)):
        return value
    try:
        if hasattr(value, '__array__'):
            # a copy: a tensor can share neither arrays that are read-only nor such as run backwards
            return torch.as_tensor(value.copy())
        return torch.tensor(plain(value)) if isinstance(value, Sequence) else value
    except (TypeError, ValueError, RuntimeError):
        return value


def as_bytes(name: str, text: str | bytes | bytearray) -> Tensor:
    """The bytes of a text, UTF-8 where it is a str: uint8 `(n,)`."""
    try:
        # what Python could not decode of a command line or a file name is encoded as it was
        held = text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(f'{name} must be text that UTF-8 can encode: {error}') from error
    return torch.frombuffer(bytearray(held), dtype=torch.uint8) if held else torch.empty(0, dtype=torch.uint8)


def check_text(name: str, text: str | bytes | bytearray, num_tokens: int) -> Tensor:
    """The bytes of a text as ids `(n,)`. Refused where ids are no bytes."""
    if num_tokens not in BYTE_VOCABULARIES:
        raise ValueError(f'{name} can be text only where num_tokens is 256, 257 or 258, and it is {num_tokens}')
    return as_bytes(name, text).long()


class Prompt(NamedTuple):
    """What generation goes on from."""

    rows: list[Tensor]
    """int64 `(n,)` each."""
    text: type | None
    """`str` or `bytes`, where what comes is to be text, too."""
    many: bool
    """Whether it was a sequence of prompts."""

    @property
    def equal(self) -> bool:
        """Whether all rows are of one length."""
        return len({len(row) for row in self.rows}) == 1

    def decode(self, rows: Sequence[Tensor]) -> Any:
        """New ids of each row as text. Bytes that are no UTF-8 become U+FFFD, ids that are no bytes nothing."""
        texts = [bytes(i for i in row.tolist() if i < NUM_BYTES) for row in rows]
        decoded = [text.decode('utf-8', 'replace') for text in texts] if self.text is str else texts
        return decoded if self.many else decoded[0]


def check_prompt(prompt: Any, num_tokens: int, device: torch.device) -> Prompt:
    """A prompt of any kind that `generate` takes. What is no tensor goes to `device`."""
    many = isinstance(prompt, Sequence) and not isinstance(prompt, TEXT)
    if many and not prompt:
        raise ValueError('prompt must hold at least one row, got an empty list')
    rows = list(prompt) if many else [prompt]
    if any(isinstance(row, TEXT) for row in rows):
        kinds = {str if isinstance(row, str) else bytes if isinstance(row, TEXT) else type(row) for row in rows}
        if len(kinds) > 1:
            names = sorted(kind.__name__ for kind in kinds)
            raise ValueError(f'prompt must hold rows of one kind, got {" and ".join(names)}')
        encoded = [check_ids('prompt', check_text('prompt', row, num_tokens)[None], num_tokens) for row in rows]
        return Prompt([ids[0].to(device) for ids in encoded], kinds.pop(), many)

    def ids(value: Any, row: bool) -> Tensor:
        found = as_tensor(value)
        if isinstance(found, Tensor) and not isinstance(value, Tensor):
            found = found.to(device)
        return check_ids('prompt', found[None] if row and isinstance(found, Tensor) else found, num_tokens)

    if many and not all(map(is_int, rows)):
        return Prompt([ids(row, True)[0] for row in rows], None, True)
    return Prompt(list(ids(prompt, False)), None, False)


def check_stops(stop_ids: Any, stop: Any, num_tokens: int, *, text: bool) -> list[tuple[int, ...]]:
    """The sequences of ids that end a row; where it is text, any id that is no byte does."""
    found = [] if stop_ids is None else check_int_list('stop_ids', stop_ids, num_tokens)
    stops: list[tuple[int, ...]] = [(each,) for each in found]
    if text:
        stops += [(each,) for each in range(NUM_BYTES, num_tokens)]
    if stop is None:
        return stops
    strings = [stop] if isinstance(stop, TEXT) else stop
    if not isinstance(strings, Iterable) or isinstance(strings, (Tensor, Mapping)):
        raise ValueError(f'stop must be a str, bytes, or several of them, got {stop!r}')
    for string in strings:
        if not isinstance(string, TEXT) or not string:
            raise ValueError(f'stop must be strings or bytes that are not empty, got {string!r}')
        stops.append(tuple(check_text('stop', string, num_tokens).tolist()))
    return stops


@dataclass(frozen=True)
class Sampler:
    """How the next id is drawn from logits.

    temperature: divides the logits; 0 takes the likeliest id each time.
    top_k: only that many of the likeliest ids.
    top_p: only the likeliest ids that together reach this probability (Holtzman et al. 2019, arXiv 1904.09751).
    min_p: only ids of at least this share of the likeliest one's probability (Nguyen et al. 2024, arXiv 2407.01082).
    filter_thres: where none of these three is given, the share of the vocabulary, the least likely, never drawn.
    generator: where randomness comes from.
    repetition_penalty: divides the logits above 0 of ids that were seen, and multiplies those below 0 (CTRL, Keskar et
        al. 2019, arXiv 1909.05858, section 4.1). 1 changes nothing.

    Raises ValueError where a value is not allowed.
    """

    temperature: float = 1.0
    filter_thres: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_number('temperature', self.temperature)
        if not isinstance(self.generator, (torch.Generator, type(None))):
            raise ValueError(f'generator must be a torch.Generator, got {self.generator!r}')
        if not check_number('repetition_penalty', self.repetition_penalty):
            raise ValueError('repetition_penalty must be above 0, got 0')
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

    def __call__(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """One id a row: `(batch, num_tokens)` to `(batch,)`.

        `seen`, bool of the shape of logits, are the ids that `repetition_penalty` is for.

        Raises ValueError where the largest logit of a row is not finite.
        """
        if seen is not None and self.repetition_penalty != 1:
            values = logits.float()
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(values > 0, values / penalty, values * penalty), values)
        if self.temperature == 0:
            check_largest(logits)
            return logits.argmax(dim=-1)

        vocabulary = logits.shape[-1]
        kept = min(vocabulary if self.top_k is None else int(self.top_k), vocabulary)
        if self.top_k is None and self.top_p is None and self.min_p is None:
            # rounded first: (1 - 0.9) * 30 is a hair off 3, and a ceiling would make a whole id of it
            kept = max(math.ceil(round((1 - self.filter_thres) * vocabulary, 6)), 1)

        values, ids = logits.float().topk(kept, dim=-1)
        check_largest(values[:, :1])
        # from the likeliest down, so that no temperature above 0 is too small
        exact = torch.float32 if logits.device.type == 'mps' else torch.float64
        probs = ((values - values[:, :1]).to(exact) / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= self.top_p, 0)
        if self.min_p is not None:
            probs = probs.masked_fill(probs < self.min_p * probs[:, :1], 0)
        # what torch.multinomial computes, without its checks, for which a GPU's host waits twice
        waits = torch.empty_like(probs).exponential_(generator=self.generator)
        return ids.gather(-1, (probs / waits).argmax(dim=-1, keepdim=True)).squeeze(-1)


def check_largest(logits: Tensor) -> None:
    """Refuses logits `(batch, n)` where the largest of a row, for which any NaN counts, is not finite."""
    # one number says so for all, but where ids are ruled out by -inf or the sum is too large
    if math.isfinite(logits.sum(dtype=torch.float32).item()):
        return
    largest = logits.amax(dim=-1)
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f'logits must be finite to draw an id from, and the largest of row {row} is {largest[row].item()}: '
            'the weights or the state are not finite, or too large for their dtype'
        )


class Reader:
    """Feeds ids to a model and keeps what it needs to go on: the state, or without a cache all ids from the first."""

    def __init__(self, model: Any, ids: Tensor, state: Any = None, *, use_cache: bool = True, steps: int = 0) -> None:
        self.model = model
        self.state = state
        self.steps = steps
        """How many single ids will be read after these, at most."""
        self.watched = False
        """Whether the model may be changed between steps: others run in between."""
        self.captured = CapturedSteps(model) if use_cache and pays_to_capture(model, steps) else None
        self.unread: Tensor | None = ids
        """Ids `(batch, n)` that the model has yet to read."""
        self.seen: Tensor | None = None
        self.use_cache = use_cache

    def read(self) -> Tensor:
        """Has the model read what it has yet to: the logits `(batch, num_tokens)` of the id after."""
        assert self.unread is not None
        if self.captured is not None and self.state is not None and self.unread.shape[1] == 1:
            logits, state = self.captured(self.unread, self.state, self.steps, self.watched)
        elif self.use_cache:
            logits, state = self.model(self.unread, state=self.state, return_state=True)
        else:
            seen = self.unread if self.seen is None else torch.cat((self.seen, self.unread), dim=1)
            logits, state = self.model(seen, return_state=True)
            self.seen = seen
        # together, so that whatever fails later, no id is read twice
        self.state, self.unread = state, None
        return logits[:, -1]

    @torch.no_grad()
    def finish(self) -> Any:
        """The state after all ids."""
        if self.unread is not None:
            self.read()
        return self.state


def find_stops(new: Tensor, stops: Tensor) -> Tensor:
    """Which rows end with one of the stops: `(batch, n)`, `(stops, n)`, where -1 fits any id, to bool `(batch,)`."""
    return ((new[:, None] == stops) | (stops == -1)).all(dim=-1).any(dim=-1)


def draw(
    reader: Reader, prompts: Sequence[Tensor], seq_len: int, *, sampler: Sampler, stops: Sequence[Sequence[int]] = ()
) -> Generator[tuple[Tensor, Tensor | None], None, None]:
    """Draws ids after prompts, one int64 `(n,)` a row, until each row has `seq_len` or has met one of `stops`.

    Rows begin together, and while a longer prompt lasts, its ids are read in place of what is drawn: so each row
    gets what it would get alone. Yields the ids `(batch,)` that follow the shortest prompt, one step after the other,
    and which of them are new to their rows, `(batch,)`, or None where all are. A row that has stopped repeats its last
    id. The last ids are not read.
    """
    device = prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    given = torch.stack([F.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    reach = max(map(len, stops), default=0)
    endings = torch.tensor([[-1] * (reach - len(each)) + list(each) for each in stops], device=device)
    # -2 is no id, and nothing fits it but -1
    new = given.new_full((len(prompts), reach), -2)
    last, seen = given[:, shortest - 1], None

    for at in range(shortest, longest + seq_len):
        logits = reader.read()
        if sampler.repetition_penalty != 1 and seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen = torch.stack([row.scatter(0, ids, True) for row, ids in zip(seen, prompts, strict=True)])
        ids, fresh = sampler(logits, seen), None
        if shortest < longest or stops:
            fresh = (at >= lengths) & (at < lengths + seq_len) & ~stopped
        if at < longest:
            ids = torch.where(at < lengths, given[:, at], ids)
        if stops:
            assert fresh is not None
            ids = torch.where(stopped, last, ids)
            new = torch.where(fresh[:, None], torch.cat((new[:, 1:], ids[:, None]), dim=1), new)
            stopped = stopped | (fresh & find_stops(new, endings))
        if seen is not None:
            seen = seen.scatter(1, ids[:, None], True)
        last, reader.unread = ids, ids[:, None]
        yield ids, fresh
        if stops and bool((stopped | (at >= lengths + seq_len - 1)).all()):
            return


class Stream:
    """An iterator over the ids of `generate` as they come, `(batch,)` each, that can tell its state."""

    def __init__(self, reader: Reader, prompt: Prompt, seq_len: int, **settings: Any) -> None:
        self.reader = reader
        reader.watched = True
        self.steps = draw(reader, prompt.rows, seq_len, **settings)

    def __iter__(self: Self) -> Self:
        return self

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor | None]:
        return next(self.steps)

    def __next__(self) -> Tensor:
        return self.step()[0]

    @property
    def state(self) -> State:
        """The state after the prompt and all ids that came. It ends the stream: what reads on from it is another.

        Raises ValueError where a step failed halfway and left none.
        """
        self.steps.close()
        return self.reader.finish()


class TextStream(Stream):
    """An iterator over the text of `generate` as it comes; of several prompts, over lists with a piece for each.

    Pieces are never empty; of several prompts, one of them is not. Together they are what `generate` returns: a
    character of several bytes comes with its last one.
    """

    def __init__(self, reader: Reader, prompt: Prompt, seq_len: int, **settings: Any) -> None:
        super().__init__(reader, prompt, seq_len, **settings)
        self.prompt = prompt
        make = codecs.getincrementaldecoder('utf-8')
        self.decoders = [make('replace') for _ in prompt.rows] if prompt.text is str else None

    def __next__(self) -> Any:
        pieces: list[Any] = []
        while not any(pieces):
            try:
                ids, fresh = self.step()
            except StopIteration:
                # a character that is cut off
                pieces = [decoder.decode(b'', final=True) for decoder in self.decoders or ()]
                self.decoders = None
                if any(pieces):
                    break
                raise
            new = [True] * len(ids) if fresh is None else fresh.tolist()
            pieces = [
                bytes([i]) if is_new and i < NUM_BYTES else b'' for i, is_new in zip(ids.tolist(), new, strict=True)
            ]
            if self.decoders is not None:
                pieces = [decoder.decode(piece) for decoder, piece in zip(self.decoders, pieces, strict=True)]
        return pieces if self.prompt.many else pieces[0]


def draw_rows(reader: Reader, prompts: Sequence[Tensor], seq_len: int, **settings: Any) -> list[Tensor]:
    """The new ids of each row, `(seq_len,)`, or up to the end of what stopped it."""
    steps = list(draw(reader, prompts, seq_len, **settings)) if seq_len else []
    if not steps:
        return [prompt.new_empty(0) for prompt in prompts]
    ids = torch.stack([ids for ids, _ in steps], dim=1)
    if steps[0][1] is None:
        return list(ids)
    fresh = torch.stack([each for _, each in steps if each is not None], dim=1)
    return [row[each] for row, each in zip(ids, fresh, strict=True)]


class Generation(NamedTuple):
    """What `generate` and `stream` run on, once all of it is seen to be allowed."""

    reader: Reader
    prompt: Prompt
    seq_len: int
    settings: dict[str, Any]


class Generative:
    """`generate`, `stream` and `score` for a module that answers the state call.

    It has `num_tokens`, `seq_len`, `ignore_index`, `check_state(state, ids)` and `token_emb`.
    """

    @overload
    def generate(
        self,
        prompt: Text,
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[False] = False,
        **settings: Unpack[Sampling],
    ) -> Text: ...
    @overload
    def generate(
        self,
        prompt: Text,
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[True],
        **settings: Unpack[Sampling],
    ) -> tuple[Text, State]: ...
    @overload
    def generate(
        self,
        prompt: list[Text],
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[False] = False,
        **settings: Unpack[Sampling],
    ) -> list[Text]: ...
    @overload
    def generate(
        self,
        prompt: list[Text],
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[True],
        **settings: Unpack[Sampling],
    ) -> tuple[list[Text], State]: ...
    @overload
    def generate(
        self,
        prompt: Ids,
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[False] = False,
        **settings: Unpack[Sampling],
    ) -> Tensor: ...
    @overload
    def generate(
        self,
        prompt: Ids,
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[True],
        **settings: Unpack[Sampling],
    ) -> tuple[Tensor, State]: ...
    @torch.no_grad()
    def generate(
        self: Any,
        prompt: Tensor | Sequence[Any] | str | bytes,
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_ids: int | Iterable[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        return_state: bool = False,
        state: State | None = None,
        *,
        stop: str | bytes | Iterable[str | bytes] | None = None,
        repetition_penalty: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> Any:
        """Samples `seq_len` new ids after `prompt`: `(batch, n)` to `(batch, seq_len)`, without the prompt.

        The prompt is read in one pass, each new id in a step that costs the same however many came before. There
        is no limit to their number.

        Where ids are bytes (`num_tokens` of 256 to 258), a prompt may be text. What comes back is of its kind: a `str`
        for a `str`, with U+FFFD for bytes that are no UTF-8; `bytes` for `bytes`; a list for a list of either. A row
        of text ends at an id that is no byte, such as the end of text that train.py teaches with `--documents`, and
        has no filling.

        Args:
            prompt: ids to go on from, at least one a row; or a list of `(n,)`, prompts of unequal length, each of
                which gets what it would get alone; or text, or a list of texts. Arrays and lists of ints count as
                tensors.
            seq_len: how many new ids.
            temperature: divides the logits; 0 takes the likeliest id each time.
            filter_thres: share of the vocabulary, the least likely, that is never drawn; acts only where none of
                the next three is given.
            top_k: draw from that many of the likeliest ids.
            top_p: draw from the likeliest ids that together reach this probability.
            min_p: draw from ids of at least this share of the likeliest one's probability.
            stop_ids: an id that ends a row, or several: ints, an array or a tensor. A row is filled up with its last
                id, and once all rows have ended fewer than `seq_len` ids are returned.
            generator: where randomness comes from, for the same ids again.
            use_cache: False reads everything from position 0 at each step: the same ids, slowly.
            return_state: also return the state after the prompt and all new ids, to go on from. Only for rows of
                equal length.
            state: what was read before the prompt. It is consumed.
            stop: text that ends a row, or several, where ids are bytes. It is looked for in what is new, and is the
                last of the row, as an id of `stop_ids` is.
            repetition_penalty: makes ids of the prompt and of what came after it less likely, the larger it is above 1
                (CTRL, Keskar et al. 2019, arXiv 1909.05858, section 4.1, where it is 1.2). What a `state` has read
                does not count.
            max_new_tokens: another name of `seq_len`.

        Raises:
            ValueError: an empty prompt, or one of the wrong rank, dtype or range, or text where ids are no bytes; a
                setting that is not allowed; logits that are not finite.
        """
        reader, prompts, length, settings = self._prepare_generation(
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
            stop=stop,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
        )
        if return_state and not prompts.equal:
            raise ValueError(
                'prompt must have rows of equal length where return_state is given: a state has one position'
            )

        rows = draw_rows(reader, prompts.rows, length, **settings)
        new: Any
        if prompts.text is not None:
            new = prompts.decode(rows)
        else:
            longest = max(map(len, rows))
            new = torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])
        return (new, reader.finish()) if return_state else new

    @overload
    def stream(self, prompt: Ids, seq_len: int | None = None, **settings: Unpack[Settings]) -> Stream: ...
    @overload
    def stream(
        self, prompt: str | bytes | list[str] | list[bytes], seq_len: int | None = None, **settings: Unpack[Settings]
    ) -> TextStream: ...
    def stream(
        self: Any, prompt: Tensor | Sequence[Any] | str | bytes, seq_len: int | None = None, **settings: Any
    ) -> Stream:
        """What `generate` returns, as it comes: ids, `(batch,)` each, or pieces of text where the prompt is text.

        Takes the settings of `generate` but `return_state`. What it returns is iterated over; its `state` is the state
        after the prompt and what came, and ends the stream.

        A piece of text is a `str` of whole characters, or `bytes`, and never empty: joined they are what `generate`
        returns. Of a list of prompts, each step is a list with a piece for each, of which some may be empty.

        Raises:
            ValueError: as `generate`; or prompts of unequal length.
        """
        if unknown := sorted(set(settings) - (set(signature(self.generate).parameters) - {'return_state'})):
            raise ValueError(f'stream takes the settings of generate but return_state, got {", ".join(unknown)}')
        reader, prompts, length, loop = self._prepare_generation(prompt, seq_len, **settings)
        if not prompts.equal:
            raise ValueError('prompt must have rows of equal length: stream yields their ids together')
        return (Stream if prompts.text is None else TextStream)(reader, prompts, length, **loop)

    def _prepare_generation(
        self: Any,
        prompt: Any,
        seq_len: int | None,
        *,
        stop_ids: Any = None,
        stop: Any = None,
        max_new_tokens: int | None = None,
        use_cache: bool = True,
        state: State | None = None,
        **sampling: Any,
    ) -> Generation:
        """Raises ValueError where anything is not allowed."""
        prompts = check_prompt(prompt, self.num_tokens, self.token_emb.weight.device)
        if (seq_len is None) == (max_new_tokens is None):
            raise ValueError(
                f'seq_len or max_new_tokens must be given, and not both, got {seq_len!r} and {max_new_tokens!r}'
            )
        length = (
            check_int('seq_len', seq_len, 0)
            if max_new_tokens is None
            else check_int('max_new_tokens', max_new_tokens, 0)
        )
        stops = check_stops(stop_ids, stop, self.num_tokens, text=prompts.text is not None)
        if not isinstance(use_cache, bool):
            raise ValueError(f'use_cache must be True or False, got {use_cache!r}')
        if state is not None and not use_cache:
            raise ValueError('use_cache = False reads from position 0, so it takes no state')
        if state is not None:
            self.check_state(state, torch.stack([row[:1] for row in prompts.rows]))

        shortest = min(map(len, prompts.rows))
        first = torch.stack([row[:shortest] for row in prompts.rows])
        steps = max(map(len, prompts.rows)) - shortest + length
        reader = Reader(self, first, state, use_cache=use_cache, steps=steps)
        return Generation(reader, prompts, length, dict(sampler=Sampler(**sampling), stops=stops))

    @overload
    def score(
        self, ids: Tensor | bytes, *, chunk_size: int | None = None, return_log_probs: Literal[False] = False
    ) -> float: ...
    @overload
    def score(
        self, ids: Tensor | bytes, *, chunk_size: int | None = None, return_log_probs: Literal[True]
    ) -> tuple[float, Tensor]: ...
    @torch.no_grad()
    def score(
        self: Any,
        ids: Tensor | Sequence[Any] | bytes | str,
        *,
        chunk_size: int | None = None,
        return_log_probs: bool = False,
    ) -> Any:
        """How many bits the model needs for each id after the first: bits per byte, for a model of bytes.

        One pass with the state carried along, so each id is predicted from all that the model can remember, in
        memory that does not grow with the length.

        Args:
            ids: `(n,)` or `(batch, n)` of any length from 2 up, as a tensor, an array or a list; or text, as bytes or
                a str.
            chunk_size: how many ids are read at a time, `seq_len` by default. Changes no number.
            return_log_probs: also return the natural logarithm of each id's probability, `(..., n - 1)`.

        Returns a float, or `(float, log_probs)`: the mean over all ids but each row's first and those equal to
        `ignore_index`.

        Raises:
            ValueError: ids of the wrong rank, dtype, length or range, or nothing but ignored ones.
        """
        ids = as_bytes('ids', ids) if isinstance(ids, TEXT) else as_tensor(ids)
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
