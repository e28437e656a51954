"""Modules, norms and classes that a user replaces take effect."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.kinds import KIND_BASE, KINDS, loss_of
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.compressors import by_window
from simple_hierarchical_transformer.ops.linear import Chain, chain
from simple_hierarchical_transformer.ops.norm import RMSNorm


@pytest.mark.parametrize('kind', ['attention', 'checkpointed', 'reversible', 'hourglass'])
def test_replaced_norms_and_activations_are_trained(kind: str) -> None:
    model = HierarchicalTransformer(**{**KIND_BASE, **KINDS[kind]})
    added = []
    for layer in model.layers:
        for block in layer:  # type: ignore[union-attr]
            block.attn.norm = nn.RMSNorm(block.ff.dim)
            block.ff.net[0] = nn.LayerNorm(block.ff.dim, elementwise_affine=False)
            if isinstance(block.ff.net[2], nn.GELU):
                block.ff.net[2] = nn.PReLU()
                added.append(block.ff.net[2].weight)
            added.append(block.attn.norm.weight)
    loss_of(model, torch.randint(0, 13, (2, 33))).backward()
    for parameter in added:
        assert parameter.grad is not None
        assert parameter.grad.any()


@pytest.mark.parametrize('kind', ['attention', 'reversible', 'checkpointed'])
def test_a_compiled_norm_trains(kind: str) -> None:
    ids = torch.randint(0, 13, (1, 9))
    model = HierarchicalTransformer(**{**KIND_BASE, **KINDS[kind], 'depth': 1})
    expected = torch.autograd.grad(loss_of(model, ids), list(model.parameters()))
    norm = model.layers[0][0].attn.norm  # type: ignore[index, union-attr]
    model.layers[0][0].attn.norm = torch.compile(norm, backend='aot_eager')  # type: ignore[index, union-attr]
    model.layers[0][0].ff.net[1].compile(backend='aot_eager')  # type: ignore[index, union-attr]
    found = torch.autograd.grad(loss_of(model, ids), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class DropoutMixer(nn.Module):
    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, state: Any = None, start: int = 0) -> tuple[Tensor, Any]:
        return self.dropout(self.to_out(x)).tanh(), state

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return ()


@pytest.mark.parametrize('changes', [dict(gradient_checkpointing=True), dict(reversible=True), dict(ff_chunks=3)])
def test_dropout_draws_the_same_numbers_when_layers_are_computed_again(changes: dict[str, Any]) -> None:
    model = HierarchicalTransformer(**KIND_BASE, **changes, mixer=DropoutMixer, next_latent_loss_weight=0).double()
    for layer in model.layers:
        for block in layer:  # type: ignore[union-attr]
            block.ff.net[2] = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    ids = torch.randint(0, 13, (2, 33))
    loss_of(model, ids).backward()
    after = torch.rand(1)
    names = ('token_emb.weight', 'layers.0.1.attn.to_out.weight', 'layers.1.0.ff.net.1.weight')
    for parameter in map(model.get_parameter, names):
        # central differences with the same dropout mask
        place, step = (3, 2), 1e-6
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter[place] += sign * step
                ends.append(loss_of(model, ids))
                parameter[place] -= sign * step
        torch.testing.assert_close(parameter.grad[place], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    # the backward pass restores the state of the generator
    loss_of(model, ids)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize('kind', ['reversible', 'shared', 'all losses'])
def test_replicas_of_data_parallel_have_all_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # replication needs CUDA: here a replica gets views instead of copies
    module = importlib.import_module('torch.nn.parallel.replicate')
    monkeypatch.setattr(module, '_get_device_index', lambda device, _: device)
    monkeypatch.setattr(
        module, '_broadcast_coalesced_reshape', lambda tensors, devices, detach=False: [[t.view_as(t) for t in tensors]]
    )
    model = HierarchicalTransformer(**{**KIND_BASE, **KINDS[kind]}).double()
    ids = torch.randint(0, 13, (2, 33))
    expected = torch.autograd.grad(loss_of(model, ids), list(model.parameters()), allow_unused=True)
    (replica,) = module.replicate(model, [0])
    found = torch.autograd.grad(loss_of(replica, ids), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_chains_within_chains_and_inserted_layers_are_trained() -> None:
    model = HierarchicalTransformer(**{**KIND_BASE, 'merge_into': 'all'})
    ff = model.layers[0][0].ff  # type: ignore[index, union-attr]
    ff.net = Chain(Chain(*ff.net[:3]), ff.net[3])
    model.hierarchical_merges[0].net.insert(3, nn.PReLU())  # type: ignore[union-attr, operator]
    model.compressors[1].compress_fn.insert(3, nn.PReLU())  # type: ignore[union-attr, operator]
    loss_of(model, torch.randint(0, 13, (2, 33))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_weight_of_a_subclass_before_a_plain_map_is_trained() -> None:
    class Weight(nn.Parameter):
        pass

    first, second = nn.Linear(4, 5), nn.Linear(5, 2)
    first.weight = Weight(first.weight.detach())
    chain(torch.randn(3, 4), first, second).sum().backward()
    assert first.weight.grad is not None
    assert first.bias.grad is not None


@pytest.mark.parametrize('kind', [RMSNorm, nn.Linear, nn.LayerNorm])
def test_a_patched_class_takes_effect(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = HierarchicalTransformer(**KIND_BASE), torch.randint(0, 13, (2, 33))
    with torch.no_grad():
        logits = model(ids)
    loss, old = loss_of(model, ids), kind.forward
    monkeypatch.setattr(kind, 'forward', lambda self, x: 2 * old(self, x))
    assert not torch.allclose(loss_of(model, ids), loss)
    with torch.no_grad():
        assert not torch.allclose(model(ids), logits)


@pytest.mark.parametrize('settings', [dict(groups=2), dict(padding=1), dict(dilation=2, padding=2)])
def test_a_convolution_with_other_settings_is_called(settings: dict[str, Any]) -> None:
    conv = nn.Conv1d(4, 6, 3, **settings)
    windows = torch.randn(2, 5, 12)
    expected = conv(windows.view(10, 4, 3))[..., 0].view(2, 5, 6)
    torch.testing.assert_close(chain(windows, by_window(conv, 3)), expected)
