"""Numbers of the published package 0.4.0, in tests/golden/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer

GOLDEN = sorted((Path(__file__).parent.parent / 'golden').glob('*.safetensors'))


class Golden(NamedTuple):
    """The configuration, weights and numbers of one published model."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def model(self, **settings: Any) -> HierarchicalTransformer:
        """The float64 model with the published weights."""
        model = HierarchicalTransformer(**self.config, **settings).double()
        model.load_state_dict({key: value.double() for key, value in self.under('weights/').items()})
        return model


def load_golden(path: Path) -> Golden:
    with safe_open(path, 'pt') as file:
        return Golden(json.loads(file.metadata()['config']), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
