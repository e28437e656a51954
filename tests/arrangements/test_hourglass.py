"""The hourglass against its definition, computed level by level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.configs import SMALL, UNEVEN, build
from support.reference import attended
from torch import Tensor


@pytest.mark.parametrize('strides', [(1, 2, 4), (1, 4, 8), (1, 1, 1)])
@pytest.mark.parametrize(('depth', 'merge'), [(1, 'concat'), (2, 'concat'), (3, 'concat'), (2, 'attention')])
def test_hourglass_equals_its_definition(strides: tuple[int, ...], depth: int, merge: str) -> None:
    dims, compressions = (8, 12, 6), (1, 4, 8)
    model = build(
        dict(UNEVEN, dim=dims, depth=depth, hierarchies=compressions, hierarchical_stride=strides, heads=1,
             arrangement='hourglass', merge=merge, merge_window=2 * (merge == 'attention'))
    )  # fmt: skip
    n = 29
    ids = torch.randint(0, 11, (2, n))

    def inside(j: int, finer: Tensor) -> Tensor:
        x = finer
        if j > 0:
            # the tokens of the finer level that cover the c positions up to this one
            taps, tokens = compressions[j] // compressions[j - 1], []
            pool = model.compressors[j].compress_fn
            for position in range(0, n, strides[j]):
                at = [position - (taps - 1 - k) * compressions[j - 1] for k in range(taps)]
                window = [finer[:, i // strides[j - 1]] if i >= 0 else torch.zeros_like(finer[:, 0]) for i in at]
                hidden = F.silu(F.conv1d(torch.stack(window, -1), pool[1].conv.weight, pool[1].conv.bias))
                tokens.append(F.conv1d(hidden, pool[3].weight, pool[3].bias)[:, :, 0])
            x = torch.stack(tokens, dim=1)
        x = model.post_token_emb_norms[j](x)
        blocks = [layer[j] for layer in model.layers]
        half = depth // 2 if j < 2 else depth
        for block in blocks[:half]:
            x = block(x)[0]
        if j < 2:
            inner, net = inside(j + 1, x), model.hierarchical_merges[j]
            if merge == 'concat':
                back = [inner[:, i * strides[j] // strides[j + 1]] for i in range(x.shape[1])]
                x = x + net.net(torch.cat((x, torch.stack(back, 1)), dim=-1))
            else:
                separate = (1, strides[j + 1] // strides[j])
                x = x + torch.stack([attended(net, (x, inner), separate, 0, i) for i in range(x.shape[1])], dim=1)
        for block in blocks[half:]:
            x = block(x)[0]
        return x

    expected = model.to_logits(model.norms[0](inside(0, model.token_emb(ids))))
    torch.testing.assert_close(model(ids), expected)


def test_levels_of_an_hourglass_have_their_own_depth() -> None:
    model = build(dict(SMALL, hierarchies=(4, 1), arrangement='hourglass', depth=(3, 1)))
    there = [[block is not None for block in layer] for layer in model.layers]
    assert there == [[True, True], [True, False], [True, False]]
    # a layer that only the coarse level has changes the outputs
    ids = torch.randint(0, 11, (1, 24))
    before = model(ids)
    with torch.no_grad():
        model.layers[2][0].ff.net[-1].weight.add_(0.1)  # type: ignore[index, union-attr]
    assert not torch.equal(before, model(ids))
