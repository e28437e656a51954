"""Merges against their definitions, computed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import UNEVEN, build, level
from support.reference import attended
from torch import nn

from simple_hierarchical_transformer.merges.attention import AttentionMerge
from simple_hierarchical_transformer.merges.concat import ConcatMerge
from simple_hierarchical_transformer.merges.linear import LinearMerge


def test_merge_adds_the_pooled_tokens_at_each_position() -> None:
    levels = (level(1, 1, 6), level(4, 4, 3), level(2, 1, 5))
    merge = ConcatMerge(levels, recipients=(0, 1, 2))
    tokens = [torch.randn(2, 10, 6), torch.randn(2, 3, 3), torch.randn(2, 10, 5)]
    merged, _ = merge(tokens)

    for i in range(10):
        here = torch.cat([tokens[0][:, i], tokens[1][:, i // 4], tokens[2][:, i]], dim=-1)
        fine, coarse, middle = merge.net(here).split((6, 3, 5), dim=-1)
        torch.testing.assert_close(merged[0][:, i], tokens[0][:, i] + fine)
        torch.testing.assert_close(merged[2][:, i], tokens[2][:, i] + middle)
        if i % 4 == 0:
            torch.testing.assert_close(merged[1][:, i // 4], tokens[1][:, i // 4] + coarse)


def test_merge_leaves_levels_that_receive_nothing() -> None:
    merge = ConcatMerge((level(), level(2)), recipients=(1,))
    tokens = [torch.randn(1, 4, 6), torch.randn(1, 4, 6)]
    merged, _ = merge(tokens)
    assert merged[0] is tokens[0]
    assert not torch.equal(merged[1], tokens[1])


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('strides', [(1, 4, 2), (2, 4, 1)])
def test_attention_merge_equals_its_definition(window: int, strides: tuple[int, ...]) -> None:
    dims, into = (6, 3, 5), (0, 1)
    levels = [level(c, s, d) for c, s, d in zip((2, 8, 4), strides, dims, strict=True)]
    merge = AttentionMerge(levels, into, window=window).double()
    for parameter in merge.parameters():
        nn.init.normal_(parameter)
    n = 11
    tokens = [torch.randn(2, -(-n // s), d, dtype=torch.float64) for s, d in zip(strides, dims, strict=True)]
    merged, _ = merge(tokens)
    assert merged[2] is tokens[2]
    for i in into:
        for j in range(tokens[i].shape[1]):
            torch.testing.assert_close(merged[i][:, j], tokens[i][:, j] + attended(merge, tokens, strides, i, j))


@pytest.mark.parametrize('strides', [(1, 1, 1), (1, 4, 2), (4, 2, 1)])
def test_concat_merge_equals_its_definition(strides: tuple[int, ...]) -> None:
    dims, into = (6, 3, 5), (0, 1)
    levels = [level(c, s, d) for c, s, d in zip((4, 8, 2), strides, dims, strict=True)]
    merge = ConcatMerge(levels, into).double()
    n = 11
    tokens = [torch.randn(2, -(-n // s), d, dtype=torch.float64) for s, d in zip(strides, dims, strict=True)]
    merged, _ = merge(tokens)
    assert merged[2] is tokens[2]
    for i, columns in zip(into, (slice(0, 6), slice(6, 9)), strict=True):
        for j in range(tokens[i].shape[1]):
            position = j * strides[i]
            joined = torch.cat([x[:, position // s] for x, s in zip(tokens, strides, strict=True)], dim=-1)
            torch.testing.assert_close(merged[i][:, j], tokens[i][:, j] + merge.net(joined)[:, columns])


@pytest.mark.parametrize('merge', ['concat', 'attention'])
def test_merges_do_not_depend_on_the_losses(merge: str) -> None:
    """A loss trains the last tokens of a level. Weights load with and without it, and all outputs stay the same."""
    config = dict(UNEVEN, merge=merge, merge_into='all', recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    off, on = build(config), build(dict(config, prophet_loss_weight=0.1), seed=1)
    ids = torch.randint(0, 11, (2, 20))
    off.load_state_dict(on.state_dict())
    for requested in ('return_hierarchical_embeds', 'return_contributions'):
        torch.testing.assert_close(off(ids, **{requested: True}), on(ids, **{requested: True}))
    missing, unexpected = on.load_state_dict(off.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith('to_prophet') for name in missing)


@pytest.mark.parametrize('reversible', [False, True])
def test_the_last_merge_computes_only_the_receivers_that_are_read(reversible: bool) -> None:
    """Outputs that nothing reads are not computed. They are computed when requested, in chunks too."""
    no_losses = dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model = build(dict(UNEVEN, merge='attention', merge_into='all', merge_window=2, reversible=reversible, **no_losses))
    last: Any = model.hierarchical_merges[-1]
    computed: list[str] = []
    for i, receiver in last.receivers.items():
        receiver.to_q.register_forward_hook(lambda *_, i=i: computed.append(i))

    def receivers_of(**requested: bool) -> list[str]:
        computed.clear()
        model(ids, **requested)
        return computed

    ids = torch.randint(0, 11, (2, 21))
    for requested in ({}, {'return_loss': True}, {'return_state': True}):
        assert receivers_of(**requested) == ['0']
    for name in ('return_hierarchical_embeds', 'return_logits_and_embeds', 'return_contributions'):
        assert receivers_of(**{name: True}) == ['0', '1', '2']

    logits, embeds = model(ids, return_logits_and_embeds=True)
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-12)
    # the state after a chunk does not depend on which outputs were requested
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, state = model(ids[:, :9], return_state=True)
            rest, more, _ = model(ids[:, 9:], return_logits_and_embeds=True, state=state, return_state=True)
        torch.testing.assert_close(rest, logits[:, 9:], rtol=0, atol=1e-12)
        for each, whole, part in zip(model.levels, embeds, more, strict=True):
            torch.testing.assert_close(part, whole[:, each.length(9) :], rtol=0, atol=1e-12)


def test_merges_change_the_named_receivers_only() -> None:
    ids, plain = torch.randint(0, 11, (2, 20)), build(UNEVEN)
    for into, receive in (('predict', {0}), ('all', {0, 1, 2}), ((8, 1), {0, 1}), ((1,), {0})):
        model = build(dict(UNEVEN, merge_into=into, depth=1))
        final, unmerged = (
            model(ids, return_hierarchical_embeds=True, ablate_hierarchical_merge=ablated) for ablated in (False, True)
        )
        assert {i for i in range(3) if not torch.equal(final[i], unmerged[i])} == receive
    older, newer = build(dict(UNEVEN, hierarchy_merge_all=True)), build(dict(UNEVEN, merge_into='all'))
    assert torch.equal(older(ids), newer(ids))
    assert torch.equal(build(dict(UNEVEN, merge_into=(1,)))(ids), plain(ids))


@pytest.mark.parametrize('recipients', [(0,), (1,), (0, 2, 1)])
def test_linear_merge_equals_its_definition(recipients: tuple[int, ...]) -> None:
    dims, strides, n = (4, 6, 5), (1, 4, 2), 11
    levels = [level(c, s, d) for c, s, d in zip((1, 4, 2), strides, dims, strict=True)]
    merge = LinearMerge(levels, recipients).double()
    tokens = [torch.randn(2, each.length(n), each.dim, dtype=torch.float64) for each in levels]
    merged, _ = merge(tokens)
    for i, x in enumerate(tokens):
        expected = x.clone()
        for j in range(3) if i in recipients else ():
            if j == i:
                continue
            # the weights of a sender hold the rows of its recipients one after another
            others = [k for k in recipients if k != j]
            first = sum(dims[k] for k in others[: others.index(i)])
            weight = merge.to_others[j].weight[first : first + dims[i]]  # type: ignore[index]
            for t in range(x.shape[1]):
                other = tokens[j][:, t * strides[i] // strides[j]]
                expected[:, t] += merge.norms[j](other) @ weight.T  # type: ignore[operator]
        torch.testing.assert_close(merged[i], expected, rtol=0, atol=1e-12)
