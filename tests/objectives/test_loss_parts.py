"""The parts of the loss: names, weights, labels, segments and shares of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import STRIDED, THREE, UNEVEN, build, configs
from torch import Tensor
from torch.utils._pytree import tree_map

from simple_hierarchical_transformer import HierarchicalTransformer, LossParts


def test_parts_are_named_and_unpack_as_four() -> None:
    model = HierarchicalTransformer(
        **{**UNEVEN, 'next_latent_loss_weight': (0.1, 0.0, 0.0)}, prophet_loss_weight=0.1,
        quantized_loss_weight=(0.0, 0.0, 0.1), autoencoder=True, autoencoder_loss_weight=0.3,
    )  # fmt: skip
    _, parts = model(torch.randint(0, 11, (2, 25)), return_loss=True)
    weights = {
        'ce': 1.0, 'recon/8x': 0.1, 'recon/4x': 0.1, 'prophet/8x': 0.1, 'prophet/4x': 0.1, 'quantized/4x': 0.1,
        'next_latent/1x': 0.1, 'autoencoder': 0.3,
    }  # fmt: skip
    assert model.loss_weights == weights
    assert list(parts.named) == list(weights)
    ce, next_latent, recon, per_hierarchy = parts
    assert (ce, recon) == (parts.ce, parts.recon) == (parts[0], parts[2])
    assert len(parts) == 4
    torch.testing.assert_close(recon, parts.named['recon/8x'] + parts.named['recon/4x'])
    torch.testing.assert_close(next_latent, 0.1 * per_hierarchy[0])
    assert per_hierarchy[1] == 0

    # wrappers of models map over their outputs
    halved = tree_map(lambda t: t / 2, parts)
    assert isinstance(halved, LossParts)
    torch.testing.assert_close(halved.named['prophet/8x'], parts.named['prophet/8x'] / 2)
    # comparing two is no error
    assert parts != halved


def test_parts_unpack_as_the_published_four() -> None:
    loss, (ce, next_latent, recon, per_hierarchy) = HierarchicalTransformer(**THREE)(
        torch.randint(0, 11, (2, 33)), return_loss=True
    )
    assert loss.ndim == ce.ndim == next_latent.ndim == recon.ndim == 0
    assert len(per_hierarchy) == 3


def test_labels_are_the_targets_of_all_ids() -> None:
    model, ids = build(THREE), torch.randint(1, 11, (2, 34))
    shifted = model(ids, return_loss=True)
    given = model(ids[:, :-1], return_loss=True, labels=ids[:, 1:])
    for x, y in zip((shifted[0], *shifted[1][:3]), (given[0], *given[1][:3]), strict=True):
        assert torch.equal(x, y)


def test_some_or_all_labels_may_be_ignored() -> None:
    model = build(dict(THREE, ignore_index=-100))
    ids = torch.randint(0, 11, (1, 20))
    labels = torch.randint(0, 11, (1, 20))
    labels[:, 5:] = -100
    _, parts = model(ids, return_loss=True, labels=labels)
    expected = F.cross_entropy(model(ids)[0, :5], labels[0, :5])
    torch.testing.assert_close(parts.ce, expected)

    loss, parts = model(ids, return_loss=True, labels=torch.full_like(labels, -100))
    assert parts.ce == 0
    assert loss.isfinite()


@pytest.mark.parametrize('config', [THREE, STRIDED, dict(STRIDED, hierarchies=(1, 8), hierarchical_stride=(1, 8))])
@pytest.mark.parametrize('split', [1, 3, 16])
def test_losses_of_a_segment(config: dict[str, Any], split: int) -> None:
    """The cross entropy uses the state. Auxiliary losses use the segment only."""
    config = dict(config, ignore_index=-1)
    model, ids = build(config), torch.randint(0, 11, (2, 33))
    _, whole = model(ids, return_loss=True)
    total, state = 0.0, None
    for at in range(0, 32, split):
        segment = ids[:, at : min(at + split, 32) + 1]
        loss, parts, state = model(segment, state=state, return_loss=True, return_state=True)
        assert loss.isfinite()
        total = total + parts.ce * (segment.shape[1] - 1)
        if at == 0:
            alone, _ = model(segment, return_loss=True)
            torch.testing.assert_close(loss, alone)
        loss.backward()
        state = state.detach()
    torch.testing.assert_close(total / 32, whole.ce)
    assert state.position == 32


def test_a_training_step_runs_on_the_meta_device() -> None:
    with torch.device('meta'):
        model = HierarchicalTransformer(num_tokens=256, dim=64, depth=1, hierarchies=(1, 4), window_sizes=(8, None))
        loss, _ = model(torch.zeros(1, 64, dtype=torch.long), return_loss=True)
    loss.backward()
    assert model.to_logits.weight.grad.device.type == 'meta'


@given(config=configs(), chunked=st.booleans(), shifted=st.booleans())
@settings(max_examples=25)
def test_shares_of_a_batch_sum_to_its_loss(config: dict[str, Any], chunked: bool, shifted: bool) -> None:
    """Losses of single rows, divided by the counts of the whole batch, add up to its loss and gradients."""
    config = {**config, 'ignore_index': 0, 'recon_ignore_index': 0}
    model = build(config)
    ids = torch.randint(1, 11, (3, 20))
    # one row has few targets, and one has none
    ids[0, 7:] = 0
    ids[1] = 0
    labels = None if shifted else torch.randint(0, 11, ids.shape)

    state = None
    if chunked:
        with torch.no_grad():
            _, state = model(torch.randint(0, 11, (3, 5)), return_state=True)
    position = 5 if chunked else 0

    def loss_of(rows: slice, counts: Tensor) -> Tensor:
        of = None if state is None else state.select(list(range(*rows.indices(3))))
        its = None if labels is None else labels[rows]
        got = model(
            ids[rows], return_loss=True, labels=its, counts=counts, state=of, return_state=of is not None
        )  # fmt: skip
        return got[0]

    def counts_of(rows: slice) -> Tensor:
        return model.count_targets(ids[rows], None if labels is None else labels[rows], position=position)

    whole = model(ids, return_loss=True, labels=labels, state=state and state.clone(), return_state=chunked)[0]
    parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
    counts = torch.stack([counts_of(rows) for rows in parts]).sum(0)
    assert torch.equal(counts, counts_of(slice(0, 3)))
    shares = sum(loss_of(rows, counts) for rows in parts)
    torch.testing.assert_close(shares, whole, rtol=1e-9, atol=1e-9)

    weights = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(shares, weights), torch.autograd.grad(whole, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
