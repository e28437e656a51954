"""What the report of a run shows of placed levels: a text with its pieces, their lengths, and how many end in words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..boundaries.fixed import words
from ..data.corpus import Corpus
from ..segmentation import LevelPieces, Segmentation
from .report import fenced, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .learner import Learner

# bytes that lengths and agreement are computed from, and those that are shown
READ, SHOWN = 8192, 320
WHITE_SPACE = b' \t\n\r'
# bytes in a line of the picture
LINE = 80
# two shades for each level: neighbouring pieces differ
SHADES = (('#9ecae1', '#deebf7'), ('#fdae6b', '#fee6ce'), ('#a1d99b', '#e5f5e0'), ('#bcbddc', '#efedf5'))


def segment(learner: Learner, corpus: Corpus, span: range) -> Segmentation | None:
    """The pieces of the first bytes of a split. None without placed levels, and in processes that need no report."""
    # with sharded weights, all processes must take part
    if not learner.piece_shares or not (learner.main or learner.accelerator.is_fsdp2):
        return None
    try:
        with learner.averaged():
            found: Segmentation = learner.model.pieces(corpus[span.start : min(span.start + READ, span.stop)].tolist())
            return found
    except (ArithmeticError, RuntimeError):
        # a report must not end the run
        return None


def word_boundaries(ids: Tensor) -> LevelPieces:
    """The pieces that the word rule of SpaceByte cuts a text into, from its ids `(n,)`."""
    padded = torch.cat((ids.new_tensor([-1]), ids))[None]
    rule = words(max(int(ids.max()) + 1, 256))
    boundary = rule(padded, padded, torch.arange(len(ids))[None])[0]
    return LevelPieces(0, 'words', ids, boundary | (torch.arange(len(ids)) == 0))


def section(found: Segmentation, picture: str | None) -> str:
    """The section of report.md, in markdown."""
    ends = word_boundaries(found.ids)
    lines = [
        '## Pieces',
        '',
        'The first bytes of the validation split. Each piece of the finest placed level ends with one mark, of the '
        'next coarser level with two, and so on.',
        '',
        fenced(str(first(found, SHOWN))),
        '',
        *([f'![a text with its pieces, and the lengths of pieces]({picture})', ''] if picture else []),
        f'In the first {len(found.ids):,} bytes:',
        '',
        '| level | rule | pieces | mean | intended | median | longest | at white space | at word ends | of word ends |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for level in found.levels:
        lengths, (precision, recall) = level.lengths or [len(level.ids)], level.agreement(ends)
        lines.append(
            f'| {level.compression}x | {level.rule} | {len(level.offsets):,} | {mean(lengths):.2f} | '
            f'{level.compression} | {median(lengths):g} | {max(lengths):,} | {percent(at_white_space(level))} | '
            f'{percent(precision)} | {percent(recall)} |'
        )
    lines += [
        '',
        'Lengths are in bytes. The last three columns are the share of boundaries that are white space, the share of '
        'boundaries that the word rule of SpaceByte also has, and the share of its boundaries that are among them.',
    ]
    return '\n'.join(lines)


def at_white_space(level: LevelPieces) -> float:
    """The share of boundaries, without the one at the first id, that are white space. NaN if there are no others."""
    chosen = level.ids[1:][level.boundary[1:]]
    return torch.isin(chosen, torch.tensor(list(WHITE_SPACE))).double().mean().item()


def percent(share: float) -> str:
    return '' if math.isnan(share) else f'{share:.0%}'


def first(found: Segmentation, n: int) -> Segmentation:
    """The pieces of the first n ids."""

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:n]

    levels = [
        LevelPieces(
            each.compression, each.rule, each.ids[:n], each.boundary[:n], cut(each.probability), cut(each.entropy)
        )
        for each in found.levels
    ]
    return Segmentation(found.ids[:n], levels, found.num_tokens)


def draw_pieces(found: Segmentation, path: Path, shown: int = SHOWN) -> None:
    """Draws a text with its pieces, what learned rules see at each byte, and a histogram of lengths, as a PNG.

    Needs matplotlib.

    Args:
        found: what `model.pieces` returned.
        path: the file to write.
        shown: how many of the first ids are shown. The histogram is of all.
    """
    from matplotlib.figure import Figure

    begin = first(found, shown)
    curves = [each for each in begin.levels if each.probability is not None or each.entropy is not None]
    count = -(-len(begin.ids) // LINE)
    heights = [0.35 * (1 + len(begin.levels)) + 0.6 * len(curves)] * count + [2.2]
    figure = Figure(figsize=(12, sum(heights) + 0.5), layout='constrained')
    *lines, histogram = figure.subplots(count + 1, 1, height_ratios=heights)
    for i, axes in enumerate(lines):
        draw_line(axes, begin, curves, range(i * LINE, min((i + 1) * LINE, len(begin.ids))), named=i == 0)
    for number, level in enumerate(found.levels):
        if lengths := level.lengths:
            label = f'{level.compression}x, {level.rule}: {mean(lengths):.1f} bytes on average'
            histogram.hist(
                lengths, bins=range(1, max(lengths) + 2), align='left', label=label, color=SHADES[number % 4][0],
                edgecolor='white', linewidth=0.3,
            )  # fmt: skip
    histogram.set(xlabel=f'length of a piece in bytes, in {len(found.ids):,} bytes', ylabel='pieces')
    histogram.set_yscale('log')
    histogram.xaxis.get_major_locator().set_params(integer=True)
    if any(level.lengths for level in found.levels):
        histogram.legend()
    with warnings.catch_warnings():
        # the font lacks many scripts
        warnings.filterwarnings('ignore', message='Glyph')
        replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def draw_line(axes: Axes, found: Segmentation, curves: Sequence[LevelPieces], part: range, *, named: bool) -> None:
    """Draws some of the bytes: the characters, a band for each level, and a curve for each of `curves` below."""
    characters = character_at(found.ids)
    for i in part:
        axes.text(i, 0.5, characters[i], ha='center', va='center', family='monospace', fontsize=9, parse_math=False)
    ticks = {0.5: 'text'}
    for number, level in enumerate(found.levels):
        low = -(number + 1)
        ticks[low + 0.5] = f'{level.compression}x, {level.rule}'
        for count, span in enumerate(level.spans):
            begin, end = max(span.start, part.start), min(span.stop, part.stop)
            if begin < end:
                shade = SHADES[number % 4][count % 2]
                axes.broken_barh([(begin - 0.5, end - begin)], (low + 0.1, 0.8), facecolors=shade)
    low = -len(found.levels)
    for level in curves:
        low -= 2
        values, highest = (level.probability, 1.0) if level.probability is not None else (level.entropy, 8.0)
        assert values is not None
        ticks[low + 0.8] = 'probability' if highest == 1 else 'entropy'
        # a share of the height that it has
        scaled = 1.6 * values[part.start : part.stop].nan_to_num(0.0).clamp(max=highest) / highest
        color = SHADES[[each.compression for each in found.levels].index(level.compression) % 4][0]
        axes.bar(list(part), scaled.tolist(), bottom=low, color=color, width=0.8)
        if highest == 1:
            axes.axhline(low + 0.8, color='grey', linewidth=0.5, linestyle='dotted')
    axes.set(xlim=(part.start - 0.5, part.start + LINE - 0.5), ylim=(low - 0.1, 1.1), xticks=[])
    axes.set_yticks(list(ticks) if named else [], labels=list(ticks.values()) if named else [], fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def character_at(ids: Tensor) -> list[str]:
    """What stands at each byte: its character at its first byte, and nothing at the others."""
    raw = bytes(i if i < 256 else 0 for i in ids.tolist())
    shown: list[str] = []
    at = 0
    while at < len(raw):
        for size in (1, 2, 3, 4):
            try:
                character = raw[at : at + size].decode()
                break
            except UnicodeDecodeError:
                character = '\ufffd'
        else:
            size = 1
        shown += [{'\n': '\u21b5', ' ': '\u00b7'}.get(character, character if character.isprintable() else '\ufffd')]
        shown += [''] * (min(size, len(raw) - at) - 1)
        at += size
    return shown
