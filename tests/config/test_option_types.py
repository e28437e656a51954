"""Options may be numbers, sequences and mappings of other libraries."""

from __future__ import annotations

import inspect
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simple_hierarchical_transformer import HierarchicalTransformer

GOOD: dict[str, Any] = dict(num_tokens=11, dim=8, depth=1, seq_len=16, dim_head=4, heads=2)


class Items(Sequence[Any]):
    """A sequence that is not a list, like those of configuration libraries."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Settings(Mapping[str, Any]):
    """A mapping that is not a dict, like those of configuration libraries."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)


PLAIN: dict[str, Any] = dict(
    num_tokens=256,
    dim=[8, 16],
    depth=2,
    seq_len=16,
    dim_head=4,
    heads=[1, 2],
    ff_mult=[1.5, 2],
    ngrams=[2, 3],
    ngram_rows=4,
    ngram_dropout=0.5,
    word_ngrams=[1],
    recall=[4],
    hierarchies=[1, 4],
    window_sizes=[4, None],
    hierarchical_stride=[1, 2],
    mixer=['attention', 's4d'],
    mixer_kwargs=[dict(kv_heads=1), dict(state_dim=4)],
    merge_into=[1, 4],
    predict_hierarchy=1,
    recon_loss_weight=0.5,
    next_latent_loss_weight=[0.25, 0.5],
    prophet_loss_weight=[0, 0.25],
    quantized_loss_weight=[0, 0.25],
    num_rollouts=2,
    rollout_weights=[0.5, 1],
    dynamics_hidden_dim=8,
    ignore_index=-1,
)


def converted(value: Any, number: Callable[[Any], Any], sequence: Callable[[list[Any]], Any]) -> Any:
    """The same value with other types for numbers and for sequences of numbers."""
    if isinstance(value, dict):
        return Settings({key: converted(each, number, sequence) for key, each in value.items()})
    if isinstance(value, list) and all(isinstance(each, (int, float)) for each in value):
        return sequence(value)
    if isinstance(value, list):
        return Items(*(converted(each, number, sequence) for each in value))
    return number(value) if isinstance(value, (int, float)) else value


@pytest.mark.parametrize(
    ('number', 'sequence'),
    [
        (lambda value: value, lambda values: Items(*values)),
        (np.asarray, np.asarray),
        (lambda value: np.asarray(value)[()], lambda values: list(np.asarray(values))),
        (torch.tensor, torch.tensor),
        (lambda value: Fraction(value) if isinstance(value, float) else value, deque),
    ],
    ids=['sequences', 'arrays', 'numpy numbers', 'tensors', 'fractions'],
)
def test_constructor_takes_numbers_and_sequences_of_any_library(
    tmp_path: Path, number: Callable[[Any], Any], sequence: Callable[[list[Any]], Any]
) -> None:
    torch.manual_seed(0)
    plain = HierarchicalTransformer(**PLAIN)
    torch.manual_seed(0)
    given = HierarchicalTransformer(**converted(PLAIN, number, sequence))

    assert given.levels == plain.levels
    assert type(given.num_tokens) is type(given.seq_len) is type(given.levels[0].dim) is int
    ids = torch.randint(0, 256, (2, 16))
    torch.manual_seed(0)
    loss = plain(ids, return_loss=True)[0]
    torch.manual_seed(0)
    assert torch.equal(given(ids, return_loss=True)[0], loss)

    plain.save_pretrained(tmp_path / 'plain')
    given.save_pretrained(tmp_path / 'given')
    assert json.loads((tmp_path / 'given' / 'config.json').read_text()) == json.loads(
        (tmp_path / 'plain' / 'config.json').read_text()
    )
    again = HierarchicalTransformer.from_pretrained(tmp_path / 'given').eval()
    torch.manual_seed(0)
    assert torch.equal(again(ids), given.eval()(ids))


def test_constructor_takes_ranges() -> None:
    model = HierarchicalTransformer(**{**GOOD, 'heads': range(2, 0, -1)}, hierarchies=range(1, 3), ngrams=range(2, 4))
    assert [(level.compression, level.heads) for level in model.levels] == [(1, 2), (2, 1)]


def test_numeric_arguments_take_numpy_numbers() -> None:
    parameters = inspect.signature(HierarchicalTransformer).parameters
    defaults = {name: p.default for name, p in parameters.items() if type(p.default) in (int, float)}
    assert len(defaults) > 20
    HierarchicalTransformer(**GOOD | {k: np.array(v)[()] for k, v in defaults.items() if k not in GOOD})
