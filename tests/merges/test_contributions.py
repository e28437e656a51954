"""What each level contributes to a merge."""

from __future__ import annotations

import pytest
import torch
from support.configs import UNEVEN, build


@pytest.mark.parametrize('merge', ['concat', 'attention'])
def test_an_ablated_level_contributes_nothing(merge: str) -> None:
    model = build(dict(UNEVEN, depth=1, merge=merge, merge_into=(1, 8)))
    ids = torch.randint(0, 11, (2, 20))
    with model.ablate(8):
        _, (found,) = model(ids, return_contributions=True)
    for receiver in (1, 8):
        weights = found.weights[receiver]
        levels = weights if merge == 'concat' else weights.sum(-1).movedim(-1, 0)
        assert not levels[1].any()
        torch.testing.assert_close(levels.sum(0), torch.ones_like(levels[0]))
        assert not found.norms[receiver][..., 1].any()


@pytest.mark.parametrize('merge', ['concat', 'attention'])
def test_contributions_are_the_change_when_a_level_is_ablated(merge: str) -> None:
    model = build(dict(UNEVEN, depth=1, merge=merge, merge_into=(1, 8), merge_window=2 if merge == 'attention' else 0))
    ids = torch.randint(0, 11, (2, 20))
    logits, (found,) = model(ids, return_contributions=True)
    assert torch.equal(logits, model(ids))

    blocks = [model.layers[0][j](x)[0] for j, x in enumerate(model(ids, return_hierarchical_token_embeds=True))]
    merged, _ = model.hierarchical_merges[0](blocks)
    for place, c in enumerate((1, 8, 4)):
        others, _ = model.hierarchical_merges[0](blocks, ablated={c})
        for receiver, i in ((1, 0), (8, 1)):
            moved = (merged[i] - others[i]).norm(dim=-1)
            assert moved.min() > 0
            torch.testing.assert_close(found.norms[receiver][..., place], moved)

    assert set(found.weights) == {1, 8}
    weights = found.weights[1]
    if merge == 'attention':
        assert weights.shape == (2, 20, 2, 3, 3)
        torch.testing.assert_close(weights.sum(dim=(-1, -2)), torch.ones(2, 20, 2, dtype=torch.float64))
        # no token comes before the first position
        assert not weights[:, 0, :, :, 1:].any()
    else:
        norm, read, *_ = model.hierarchical_merges[0].net
        squares = (read.weight * norm.gamma).square().sum(0)
        expected = torch.stack((squares[:8].sum(), squares[8:20].sum(), squares[20:].sum())) / squares.sum()
        torch.testing.assert_close(weights, expected)


def test_contributions_of_an_hourglass_follow_its_merges() -> None:
    model = build(dict(UNEVEN, arrangement='hourglass'))
    _, found = model(torch.randint(0, 11, (2, 20)), return_contributions=True)
    assert [list(each.norms) for each in found] == [[1], [4]]
    assert found[0].norms[1].shape == (2, 20, 2)
    assert found[1].norms[4].shape == (2, 10, 2)


def test_contributions_and_quantized_ids_in_chunks() -> None:
    model = build(dict(UNEVEN, merge='attention', merge_window=2, quantized_loss_weight=(0.0, 0.1, 0.1)))
    ids = torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        _, whole = model(ids, return_contributions=True)
        named = model(ids, return_quantized_ids=True)
        first, again, state = model(ids[:, :13], return_contributions=True, return_state=True)
        _, more, _ = model(ids[:, 13:], return_contributions=True, return_state=True, state=state)
        begun, state = model(ids[:, :13], return_quantized_ids=True, return_state=True)
        rest, _ = model(ids[:, 13:], return_quantized_ids=True, return_state=True, state=state)
    for x, y, z in zip(whole, again, more, strict=True):
        torch.testing.assert_close(torch.cat((y.norms[1], z.norms[1]), dim=1), x.norms[1])
        torch.testing.assert_close(torch.cat((y.weights[1], z.weights[1]), dim=1), x.weights[1])
    assert first.shape == (2, 13, 11)
    assert named[0] is begun[0] is rest[0] is None
    for x, y, z in zip(named[1:], begun[1:], rest[1:], strict=True):
        assert torch.equal(torch.cat((y, z), dim=1), x)
