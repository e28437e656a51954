"""The ponder loss of layers that halt."""

from __future__ import annotations

import torch
from support.configs import UNEVEN, build


def test_the_ponder_loss_and_early_halting() -> None:
    config = dict(UNEVEN, share_layers=True, depth=4, halting='act', predict_use_all_hierarchy=True)
    config |= dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model, ids = build(dict(config, ponder_loss_weight=0.5)), torch.randint(0, 11, (2, 25))
    loss, parts = model(ids, return_loss=True)
    assert set(parts.named) == {'ce', 'ponder/1x', 'ponder/8x', 'ponder/4x'}
    # levels that do not predict do not halt
    some = build(dict(config, predict_use_all_hierarchy=False))
    assert set(some(ids, return_loss=True)[1].named) == {'ce', 'ponder/1x'}
    assert all(1 <= parts.named[f'ponder/{c}x'] <= 5 for c in (1, 4, 8))
    torch.testing.assert_close(loss, parts.ce + 0.5 * sum(parts.named[f'ponder/{c}x'] for c in (1, 4, 8)))

    ran = []
    for number, layer in enumerate(model.layers[0]):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        for halt in model.halting.values():
            halt.to_halt.bias.fill_(20)
        _, parts = model(ids, return_loss=True)
    # all tokens halt after the first step, so no other step runs
    assert len(ran) == 3
    torch.testing.assert_close(parts.named['ponder/1x'], torch.tensor(2.0, dtype=torch.float64))
