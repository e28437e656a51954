"""No output depends on a later input: exactly in float64, for every case and for random configurations."""

from __future__ import annotations

from typing import Any

import torch
from contracts.matrix import LENGTH, ROUNDED, build_case, every_case, ids_of, mixers
from hypothesis import example, given
from hypothesis import strategies as st
from support.configs import SEQ_LEN, build, configs
from torch import Tensor

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
        before, tokens_before = model(ids, return_logits_and_embeds=True)
        after, tokens_after = model(changed, return_logits_and_embeds=True)

    assert torch.equal(before[:, :changed_at], after[:, :changed_at])
    for x, y, level in zip(tokens_before, tokens_after, model.levels, strict=True):
        # token j of a level ends at position j * stride
        earlier = level.length(changed_at)
        assert torch.equal(x[:, :earlier], y[:, :earlier])

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
    rounding = 1e-12 if mixers(config) & ROUNDED else 0
    before, tokens_before = model(ids, return_logits_and_embeds=True)
    for at in (0, 1, 7, 8, 9, 30, LENGTH - 1):
        changed = ids.clone()
        changed[:, at] = (ids[:, at] + 1) % config['num_tokens']
        after, tokens_after = model(changed, return_logits_and_embeds=True)
        assert_same(after[:, :at], before[:, :at], rounding)
        assert not torch.equal(before[:, at], after[:, at])
        for x, y, level in zip(tokens_before, tokens_after, model.levels, strict=True):
            # token j of a level ends at position j * stride
            assert_same(y[:, : level.length(at)], x[:, : level.length(at)], rounding)


def assert_same(ours: Tensor, theirs: Tensor, rounding: float) -> None:
    assert not (ours - theirs).abs().gt(rounding * theirs.abs().clamp(min=1)).any()
