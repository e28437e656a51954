"""Small models with placed levels, and their tokens row by row: rows have different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Surprise
from simple_hierarchical_transformer.read import Read

PLACED: dict[str, Any] = dict(
    num_tokens=256, dim=16, depth=2, seq_len=32, dim_head=8, heads=2, hierarchies=(1, 8, 32), window_sizes=8,
    arrangement='hourglass', ignore_index=-1, recon_loss_weight=0.0, next_latent_loss_weight=0.0,
)  # fmt: skip
# each rule at a level whose finer level has a token at each id, and inside a placed one
NESTED: tuple[tuple[str | None, ...], ...] = (
    (None, 'words', 'sentences'),
    (None, 'words', 'learned'),
    (None, 'learned', 'every'),
    (None, 'surprise', 'rise'),
)
TEXT = 'The cat sat on the mat. \u00dcber \u65e5\u672c\u8a9e is fun.\nYes! And \U0001f600 | then\n'


def placed(boundaries: tuple[str | None, ...], **changes: Any) -> HierarchicalTransformer:
    """A model in float64, whose rules have thresholds near what it finds."""
    model = HierarchicalTransformer(**{**PLACED, **changes, 'boundaries': boundaries}).double().eval()
    for rule in model.boundaries.values():
        if isinstance(rule, Surprise):
            rule.threshold.fill_(0.0 if rule.rise else 5.4)
    return model


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
