"""Greedy generation writes the same ids with and without a state."""

from __future__ import annotations

from typing import Any

import torch
from contracts.matrix import build_case, every_case, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import build, configs


@every_case
def test_every_case_writes_the_same_with_and_without_a_state(config: dict[str, Any]) -> None:
    model, prompt = build_case(config).eval(), ids_of(config, length=5)
    # each phase of a stride of 8
    new = model.generate(prompt, 9, temperature=0)
    assert torch.equal(new, model.generate(prompt, 9, temperature=0, use_cache=False))


@settings(max_examples=15)
@given(config=configs(), length=st.integers(1, 20))
def test_random_models_write_the_same_with_and_without_a_state(config: dict[str, Any], length: int) -> None:
    model, prompt = build(config), torch.randint(0, 11, (2, length))
    new = model.generate(prompt, 12, temperature=0)
    assert torch.equal(new, model.generate(prompt, 12, temperature=0, use_cache=False))
