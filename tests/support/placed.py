"""Helpers for levels whose tokens are placed by boundaries: rows have different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.read import Read


def tokens_by_row(read: Read, upto: int | None = None) -> list[list[Tensor]]:
    """Each level's final tokens of each row, `(tokens, dim)`, without padding.

    With `upto`, those of placed levels that stand before that position.
    """
    found = []
    for i, tokens in enumerate(read.tokens):
        rows = list(tokens)
        if i in read.pieces:
            pieces = read.pieces[i]
            for r, row in enumerate(rows):
                positions = pieces.positions[r, : int(pieces.lengths[r])]
                assert bool((positions.diff() > 0).all())
                rows[r] = row[: len(positions) if upto is None else int((positions < upto).sum())]
        found.append(rows)
    return found


def read_in_chunks(model: HierarchicalTransformer, ids: Tensor, sizes: list[int]) -> tuple[Tensor, list[list[Tensor]]]:
    """The logits, and each level's tokens of each row, of ids read in chunks of these sizes."""
    state, logits, parts = None, [], []
    for chunk in ids.split(sizes, dim=1):
        read = model.inspect(chunk, state=state, return_state=True)
        state = read.state
        logits.append(model.to_logits(read.features))
        parts.append(tokens_by_row(read))
    levels = [[torch.cat(row) for row in zip(*level, strict=True)] for level in zip(*parts, strict=True)]
    return torch.cat(logits, dim=1), levels
