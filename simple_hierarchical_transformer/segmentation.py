"""Where the placed levels of a model cut a text: the method `pieces`, and the text with the pieces visible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .boundaries import Surprise
from .checks import check_int
from .generation.prompts import BYTE_VOCABULARIES, NUM_BYTES, TEXT, PromptLike, as_bytes, as_tensor, check_ids

if TYPE_CHECKING:
    from .memory import State
    from .model import HierarchicalTransformer
    from .read import Read

# stands at the end of a piece, once for the finest placed level, twice for the next, and so on
MARK = '|'
# colours of the marks on a terminal, by level: yellow, magenta, cyan
COLOURS = ('\033[33m', '\033[35m', '\033[36m')
PLAIN = '\033[0m'


@dataclass(frozen=True)
class LevelPieces:
    """The pieces into which a placed level cuts a text. It has a token at the last id of each, the boundary.

    The last piece is unfinished, unless a boundary is at the last id.
    """

    compression: int
    """The compression of the level, its intended mean length."""
    rule: str
    """What places it, as in the option `boundaries`."""
    ids: Tensor
    """The text, int64 `(n,)`, on the CPU."""
    boundary: Tensor
    """At which ids the level has a token, bool `(n,)`."""
    probability: Tensor | None = None
    """The probability of a boundary at each id, `(n,)`, if the rule learns it. NaN where no finer token is."""
    entropy: Tensor | None = None
    """The entropy of the next id in bits, `(n,)`, if the rule reads that. NaN where no finer token is."""

    @property
    def offsets(self) -> list[int]:
        """The offsets of the boundaries in the text, ascending. The first is 0."""
        return self.boundary.nonzero()[:, 0].tolist()

    @property
    def spans(self) -> list[range]:
        """The offsets of each piece."""
        ends = [offset + 1 for offset in self.offsets]
        if not ends or ends[-1] < len(self.ids):
            ends.append(len(self.ids))
        return [range(start, end) for start, end in pairwise((0, *ends))]

    @property
    def pieces(self) -> list[bytes]:
        """The pieces as bytes. Joined, they are the text. Ids above 255 are left out."""
        ids = self.ids.tolist()
        return [bytes(i for i in ids[span.start : span.stop] if i < NUM_BYTES) for span in self.spans]

    @property
    def lengths(self) -> list[int]:
        """The number of ids from each boundary to the next."""
        return [after - before for before, after in pairwise(self.offsets)]

    def agreement(self, other: LevelPieces) -> tuple[float, float]:
        """The precision and the recall of the boundaries, if those of `other` are taken as right.

        The first is the share of them that `other` also has, the second the share of those of `other` that are among
        them. The boundary at the first id, which every rule has, is left out. NaN where no boundary remains.

        Raises:
            ValueError: `other` cuts a text of another length.
        """
        if len(other.ids) != len(self.ids):
            raise ValueError(f'other must have pieces of a text of {len(self.ids)} ids, got {len(other.ids)}')
        ours, theirs = self.boundary[1:], other.boundary[1:]
        both = (ours & theirs).sum()
        return (both / ours.sum()).item(), (both / theirs.sum()).item()


@dataclass(frozen=True)
class Segmentation:
    """The pieces into which the placed levels of a model cut a text. `str()` of it is the text with marks."""

    ids: Tensor
    """The text, int64 `(n,)`, on the CPU."""
    levels: list[LevelPieces]
    """The placed levels, finest first."""
    num_tokens: int = NUM_BYTES
    """The size of the vocabulary. Ids of others than bytes are shown as numbers."""

    def __getitem__(self, compression: int) -> LevelPieces:
        """The pieces of the level of this compression. Raises KeyError if it is not placed."""
        for level in self.levels:
            if level.compression == compression:
                return level
        raise KeyError(compression)

    @property
    def depths(self) -> list[int]:
        """The number of placed levels that have a boundary at each id."""
        return depths_of(self.levels)

    def __str__(self) -> str:
        if self.num_tokens not in BYTE_VOCABULARIES:
            return ' '.join(f'{i}{MARK * depth}' for i, depth in zip(self.ids.tolist(), self.depths, strict=True))
        marker = Marker()
        raw = bytes(i for i in self.ids.tolist() if i < NUM_BYTES)
        depths = [depth for i, depth in zip(self.ids.tolist(), self.depths, strict=True) if i < NUM_BYTES]
        return marker.show(raw, depths) + marker.finish()


def depths_of(levels: Sequence[LevelPieces]) -> list[int]:
    """The number of levels that have a boundary at each id. Boundaries nest, so they are the finest of the levels."""
    return torch.stack([level.boundary for level in levels]).sum(dim=0).tolist()


@dataclass
class Marker:
    """Writes bytes as text with marks at the ends of pieces.

    A mark follows the whole character that a boundary is in. Only a line break follows its marks, so that no line
    begins with one. Bytes that are not UTF-8 are shown as escapes.

    Args:
        colours: whether marks are coloured, for a terminal.
    """

    colours: bool = False
    held: bytes = b''
    """The bytes of an unfinished character."""
    depth: int = 0
    """The number of marks that follow it."""

    def show(self, text: bytes, depths: Sequence[int]) -> str:
        """The next bytes of the text, and the number of levels that have a boundary at each of them."""
        return ''.join(self.steps(text, depths))

    def steps(self, text: bytes, depths: Sequence[int]) -> Iterator[str]:
        for byte, depth in zip(text, depths, strict=True):
            if self.held and not continues(self.held, byte):
                yield self.finish()
            self.held += bytes([byte])
            self.depth = max(self.depth, depth)
            if is_whole(self.held):
                yield self.finish()

    def finish(self) -> str:
        """What remains, after the last byte."""
        character, depth = self.held.decode('utf-8', 'backslashreplace'), self.depth
        self.held, self.depth = b'', 0
        marks = MARK * depth
        if marks and self.colours:
            marks = f'{COLOURS[(depth - 1) % len(COLOURS)]}{marks}{PLAIN}'
        return marks + character if character == '\n' else character + marks


def expected_length(first: int) -> int:
    """The number of bytes of a UTF-8 character that begins with this byte. 1 if no character does."""
    return 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 1


def continues(held: bytes, byte: int) -> bool:
    """Whether a byte may belong to the character that `held` begins."""
    return 0x80 <= byte < 0xC0 and len(held) < expected_length(held[0])


def is_whole(held: bytes) -> bool:
    return len(held) >= expected_length(held[0])


@dataclass
class PieceReader:
    """Finds the pieces of a text that arrives in chunks.

    Args:
        model: the model.
        state: the state before the text.

    Raises:
        ValueError: the model has no placed level.
    """

    model: HierarchicalTransformer
    state: State | None = None

    def __post_init__(self) -> None:
        if not len(self.model.boundaries):
            raise ValueError('pieces are those of levels with boundaries, and this model has none')

    @torch.no_grad()
    def read(self, ids: Tensor) -> list[LevelPieces]:
        """The pieces of the next ids `(n,)`, of each placed level, finest first."""
        read = self.model.inspect(ids[None], state=self.state, return_state=True)
        self.state = read.state
        return pieces_of(self.model, read, ids)


def pieces_of(model: HierarchicalTransformer, read: Read, ids: Tensor) -> list[LevelPieces]:
    """The pieces in the `read` of ids `(1, n)`."""
    levels = []
    for i in (i for i in model.order if i in read.pieces):
        pieces, level, rule = read.pieces[i], model.levels[i], model.boundaries[str(i)]
        finer = pieces.finer.positions[0]
        if pieces.finer.lengths is not None:
            finer = finer[: int(pieces.finer.lengths[0])]

        def at_ids(values: Tensor, finer: Tensor = finer) -> Tensor:
            found = values.new_full(ids.shape, torch.nan, dtype=torch.promote_types(values.dtype, torch.float32))
            found[finer] = values[0, : len(finer)].to(found.dtype)
            return found.cpu()

        entropy = None
        if isinstance(rule, Surprise):
            entropy = at_ids(rule.entropy(pieces.tokens)) / math.log(2)
        levels.append(
            LevelPieces(
                level.compression,
                str(level.boundaries),
                ids.cpu(),
                pieces.at_positions[0].cpu(),
                None if pieces.probability is None else at_ids(pieces.probability),
                entropy,
            )
        )
    return levels


def join(parts: Sequence[LevelPieces]) -> LevelPieces:
    """The pieces of a text from those of its chunks."""

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if all(each is None for each in values):
            return None
        # a chunk without finer tokens has no values
        return torch.cat(
            [part.ids * torch.nan if each is None else each for part, each in zip(parts, values, strict=True)]
        )

    names = ('ids', 'boundary', 'probability', 'entropy')
    return LevelPieces(parts[0].compression, parts[0].rule, **{name: joined(name) for name in names})


class Segmenting:
    """The method `pieces`."""

    def pieces(self, text: PromptLike, *, chunk_size: int | None = None) -> Segmentation:
        """Where the placed levels cut a text, in one call.

            found = model.pieces('The cat sat.')
            print(found)                # T|he |cat |sat.|
            found[8].pieces             # [b'T', b'he ', ...], those of level 8x
            found[8].offsets            # [0, 3, ...], its boundaries: the last byte of each piece

        The text may have any length. The model reads it in chunks, with a state.

        Args:
            text: a text, as str or bytes, or ids `(n,)`.
            chunk_size: how many ids to read at a time, `seq_len` by default. It does not change the result.

        Raises:
            ValueError: no level is placed; the text is empty or holds ids that are not in the vocabulary; or it is text
                and ids are not bytes.
        """
        model = cast('HierarchicalTransformer', self)
        reader = PieceReader(model)
        if isinstance(text, TEXT) and model.num_tokens not in BYTE_VOCABULARIES:
            raise ValueError(f'text must be ids, since num_tokens is {model.num_tokens} and not 256 to 258')
        read = as_bytes('text', text).long() if isinstance(text, TEXT) else as_tensor(text)
        rows = read[None] if isinstance(read, Tensor) and read.ndim == 1 else read
        ids = check_ids('text', rows, model.num_tokens)
        if len(ids) != 1:
            raise ValueError(f'text must be one text, ids (n,), got {len(ids)} rows')
        size = check_int('chunk_size', model.seq_len if chunk_size is None else chunk_size)
        parts = [reader.read(chunk) for chunk in ids[0].to(model.token_emb.weight.device).split(size)]
        return Segmentation(ids[0].cpu(), [join(each) for each in zip(*parts, strict=True)], model.num_tokens)
