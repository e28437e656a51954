"""The backend that was asked for runs, and FlexAttention gives the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.configs import TWO_LEVELS, build, configs

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.ops import window_attention as attention


@pytest.mark.parametrize('backend', ['sdpa', 'flex', 'local-attention'])
def test_the_chosen_backend_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {'local-attention': 'attend_window_local'}.get(backend, f'attend_window_{backend}')
    called, real = [], getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *args: called.append(name) or real(*args))
    model, ids = HierarchicalTransformer(**TWO_LEVELS, attn_backend=backend), torch.randint(0, 11, (2, 33))
    with torch.no_grad():
        model(ids)
        assert len(called) == 2
        # with a state, full attention is a band as well
        model(ids, return_state=True)
        assert len(called) > 4


@settings(max_examples=10)
@given(config=configs())
def test_flex_is_causal_and_equals_sdpa(config: dict[str, Any]) -> None:
    model, ids = build(dict(config, attn_backend='flex')).float(), torch.randint(0, 11, (2, 20))
    plain = build(dict(config, attn_backend='sdpa')).float()
    with torch.no_grad():
        logits = model(ids)
        torch.testing.assert_close(logits, plain(ids), rtol=1e-4, atol=1e-4)
        ids[:, 13] = (ids[:, 13] + 1) % 11
        after = model(ids)[:, :13]
        if any(config.get('boundaries') or ()):
            # the number of placed tokens depends on later ids, and rounding on shapes
            torch.testing.assert_close(after, logits[:, :13], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(after, logits[:, :13])


def test_a_flex_mask_consists_of_blocks() -> None:
    mask = attention.window_mask(70_000, 100, 64, torch.device('cpu'))
    assert mask.kv_num_blocks.max() <= 3
    assert sum(t.nbytes for t in (mask.kv_indices, mask.kv_num_blocks)) < 2_000_000
    small = attention.window_mask(300, 60, 70, torch.device('cpu'))
    i, j = torch.arange(300)[:, None], torch.arange(360)
    band = (i + 60 - j >= 0) & (i + 60 - j <= 70)
    blocks = torch.nn.functional.pad(band, (0, 24, 0, 84)).unflatten(0, (3, 128)).unflatten(2, (3, 128)).any(3).any(1)
    assert torch.equal(small.to_dense()[0, 0].bool(), blocks)
