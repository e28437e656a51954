"""Small models with placed levels."""

from __future__ import annotations

from typing import Any

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Surprise

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
