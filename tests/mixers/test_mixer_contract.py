"""The contract of mixers: causal, chunks equal one pass, states keep their size, outputs are finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import SEQ_LEN, build
from support.mixers import DIM, LENGTH, cases, in_model, make


@cases
def test_causal(case: tuple[str, bool, dict[str, Any]]) -> None:
    """Exactly causal, or up to rounding for mixers with a Fourier transform or a sort."""
    name, exact, _ = case
    model, ids = build(in_model(case)), torch.randint(0, 11, (2, SEQ_LEN))
    with torch.no_grad():
        before = model(ids)
        for at in (1, 7, 8, 30, SEQ_LEN - 1):
            changed = ids.clone()
            changed[:, at:] = (ids[:, at:] + 1 + torch.arange(SEQ_LEN - at)) % 11
            difference = (model(changed)[:, :at] - before[:, :at]).abs().max()
            assert difference == 0 if exact else difference < 1e-12, name


@cases
@given(data=st.data())
@settings(max_examples=4)
def test_chunks_equal_one_pass(case: tuple[str, bool, dict[str, Any]], data: st.DataObject) -> None:
    model, ids = build(in_model(case)), torch.randint(0, 11, (2, SEQ_LEN))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    with torch.set_grad_enabled(data.draw(st.booleans())):
        whole, _ = model(ids, return_state=True)
        torch.testing.assert_close(whole, model(ids), rtol=0, atol=1e-9)
        state, outs, at = None, [], 0
        for size in [*sizes, SEQ_LEN]:
            chunk = ids[:, at : at + size]
            if chunk.shape[1]:
                out, state = model(chunk, state=state, return_state=True)
                outs.append(out)
            at += size
        torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-8)


@cases
def test_chunks_equal_one_pass_beyond_the_length(case: tuple[str, bool, dict[str, Any]]) -> None:
    mixer, x = make(case), torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = mixer(x, mixer.initial_state(2, x), 0)
        for size in (1, 7, 64):
            state, outs = mixer.initial_state(2, x), []
            for at in range(0, x.shape[1], size):
                out, state = mixer(x[:, at : at + size], state, at)
                outs.append(out)
            torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-8)


@cases
def test_state_keeps_its_documented_shapes(case: tuple[str, bool, dict[str, Any]]) -> None:
    name, _, options = case
    mixer, x = make(case), torch.randn(3, 30, DIM, dtype=torch.float64)
    heads, kv_heads = options.get('state_heads', DIM), options.get('kv_heads', 4)
    width = DIM // heads
    before, buckets, rounds = options.get('entries', 0) - 1, options.get('buckets', 16), options.get('rounds', 2)
    order, short = options.get('order', 2), options.get('short', 3)
    entries = (3, rounds, 4, buckets)
    expected = {
        'attention': [(3, kv_heads, options.get('window', LENGTH) + 1, 4)] * 2,
        'lsh': [(*entries, before, 4)] * 2 + [entries],
        'gateloop': [(3, heads, width, width, 2)],
        'simple-gateloop': [(3, DIM)],
        's4d': [(3, DIM, 4, 2)],
        'h3': [(3, options.get('shift_dim', 64) - 1, DIM), (3, DIM, 4, 2)],
        'hyena': [(3, short - 1, (order + 1) * DIM)] + [(3, LENGTH - 1, DIM)] * order,
    }[name]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = mixer.initial_state(3, x)
            assert [tuple(t.shape) for t in state] == expected
            addresses = [t.data_ptr() for t in state]
            before = [t.clone() for t in state]
            for at, size in ((0, 20), (20, 1), (21, 9)):
                after = mixer(x[:, at : at + size], state, at)[1]
                assert [tuple(t.shape) for t in after] == expected
                if grad:
                    # the state passed in is unchanged
                    assert all(torch.equal(t, old) for t, old in zip(state, before, strict=True))
                    before = [t.clone() for t in after]
                else:
                    assert [t.data_ptr() for t in after] == addresses
                state = after


@pytest.mark.slow
@cases
def test_finite_at_many_positions(case: tuple[str, bool, dict[str, Any]]) -> None:
    # full attention would take a minute, and has its own test
    settings: dict[str, Any] = {}
    n = 30_000
    if case[0] == 'attention':
        # patterns are slower than other mixers
        n = 20_000 if 'pattern' in case[2] else n
        settings = dict(length=n, stride=200) if 'pattern' in case[2] else dict(window=50)
    mixer = make(case, **settings).float()
    x = torch.randn(1, n, DIM, requires_grad=True)
    out, _ = mixer(x, None, 0)
    assert out.isfinite().all()
    assert out[:, -1000:].std() > 1e-4
    out[:, -1000:].sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in mixer.parameters())
