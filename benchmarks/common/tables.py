"""Markdown tables, and means with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    return [line(head), f'|{"---|" * len(head)}', *map(line, rows)]


def line(cells: Sequence[object]) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def aligned(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with columns of equal width, for the terminal. Empty if there are no rows."""
    if not rows:
        return ''
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [line(list(map(str.ljust, row, widths))) for row in cells]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation. The standard deviation of one value is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(values: Sequence[float]) -> str:
    """Mean and standard deviation as text, or the value alone if there is only one."""
    mean, spread = mean_and_spread(values)
    return f'{mean:.3f} ± {spread:.3f}' if len(values) > 1 else f'{mean:.3f}'
