"""No output depends on a later input: exactly, in float64, for every option there is."""

from __future__ import annotations

from typing import Any

import torch
from conftest import SEQ_LEN, build, configs
from hypothesis import example, given
from hypothesis import strategies as st

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
def test_output_before_a_change_stays_to_the_bit(config: dict[str, Any], n: int, at: float, seed: int) -> None:
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
        # level token j ends at position j * stride
        earlier = level.length(changed_at)
        assert torch.equal(x[:, :earlier], y[:, :earlier])

    # and the test can see: the position that changed does change
    assert not torch.equal(before[:, changed_at], after[:, changed_at])


@given(config=configs(), n=st.integers(1, SEQ_LEN))
def test_a_prefix_alone_gives_what_it_gave_in_the_whole(config: dict[str, Any], n: int) -> None:
    model = build(config)
    ids = torch.randint(0, 11, (1, SEQ_LEN))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :n]), model(ids)[:, :n], rtol=0, atol=1e-12)
