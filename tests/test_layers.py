"""Weights that levels or layers share."""

from __future__ import annotations

import pytest
import torch
from support.configs import UNEVEN, build


def test_equal_levels_share_attention() -> None:
    config = dict(UNEVEN, dim=(8, 8, 8), heads=2, window_sizes=(3, None, 2))
    shared, separate = build(dict(config, share_attention=True)), build(config)
    count = sum(p.numel() for p in separate.layers[0][0].attn.parameters())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, separate)]
    # in each of two layers, one of two levels with a window has no weights of its own
    assert sizes[1] - sizes[0] == 2 * count

    separate.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 11, (2, 30))
    torch.testing.assert_close(shared(ids), separate(ids))
    assert shared.layers[0][2].attn.to_qkv is shared.layers[0][0].attn.to_qkv
    assert shared.layers[0][1].attn.to_qkv is not shared.layers[0][0].attn.to_qkv
    assert shared.layers[0][2].attn.window == 2


def test_equal_levels_share_feed_forwards() -> None:
    shared, separate = build(dict(UNEVEN, share_feed_forward=True)), build(UNEVEN)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, separate)]
    assert sizes[1] - sizes[0] == 2 * sum(p.numel() for p in separate.layers[0][0].ff.parameters())
    separate.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 11, (2, 30))
    torch.testing.assert_close(shared(ids), separate(ids))


def test_different_weights_do_not_load_into_shared_ones() -> None:
    shared, separate = build(dict(UNEVEN, share_feed_forward=True)), build(UNEVEN)
    with pytest.raises(ValueError, match=r'layers\.0\.2\.ff.* and layers\.0\.0\.ff.* are one weight in this model'):
        shared.load_state_dict(separate.state_dict())
    with pytest.raises(RuntimeError, match='receivers'):
        build(dict(UNEVEN, merge='attention')).load_state_dict(
            build(dict(UNEVEN, merge='attention', merge_into='all')).state_dict()
        )


def test_layers_are_shared() -> None:
    config = dict(UNEVEN, depth=3, merge='attention')
    shared, separate = build(dict(config, share_layers=True)), build(config)
    one = build(dict(config, depth=1))
    extra = sum(p.numel() for p in shared.step_embeds)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in one.parameters()) + extra

    weights = {name: weight for name, weight in shared.state_dict().items() if not name.startswith('step_embeds')}
    # both models have the same receivers, because all of them are trained
    separate.load_state_dict(weights)
    ids = torch.randint(0, 11, (2, 30))
    assert not torch.allclose(shared(ids), separate(ids))
    with torch.no_grad():
        for steps in shared.step_embeds:
            steps.zero_()
    torch.testing.assert_close(shared(ids), separate(ids))
