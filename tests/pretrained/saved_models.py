"""A small model for the tests of saving and loading, and changes to it and to its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

GOOD: dict[str, Any] = dict(num_tokens=11, dim=8, depth=1, seq_len=16, dim_head=4, heads=2, hierarchies=(1, 2))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    (folder / 'config.json').write_text(json.dumps({**config, **changes}), encoding='utf-8')


def give_activation(model: Any) -> None:
    model.layers[0][0].ff.net[2] = nn.ReLU()
