"""Weights that levels or layers share."""

from __future__ import annotations

import pytest
import torch
from support.configs import UNEVEN, build


def test_attention_is_shared_by_levels_that_are_alike() -> None:
    config = dict(UNEVEN, dim=(8, 8, 8), heads=2, window_sizes=(3, None, 2))
    shared, apart = build(dict(config, share_attention=True)), build(config)
    count = sum(p.numel() for p in apart.layers[0][0].attn.parameters())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    # two layers, in each of which two of three levels have a window
    assert sizes[1] - sizes[0] == 2 * count

    apart.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 11, (2, 30))
    torch.testing.assert_close(shared(ids), apart(ids))
    assert shared.layers[0][2].attn.to_qkv is shared.layers[0][0].attn.to_qkv
    assert shared.layers[0][1].attn.to_qkv is not shared.layers[0][0].attn.to_qkv
    assert shared.layers[0][2].attn.window == 2


def test_feed_forward_is_shared_by_levels_that_are_alike() -> None:
    shared, apart = build(dict(UNEVEN, share_feed_forward=True)), build(UNEVEN)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    assert sizes[1] - sizes[0] == 2 * sum(p.numel() for p in apart.layers[0][0].ff.parameters())
    apart.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 11, (2, 30))
    torch.testing.assert_close(shared(ids), apart(ids))


def test_weights_that_differ_do_not_become_one() -> None:
    shared, apart = build(dict(UNEVEN, share_feed_forward=True)), build(UNEVEN)
    with pytest.raises(ValueError, match=r'layers\.0\.2\.ff.* and layers\.0\.0\.ff.* are one weight in this model'):
        shared.load_state_dict(apart.state_dict())
    with pytest.raises(RuntimeError, match='receivers'):
        build(dict(UNEVEN, merge='attention')).load_state_dict(
            build(dict(UNEVEN, merge='attention', merge_into='all')).state_dict()
        )


def test_layers_are_shared() -> None:
    config = dict(UNEVEN, depth=3, merge='attention')
    shared, apart = build(dict(config, share_layers=True)), build(config)
    one = build(dict(config, depth=1))
    extra = sum(p.numel() for p in shared.step_embeds)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in one.parameters()) + extra

    weights = {name: weight for name, weight in shared.state_dict().items() if not name.startswith('step_embeds')}
    # receivers that nothing trains are none here
    apart.load_state_dict(weights)
    ids = torch.randint(0, 11, (2, 30))
    assert not torch.allclose(shared(ids), apart(ids))
    with torch.no_grad():
        for steps in shared.step_embeds:
            steps.zero_()
    torch.testing.assert_close(shared(ids), apart(ids))
