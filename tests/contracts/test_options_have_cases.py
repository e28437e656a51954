"""Every option of the model and of its mixers is in a case: a new option without a case fails here."""

from __future__ import annotations

from typing import Any

import pytest
from contracts.cases import BASE, CASES, DEFAULTS, EXEMPT, MIXER_OPTIONS, MODEL_OPTIONS

from simple_hierarchical_transformer.mixers import MIXERS


def values(name: str) -> list[Any]:
    """The values of an option in all cases, those of each level where levels differ."""
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
