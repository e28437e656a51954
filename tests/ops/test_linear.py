"""The faster linear kernels against `F.linear`, with gradients, and where they must not run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simple_hierarchical_transformer.compressors import Windows
from simple_hierarchical_transformer.ops import linear as module
from simple_hierarchical_transformer.ops.linear import HAS_ONEDNN, MIN_WEIGHT, Chain, chain, linear
from simple_hierarchical_transformer.ops.norm import RMSNorm


@pytest.mark.parametrize('shape', [(512,), (1, 512), (2, 1, 512), (7, 512), (2, 3, 512), (2, 0, 512)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dim_out', [300, 320, 1100])
@pytest.mark.parametrize('strided', [True, False])
@pytest.mark.parametrize('train', [True, False])
def test_all_kernels_agree(shape: tuple[int, ...], dim_out: int, bias: bool, strided: bool, train: bool) -> None:
    layer = nn.Linear(512, dim_out, bias=bias)
    x = torch.randn(*shape[:-1], 1024)[..., ::2] if strided else torch.randn(shape)
    x.requires_grad_(train)
    with torch.set_grad_enabled(train):
        ours, expected = chain(x, layer), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.is_contiguous()
    if train:
        inputs, weights = (x, *layer.parameters()), torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(expected, inputs, weights),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_gradients_of_gradients_and_function_transforms() -> None:
    layer, x = nn.Linear(256, 256), torch.randn(3, 256, requires_grad=True)

    def penalty(run: torch.nn.Module | object) -> torch.Tensor:
        (grad,) = torch.autograd.grad(run(x).tanh().sum(), x, create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    expected = penalty(lambda x: F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(penalty(lambda x: chain(x, layer)), expected, rtol=1e-4, atol=1e-4)

    def loss(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return linear(row, weight).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight.detach(), x.detach()[:, None])
    torch.testing.assert_close(each[1], torch.func.grad(loss)(layer.weight.detach(), x.detach()[1:2]))


@pytest.mark.skipif(not HAS_ONEDNN, reason='this build of PyTorch has no oneDNN')
def test_serves_only_large_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = F.linear
    monkeypatch.setattr(module.F, 'linear', lambda *args: called.append(1) or real(*args))

    def falls_back(dtype: torch.dtype = torch.float32, size: int = 512) -> bool:
        called.clear()
        linear(torch.randn(1, size, dtype=dtype), torch.randn(MIN_WEIGHT // 512, size, dtype=dtype))
        return bool(called)

    assert not falls_back()
    assert falls_back(dtype=torch.float64)
    assert falls_back(dtype=torch.bfloat16)
    assert falls_back(size=256)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert falls_back()


def parts(dim: int) -> list[Callable[[Tensor], Tensor]]:
    norms: list[nn.Module] = [RMSNorm(dim), nn.LayerNorm(dim)]
    for norm in norms:
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
    return [*norms, nn.GELU(), nn.SiLU(), partial(Windows(4, 2), offset=1)]


@pytest.mark.parametrize('kind', range(5))
@pytest.mark.parametrize('dim', [6, 160])  # small weights run on F.linear, large ones on oneDNN
@pytest.mark.parametrize('trained', ['all', 'weight', 'input'])
def test_recomputed_parts_have_the_same_gradients(kind: int, dim: int, trained: str) -> None:
    torch.manual_seed(0)
    after = parts(dim)[kind]
    x = torch.randn(2, 9, dim, requires_grad=trained != 'weight')
    layer = nn.Linear(after(x).shape[-1], 224).requires_grad_(trained != 'input')
    own = list(after.parameters()) if isinstance(after, nn.Module) and trained == 'all' else []
    inputs = [t for t in (x, *layer.parameters(), *own) if t.requires_grad]

    ours, expected = chain(x, after, layer), F.linear(after(x), layer.weight, layer.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(expected, inputs, weights),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize('kind', range(5))
def test_gradients_of_gradients_through_a_part(kind: int) -> None:
    torch.manual_seed(0)
    after = parts(6)[kind]
    if isinstance(after, nn.Module):
        after.double()
    x = torch.randn(1, 7, 6, dtype=torch.double, requires_grad=True)
    layer = nn.Linear(after(x).shape[-1], 3, dtype=torch.double)
    assert torch.autograd.gradgradcheck(
        lambda x, weight, bias: linear(x, weight, bias, after), (x, *layer.parameters())
    )


def test_per_sample_gradients_through_a_chain() -> None:
    net = Chain(RMSNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 2))
    params, rows = dict(net.named_parameters()), torch.randn(3, 6)

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, rows)
    for i, row in enumerate(rows):
        found = torch.autograd.grad(loss(params, row), list(params.values()))
        for name, grad in zip(params, found, strict=True):
            torch.testing.assert_close(each[name][i], grad)


def test_swapped_parameters_get_the_gradients() -> None:
    """The backward pass computes the norm again with the parameters of the forward pass, not those of the module."""
    net, x = Chain(RMSNorm(6), nn.Linear(6, 9)), torch.randn(4, 6)
    swapped = {name: torch.rand_like(p).requires_grad_() for name, p in net.named_parameters()}
    found = torch.autograd.grad(torch.func.functional_call(net, swapped, (x,)).square().sum(), list(swapped.values()))
    for (_, parameter), new in zip(net.named_parameters(), swapped.values(), strict=True):
        parameter.data.copy_(new)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(found, expected)


def test_a_graph_of_gradients_counts_each_path_once() -> None:
    """A chain applied to its own output: with `create_graph`, the second input depends on the parameters."""
    net, x = (
        Chain(RMSNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).double(),
        torch.randn(4, 6, dtype=torch.double),
    )
    params = list(net.parameters())
    once, kept = (
        torch.autograd.grad(net(net(x)).square().sum(), params, create_graph=create) for create in (False, True)
    )
    torch.testing.assert_close(kept, once)


def test_parameters_replaced_by_tensors_get_gradients() -> None:
    """Wrappers that shard or replicate a module do this."""
    net, x = Chain(RMSNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(4, 6)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    leaves = [p.detach().requires_grad_() for p in net.parameters()]
    for (name, _), leaf in zip(list(net.named_parameters()), leaves, strict=True):
        owner, _, own = name.rpartition('.')
        module = net.get_submodule(owner)
        del module._parameters[own]
        setattr(module, own, leaf * 1)
    found = torch.autograd.grad(net(x).square().sum(), leaves)
    torch.testing.assert_close(found, expected)


def test_autocast_keeps_the_gradient_of_a_weight_used_twice() -> None:
    layer, norm, x = nn.Linear(16, 16, bias=False), RMSNorm(16), torch.randn(3, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = F.linear(chain(x, norm, layer), layer.weight)
        expected = F.linear(F.linear(norm(x), layer.weight), layer.weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        torch.autograd.grad(out.float().square().sum(), layer.weight),
        torch.autograd.grad(expected.float().square().sum(), layer.weight),
        rtol=0.05, atol=0.5,
    )  # fmt: skip


def test_stores_only_the_inputs_of_parts() -> None:
    net, x = Chain(nn.GELU(), nn.Linear(64, 8), nn.SiLU(), nn.Linear(8, 8)), torch.randn(100, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x)
    shapes = [tuple(t.shape) for t in kept if not isinstance(t, nn.Parameter)]
    assert sorted(shapes) == [(100, 8), (100, 64)]
