"""The same weights give the same numbers as the published package 0.4.0, to 1e-5 relative in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden import GOLDEN, Golden
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer

TOLERANCE = 1e-5


def assert_same(ours: Tensor, published: Tensor) -> None:
    difference = (ours.detach() - published.double()).norm()
    assert difference <= TOLERANCE * published.double().norm()


def test_there_are_ten_files() -> None:
    assert len(GOLDEN) == 10


def test_logits(golden: Golden) -> None:
    model, ids = golden.model(), golden.tensors['ids']
    assert_same(model(ids), golden.tensors['logits'])
    assert_same(model(ids, ablate_hierarchical_merge=True), golden.tensors['ablated_logits'])


def test_embeddings(golden: Golden) -> None:
    model, ids = golden.model(), golden.tensors['ids']
    for prefix, ours in (
        ('token_embeds/', model(ids, return_hierarchical_token_embeds=True)),
        ('embeds/', model(ids, return_hierarchical_embeds=True)),
    ):
        published = golden.under(prefix)
        assert len(published) == len(ours)
        for level, embeds in enumerate(ours):
            assert_same(embeds, published[str(level)])

    logits, embeds = model(ids, return_logits_and_embeds=True)
    assert_same(logits, golden.tensors['logits'])
    assert_same(embeds[-1], golden.tensors[f'embeds/{len(embeds) - 1}'])


@pytest.mark.parametrize('backend', ['flex', 'local-attention'])
def test_logits_of_other_backends(golden: Golden, backend: str) -> None:
    with torch.no_grad():
        assert_same(golden.model(attn_backend=backend)(golden.tensors['ids']), golden.tensors['logits'])


@pytest.mark.parametrize(
    'settings', [{}, dict(attn_backend='local-attention'), dict(gradient_checkpointing=True)], ids=str
)
def test_losses_and_gradients(golden: Golden, settings: dict[str, Any]) -> None:
    model = golden.model(**settings)
    loss, parts = model(golden.tensors['ids'], return_loss=True)
    loss.backward()

    assert_same(loss, golden.tensors['loss'])
    assert_same(parts.ce, golden.tensors['ce_loss'])
    assert_same(parts.next_latent, golden.tensors['next_latent_loss'])
    assert_same(parts.recon, golden.tensors['recon_loss'])

    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    published = golden.under('grad_norm/')
    assert norms.keys() == published.keys()
    for name, norm in norms.items():
        assert_same(norm, published[name])


def test_weights_survive_a_round_trip(golden: Golden) -> None:
    """Weights loaded from the published package can be saved and loaded again."""
    model, again = golden.model(), golden.model()
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(golden.tensors['ids']), again(golden.tensors['ids']))


def test_weights_load_as_part_of_another_module(golden: Golden) -> None:
    outer = torch.nn.ModuleDict({'inner': golden.model()})
    weights = {f'inner.{key}': value for key, value in golden.under('weights/').items()}
    outer.load_state_dict(weights)


def test_golden_weights_load_into_models_with_more_losses(golden: Golden) -> None:
    """Weights with heads for losses also load into models without them."""
    extra = dict(prophet_loss_weight=0.1, quantized_loss_weight=0.1)
    more = HierarchicalTransformer(**golden.config, **extra).double()
    missing, unexpected = more.load_state_dict(golden.model().state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(('to_prophet', 'to_quantized', 'quantizers', 'norms')) for name in missing)
    golden.model().load_state_dict(more.state_dict())
    torch.testing.assert_close(more(golden.tensors['ids']), golden.model()(golden.tensors['ids']))
