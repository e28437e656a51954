"""No output depends on a later input: exactly in float64, for every case and for random configurations."""

from __future__ import annotations

from typing import Any

import torch
from contracts.matrix import LENGTH, ROUNDED, build_case, every_case, ids_of, mixers
from hypothesis import example, given
from hypothesis import strategies as st
from support.configs import SEQ_LEN, build, configs
from support.placed import tokens_by_row
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer

LONG = dict(
    num_tokens=11,
    dim=8,
    depth=1,
    seq_len=512,
    dim_head=4,
    heads=2,
    hierarchies=(1, 2, 8),
    hierarchical_stride=(1, 2, 4),
    window_sizes=(16, 3, None),
)


@given(config=configs(), n=st.integers(1, SEQ_LEN), at=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 9))
@example(config=LONG, n=511, at=0.7, seed=0)
@example(config=LONG, n=400, at=0.25, seed=1)
def test_outputs_before_a_change_stay_exactly_the_same(config: dict[str, Any], n: int, at: float, seed: int) -> None:
    model = build(config, seed)
    changed_at = int(at * n)

    ids = torch.randint(0, 11, (2, n))
    changed = ids.clone()
    changed[:, changed_at:] = torch.randint(0, 11, (2, n - changed_at))
    changed[:, changed_at] = (ids[:, changed_at] + 1) % 11

    with torch.no_grad():
        before, after = model(ids), model(changed)
        assert_same(after[:, :changed_at], before[:, :changed_at], rounding(config))
        assert_same_tokens(model, changed, ids, changed_at, rounding(config))

    # the output at the changed position differs, so the test can fail
    assert not torch.equal(before[:, changed_at], after[:, changed_at])


@given(config=configs(), n=st.integers(1, SEQ_LEN))
def test_a_prefix_gives_the_same_outputs_as_the_whole_sequence(config: dict[str, Any], n: int) -> None:
    model = build(config)
    ids = torch.randint(0, 11, (1, SEQ_LEN))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :n]), model(ids)[:, :n], rtol=0, atol=1e-12)


@every_case
@torch.no_grad()
def test_no_case_depends_on_later_ids(config: dict[str, Any]) -> None:
    model, ids = build_case(config).eval(), ids_of(config)
    before = model(ids)
    for at in (0, 1, 7, 8, 9, 30, LENGTH - 1):
        changed = ids.clone()
        changed[:, at] = (ids[:, at] + 1) % config['num_tokens']
        after = model(changed)
        assert_same(after[:, :at], before[:, :at], rounding(config))
        assert not torch.equal(before[:, at], after[:, at])
        assert_same_tokens(model, changed, ids, at, rounding(config))


def rounding(config: dict[str, Any]) -> float:
    placed = any(config.get('boundaries') or ())
    # the number of a placed level's tokens, so the shape of its tensors, depends on later ids
    return 1e-12 if placed or mixers(config) & ROUNDED else 0


def assert_same_tokens(model: HierarchicalTransformer, changed: Tensor, ids: Tensor, at: int, rounding: float) -> None:
    """No level's tokens before position `at` differ."""
    ours, theirs = (tokens_by_row(model.inspect(each), upto=at) for each in (changed, ids))
    for i, (after, before) in enumerate(zip(ours, theirs, strict=True)):
        for x, y in zip(after, before, strict=True):
            # token j of a level with a stride ends at position j * stride
            earlier = len(x) if model.levels[i].is_placed else model.levels[i].length(at)
            assert_same(x[:earlier], y[:earlier], rounding)


def assert_same(ours: Tensor, theirs: Tensor, rounding: float) -> None:
    assert not (ours - theirs).abs().gt(rounding * theirs.abs().clamp(min=1)).any()
