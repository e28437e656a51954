"""Figures of matplotlib that are drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure. Sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG in one step, so that an interrupted run leaves the old one."""
    from simple_hierarchical_transformer.training.report import replace_file

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))
