"""The cases that run on a device leave no option out. This needs no device."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import MIXERS

from .cases import BASE, CASES, EXEMPT, MIXER_OPTIONS, MODEL_OPTIONS

DEFAULTS = {name: each.default for name, each in signature(HierarchicalTransformer.__init__).parameters.items()}


def values(name: str) -> list[Any]:
    """What the cases give for an option, level by level where they differ."""
    given = [case[name] for case in CASES.values() if name in case]
    return [each for value in given for each in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize('name', [name for name in MODEL_OPTIONS if name not in EXEMPT and name not in BASE])
def test_every_option_is_in_a_case(name: str) -> None:
    assert values(name)


@pytest.mark.parametrize('name', [name for name, names in MODEL_OPTIONS.items() if names])
def test_every_name_is_in_a_case(name: str) -> None:
    assert set(MODEL_OPTIONS[name]) <= {DEFAULTS[name], *values(name)}


@pytest.mark.parametrize('mixer', MIXERS)
def test_every_option_of_a_mixer_is_in_a_case(mixer: str) -> None:
    used: dict[str, set[Any]] = {}
    for case in CASES.values():
        if case.get('mixer', 'attention') == mixer:
            for option, value in case.get('mixer_kwargs', {}).items():
                used.setdefault(option, set()).add(value)
    for option, names in MIXER_OPTIONS[mixer].items():
        assert set(names) <= used.get(option, set()), option
        assert option in used


def test_exemptions_are_options() -> None:
    assert EXEMPT.keys() <= MODEL_OPTIONS.keys()
