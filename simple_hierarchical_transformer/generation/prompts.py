"""Prompts, texts and stop sequences as tensors of ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_int_list, is_int, plain
from ..ops.tracing import is_traced

NUM_BYTES = 256
# sizes of byte vocabularies: bytes only, bytes and an end of text, bytes with an end of text and padding
BYTE_VOCABULARIES = range(NUM_BYTES, NUM_BYTES + 3)
TEXT = (str, bytes, bytearray)

PromptLike = Tensor | str | bytes | Sequence[Any]
"""A prompt: ids as a tensor, an array or nested sequences; a text; or a list of texts or of rows of ids."""
Decoded = str | bytes | Sequence[str | bytes]


def check_ids(name: str, ids: object, num_tokens: int, also: int | None = None) -> Tensor:
    """Checks ids `(batch, n)` of any integer dtype and returns them as int64.

    Values are checked only on the CPU. On other devices the host would have to wait for them.

    Args:
        name: the argument that errors name.
        ids: the ids to check.
        num_tokens: ids must be in `[0, num_tokens)`.
        also: one more id that is allowed.

    Raises:
        ValueError: `ids` has the wrong type, dtype or shape, is empty, or holds a value that is not allowed.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f'{name} must be a tensor of integers, got {getattr(ids, "dtype", type(ids).__name__)}')
    if ids.ndim != 2:
        raise ValueError(f'{name} must have shape (batch, seq), got {tuple(ids.shape)}')
    if 0 in ids.shape:
        raise ValueError(f'{name} must hold at least one token, got shape {tuple(ids.shape)}')
    ids = ids.long()

    # reading values would also cause a graph break in compiled code
    if ids.device.type == 'cpu' and not is_traced():
        allowed = ids if also is None else ids[ids != also]
        if allowed.numel():
            low, high = (int(value) for value in allowed.aminmax())
            if low < 0 or high >= num_tokens:
                raise ValueError(f'{name} must be in [0, {num_tokens}), got values from {low} to {high}')
    return ids


def as_tensor(value: object) -> object:
    """Converts an array or a sequence of numbers to a tensor.

    Returns any other value unchanged, for `check_ids` to refuse.
    """
    if isinstance(value, (Tensor, *TEXT)):
        return value
    try:
        if hasattr(value, '__array__') and hasattr(value, 'copy'):
            # tensors cannot share the memory of read-only arrays, nor of arrays with negative strides
            return torch.as_tensor(value.copy())
        return torch.tensor(plain(value)) if isinstance(value, Sequence) else value
    except (TypeError, ValueError, RuntimeError):
        return value


def as_bytes(name: str, text: str | bytes | bytearray) -> Tensor:
    """The bytes of a text as uint8 `(n,)`. A str is encoded as UTF-8.

    Raises ValueError if UTF-8 cannot encode the text.
    """
    try:
        # surrogateescape restores bytes of a command line or a file name that Python could not decode
        encoded = text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(f'{name} must be text that UTF-8 can encode: {error}') from error
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else torch.empty(0, dtype=torch.uint8)


def check_text(name: str, text: str | bytes | bytearray, num_tokens: int) -> Tensor:
    """The bytes of a text as ids, int64 `(n,)`.

    Raises ValueError if ids of this vocabulary are not bytes.
    """
    if num_tokens not in BYTE_VOCABULARIES:
        raise ValueError(f'{name} can be text only if num_tokens is 256, 257 or 258, got {num_tokens}')
    return as_bytes(name, text).long()


class Prompt(NamedTuple):
    """The rows that generation continues."""

    rows: list[Tensor]
    """The ids of each row, int64 `(n,)`."""
    text: type | None
    """The type of the output if the prompt is text: `str` or `bytes`. None for ids."""
    many: bool
    """Whether the prompt is a list of prompts."""

    @property
    def equal(self) -> bool:
        """Whether all rows have the same length."""
        return len({len(row) for row in self.rows}) == 1

    def decode(self, rows: Sequence[Tensor]) -> Decoded:
        """Decodes the new ids of each row, `(n,)`, to text of the prompt's type.

        Invalid UTF-8 becomes U+FFFD. Ids above 255 are left out.
        """
        texts = [bytes(i for i in row.tolist() if i < NUM_BYTES) for row in rows]
        if self.text is str:
            decoded = [text.decode('utf-8', 'replace') for text in texts]
            return decoded if self.many else decoded[0]
        return texts if self.many else texts[0]


def check_prompt(prompt: PromptLike, num_tokens: int, device: torch.device) -> Prompt:
    """Checks a prompt of any type that `generate` takes. Values other than tensors are moved to `device`.

    Raises ValueError if the prompt is empty, mixes types, or holds anything but ids of the vocabulary or text.
    """
    many = isinstance(prompt, Sequence) and not isinstance(prompt, TEXT)
    if many and not len(prompt):
        raise ValueError('prompt must hold at least one row, got an empty list')
    rows: list[Any] = list(prompt) if many else [prompt]
    if any(isinstance(row, TEXT) for row in rows):
        kinds = {str if isinstance(row, str) else bytes if isinstance(row, TEXT) else type(row) for row in rows}
        if len(kinds) > 1:
            names = sorted(kind.__name__ for kind in kinds)
            raise ValueError(f'prompt must hold rows of one kind, got {" and ".join(names)}')
        encoded = [check_ids('prompt', check_text('prompt', row, num_tokens)[None], num_tokens) for row in rows]
        return Prompt([ids[0].to(device) for ids in encoded], kinds.pop(), many)

    def ids(value: object, is_row: bool) -> Tensor:
        found = as_tensor(value)
        if isinstance(found, Tensor) and not isinstance(value, Tensor):
            found = found.to(device)
        return check_ids('prompt', found[None] if is_row and isinstance(found, Tensor) else found, num_tokens)

    if many and not all(map(is_int, rows)):
        return Prompt([ids(row, True)[0] for row in rows], None, True)
    return Prompt(list(ids(prompt, False)), None, False)


def check_stops(stop_ids: object, stop: object, num_tokens: int, *, text: bool) -> list[tuple[int, ...]]:
    """The sequences of ids that end a row. With `text`, so does every id above 255.

    Args:
        stop_ids: None, an int, or several ints of any type.
        stop: None, a text, or several texts.
        num_tokens: size of the vocabulary.
        text: whether the prompt is text.

    Raises:
        ValueError: an id is not in the vocabulary, or a text is empty or not text.
    """
    single = [] if stop_ids is None else check_int_list('stop_ids', stop_ids, num_tokens)
    stops: list[tuple[int, ...]] = [(each,) for each in single]
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
