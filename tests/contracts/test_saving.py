"""Every case loads with the weights and outputs that it was saved with."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from contracts.matrix import build_case, every_case, ids_of
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer


@every_case
@torch.no_grad()
def test_every_case_is_saved_and_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    model, ids = build_case(config).float().eval(), ids_of(config)
    values = [each for value in config.values() for each in (value if isinstance(value, tuple) else (value,))]
    if any(isinstance(value, nn.Module) for value in values):
        # a configuration file cannot hold a module: only the weights can be saved
        loaded = HierarchicalTransformer(**deepcopy(config)).eval()
        loaded.load_state_dict(model.state_dict())
    else:
        model.save_pretrained(tmp_path)
        loaded = HierarchicalTransformer.from_pretrained(tmp_path).eval()
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(loaded(ids), model(ids))
