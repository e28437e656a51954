"""Reversible layers: their streams, gradients and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import SEQ_LEN, UNEVEN, build
from support.kinds import KIND_BASE, loss_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.arrangements import reversible
from simple_hierarchical_transformer.ops.coupling import run_plainly
from simple_hierarchical_transformer.training.cost import bytes_kept


@pytest.mark.parametrize(
    'option', [dict(depth=3), dict(share_layers=True, merge='attention', merge_into='all')], ids=str
)
def test_reversible_gradients_equal_those_of_kept_activations(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(UNEVEN, window_sizes=(3, 0, None), reversible=True, **option)
    model, ids = build(config), torch.randint(0, 11, (2, 30))
    loss, _ = model(ids, return_loss=True)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    monkeypatch.setattr(reversible, 'run_couplings', lambda *args, modules: run_plainly(*args))
    plain, _ = model(ids, return_loss=True)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, list(model.parameters())), rtol=1e-9, atol=1e-12)


def test_reversible_streams_equal_their_definition() -> None:
    model, ids = build(dict(UNEVEN, reversible=True, merge_into=(1, 8))), torch.randint(0, 11, (2, 30))
    first = list(model(ids, return_hierarchical_token_embeds=True))
    second = list(first)
    for layer, merge in zip(model.layers, model.hierarchical_merges, strict=True):
        for j, block in enumerate(layer):
            first[j] = first[j] + block.within_phases(block.mixed, second[j])[0]
            second[j] = second[j] + block.within_phases(block.fed, first[j])[0]
        merged, _ = merge(second)
        first = [a + new - b for a, new, b in zip(first, merged, second, strict=True)]
    tokens = model(ids, return_hierarchical_embeds=True)
    for a, b, norm, x in zip(first, second, model.norms, tokens, strict=True):
        torch.testing.assert_close(x, norm((a + b) / 2))


def test_reversible_layers_keep_no_activations() -> None:
    def kept(depth: int, **changes: Any) -> int:
        config = dict(UNEVEN, dim=32, heads=2, depth=depth, recon_loss_weight=0.0, next_latent_loss_weight=0.0)
        model = HierarchicalTransformer(**{**config, **changes})
        return bytes_kept(model, torch.randint(0, 11, (2, SEQ_LEN)), return_loss=True)

    assert kept(8, reversible=True) == kept(2, reversible=True)
    assert kept(8) > 3 * kept(2)
    assert kept(8, reversible=True) < kept(2)


def test_ff_chunks_limit_the_largest_tensor_in_reversible_layers() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
            return out

    sizes = []
    for chunks in (1, 8):
        config = dict(num_tokens=11, dim=8, depth=2, seq_len=256, ff_mult=32, heads=1, dim_head=4)
        model = HierarchicalTransformer(**config, reversible=True, ff_chunks=chunks, next_latent_loss_weight=0.0)
        with Largest() as largest:
            model(torch.randint(0, 11, (1, 257)), return_loss=True)[0].backward()
        sizes.append(largest.size)
    assert sizes[1] < sizes[0] / 4


def test_reversible_runs_in_half_precision() -> None:
    model, ids = build(dict(UNEVEN, reversible=True)), torch.randint(0, 11, (2, 25))
    expected, _ = model(ids, return_loss=True)
    model = model.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = model(ids, return_loss=True)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=0.03, atol=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_reversible_layers_refuse_hooks_that_would_not_fire() -> None:
    model = HierarchicalTransformer(**KIND_BASE, reversible=True)
    handle = model.layers[1][0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    with pytest.raises(ValueError, match=r'hooks on layers\.1\.0 would not fire'):
        model(torch.randint(0, 13, (1, 9)))
    handle.remove()
    model(torch.randint(0, 13, (1, 9)))


def test_reversible_layers_refuse_second_derivatives() -> None:
    model = HierarchicalTransformer(**KIND_BASE, reversible=True)
    loss = loss_of(model, torch.randint(0, 13, (1, 9)))
    with pytest.raises(RuntimeError, match='reversible layers cannot be differentiated twice'):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
