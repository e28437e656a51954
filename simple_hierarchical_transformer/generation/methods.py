"""The methods that models inherit for generation and scoring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import torch
from torch import Tensor

from ..memory import State
from .loop import Generated, Sampling, Settings, Stream, TextStream, generate, stream
from .prompts import PromptLike
from .protocol import StatefulModel
from .scoring import score

if TYPE_CHECKING:
    from typing_extensions import Unpack

Text = TypeVar('Text', str, bytes)
Ids = Tensor | list[Tensor] | tuple[Tensor, ...] | list[int] | list[list[int]]


class Generative:
    """Adds `generate`, `stream` and `score` to a `StatefulModel`."""

    @overload
    def generate(
        self: StatefulModel,
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
        self: StatefulModel,
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
        self: StatefulModel,
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
        self: StatefulModel,
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
        self: StatefulModel,
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
        self: StatefulModel,
        prompt: Ids,
        seq_len: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        return_state: Literal[True],
        **settings: Unpack[Sampling],
    ) -> tuple[Tensor, State]: ...
    def generate(
        self: StatefulModel,
        prompt: PromptLike,
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
    ) -> Generated | tuple[Generated, State]:
        """Samples up to `seq_len` new ids after `prompt`.

        The model reads the prompt in one pass. Each new id then takes one step, whose cost does not depend on how many
        came before. There is no limit to their number.

        If ids are bytes (`num_tokens` of 256 to 258), the prompt can be text. The output then has the prompt's type:
        `str` for a `str`, with U+FFFD in place of invalid UTF-8; `bytes` for `bytes`; a list for a list of either. A
        row of text ends at the first id above 255, such as the end of text that `train.py --documents` teaches, and is
        not padded.

        Args:
            prompt: ids to continue, `(batch, n)` with n of at least 1; or a list of rows `(n,)` of any lengths, each of
                which gets the ids it would get alone; or a text or a list of texts. Arrays and lists of ints are
                accepted as tensors.
            seq_len: the number of new ids.
            temperature: divides the logits. 0 always takes the most likely id.
            filter_thres: share of the vocabulary, the least likely ids, that is never drawn. Applies only if `top_k`,
                `top_p` and `min_p` are all None.
            top_k: draw from this many of the most likely ids.
            top_p: draw from the most likely ids that together reach this probability.
            min_p: draw from ids with at least this share of the most likely id's probability.
            stop_ids: one or more ids that end a row: ints, an array or a tensor. A finished row is padded with its last
                id. Once all rows have finished, generation stops before `seq_len`.
            generator: the source of random numbers. The same seed draws the same ids.
            use_cache: False reads all ids from position 0 again at each step. The ids are the same, but it is slow.
            return_state: also return the state after the prompt and all new ids. Requires rows of equal length.
            state: the state before the prompt, as a call with `return_state` returned it. It is consumed.
            stop: one or more texts that end a row, if ids are bytes. Only new ids are searched. The row includes the
                text that ended it.
            repetition_penalty: above 1, ids of the prompt and of the output so far become less likely (CTRL, Keskar et
                al. 2019, arXiv 1909.05858, section 4.1, where it is 1.2). Ids that `state` has read do not count.
            max_new_tokens: another name of `seq_len`.

        Returns:
            The new ids without the prompt, int64 `(batch, seq_len)`, or text. With `return_state`, a tuple of that and
            the state.

        Raises:
            ValueError: the prompt is empty or has the wrong shape, dtype or range; it is text and ids are not bytes; a
                setting is not allowed; or logits are not finite.
        """
        return generate(
            self,
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
            return_state=return_state,
            state=state,
            stop=stop,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
        )

    @overload
    def stream(
        self: StatefulModel, prompt: Ids, seq_len: int | None = None, **settings: Unpack[Settings]
    ) -> Stream: ...
    @overload
    def stream(
        self: StatefulModel,
        prompt: str | bytes | list[str] | list[bytes],
        seq_len: int | None = None,
        **settings: Unpack[Settings],
    ) -> TextStream: ...
    def stream(
        self: StatefulModel, prompt: PromptLike, seq_len: int | None = None, **settings: Unpack[Settings]
    ) -> Stream:
        """Yields what `generate` returns as it is drawn: ids, or pieces of text if the prompt is text.

        Takes the settings of `generate` except `return_state`. The iterator has a property `state` instead, the state
        after the prompt and all ids drawn so far. Reading it ends the stream.

        A piece of text is a `str` of whole characters, or `bytes`, and never empty. Joined, the pieces are what
        `generate` returns. For a list of prompts, each item is a list with one piece for each, some of which may be
        empty.

        Returns:
            An iterator over ids, int64 `(batch,)` each, or over pieces of text.

        Raises:
            ValueError: as for `generate`, or prompts have unequal lengths.
        """
        return stream(self, prompt, seq_len, **settings)

    @overload
    def score(
        self: StatefulModel,
        ids: Tensor | bytes,
        *,
        chunk_size: int | None = None,
        return_log_probs: Literal[False] = False,
    ) -> float: ...
    @overload
    def score(
        self: StatefulModel, ids: Tensor | bytes, *, chunk_size: int | None = None, return_log_probs: Literal[True]
    ) -> tuple[float, Tensor]: ...
    def score(
        self: StatefulModel, ids: PromptLike, *, chunk_size: int | None = None, return_log_probs: bool = False
    ) -> float | tuple[float, Tensor]:
        """Bits that the model needs to predict each id after the first. For a model of bytes, bits per byte.

        The model reads the ids in chunks and carries its state along. Each id is predicted from everything the model
        can remember, and memory does not grow with the length.

        Args:
            ids: `(n,)` or `(batch, n)`, where n is at least 2: a tensor, an array or a list. Or a text, as bytes or
                str.
            chunk_size: how many ids to read at a time, `seq_len` by default. It does not change the result.
            return_log_probs: also return the natural logarithm of each id's probability, `(n - 1,)` or `(batch, n -
                1)`.

        Returns:
            The mean over all ids except the first of each row and those equal to `ignore_index`. With
            `return_log_probs`, a tuple of that and the logarithms.

        Raises:
            ValueError: `ids` has the wrong shape, dtype, length or range, or all of it is ignored.
        """
        return score(self, ids, chunk_size=chunk_size, return_log_probs=return_log_probs)
