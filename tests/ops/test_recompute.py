"""Layers that are computed again in the backward pass have the gradients of layers that are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.configs import TWO_LEVELS
from support.kinds import KIND_BASE, MAPS, loss_of
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import FeedForward, HierarchicalBlock
from simple_hierarchical_transformer.ops.coupling import run_plainly
from simple_hierarchical_transformer.ops.linear import Chain


def test_checkpointing_keeps_less_memory() -> None:
    def kept(**settings: Any) -> int:
        model, total = HierarchicalTransformer(**{**TWO_LEVELS, 'depth': 6, **settings}), 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.randint(0, 11, (2, 48)), return_loss=True)
        return total

    assert kept(gradient_checkpointing=True) < 0.5 * kept()


RECOMPUTED: list[dict[str, Any]] = [
    dict(gradient_checkpointing=True),
    dict(reversible=True),
    dict(ff_chunks=3),
    dict(gradient_checkpointing=True, arrangement='hourglass', ff_chunks=2),
]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which forward passes keep their activations for the backward pass."""

    @contextmanager
    def keeping() -> Iterator[None]:
        def call(fn: Any, modules: Any, *args: Any) -> Any:
            return fn(*args)

        with monkeypatch.context() as patch:
            patch.setattr('simple_hierarchical_transformer.block.recompute', call)
            patch.setattr('simple_hierarchical_transformer.arrangements.base.recompute', call)
            patch.setattr(
                'simple_hierarchical_transformer.arrangements.reversible.run_couplings',
                lambda *args, modules: run_plainly(*args),
            )
            yield

    return keeping


def recomputing(config: dict[str, Any], make: Any = None, seed: int = 0) -> HierarchicalTransformer:
    """A float64 model. `make` builds a module that replaces the activation of each feed-forward."""
    torch.manual_seed(seed)
    model = HierarchicalTransformer(**{**KIND_BASE, 'next_latent_loss_weight': 0.0, **config}).double()
    for block in model.modules():
        if make is not None and isinstance(block, FeedForward):
            block.net[2] = make()
    return model


def assert_same_gradients(keep: Any, build: Any, call: Any = loss_of, change: Any = None) -> HierarchicalTransformer:
    """Compares gradients with those of kept activations. `change` runs between the forward and backward pass."""
    ids, found = torch.randint(0, 13, (2, 33)), []
    for context in (keep, nullcontext):
        model = build()
        with context():
            loss = call(model, ids)
        parameters = list(model.parameters())
        if change is not None:
            change(model)
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    return model


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
@pytest.mark.parametrize('computed', [False, True])
def test_weights_of_a_functional_call_get_their_gradients(config: dict[str, Any], computed: bool, keep: Any) -> None:
    model, ids, found = recomputing(config), torch.randint(0, 13, (2, 33)), []
    given = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    for context in (keep, nullcontext):
        weights: dict[str, Tensor] = dict(given)
        if computed:
            # weights that are computed from each other
            first, second = 'layers.0.0.ff.net.1.weight', 'layers.0.0.ff.net.3.weight'
            weights[first] = given[first] * 1.5
            weights[second] = weights[first].t() * 2
        with context():
            loss, _ = torch.func.functional_call(model, weights, (ids,), dict(return_loss=True))
        found.append(torch.autograd.grad(loss, list(given.values()), allow_unused=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def change_mode(model: nn.Module) -> None:
    model.eval()


def add_hooks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MAPS):
            module.register_forward_hook(lambda module, args, output: 2 * output)


def replace_parts(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.net = Chain(nn.Identity())
        if isinstance(module, HierarchicalBlock):
            module.attn = copy.deepcopy(module.attn)


@pytest.mark.parametrize('change', [change_mode, add_hooks, replace_parts])
@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_a_change_after_the_forward_pass_does_not_affect_its_backward_pass(
    config: dict[str, Any], change: Any, keep: Any
) -> None:
    model = assert_same_gradients(keep, lambda: recomputing(config, lambda: nn.Dropout(0.5)), change=change)
    # the change is still there afterwards
    ff: Any = model.layers[0][0].ff  # type: ignore[index, union-attr]
    changed = {
        change_mode: not ff.net.training,
        add_hooks: bool(ff.net[0]._forward_hooks),
        replace_parts: len(ff.net) == 1,
    }
    assert changed[change]


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_a_hook_removed_before_the_backward_pass_still_counts(config: dict[str, Any], keep: Any) -> None:
    def call(model: nn.Module, ids: Tensor) -> Tensor:
        handles = [
            module.register_forward_hook(lambda module, args, kwargs, output: output.tanh(), with_kwargs=True)
            for module in model.modules()
            if isinstance(module, MAPS)
        ]
        loss = loss_of(model, ids)
        for handle in handles:
            handle.remove()
        return loss

    assert_same_gradients(keep, lambda: recomputing(config), call)


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_a_tensor_captured_by_a_hook_may_be_part_of_the_loss(config: dict[str, Any], keep: Any) -> None:
    def call(model: Any, ids: Tensor) -> Tensor:
        captured: list[Tensor] = []
        handle = model.layers[1][0].ff.net[1].register_forward_hook(lambda *given: captured.append(given[-1]))
        loss = loss_of(model, ids)
        handle.remove()
        return loss + captured[0].square().sum()

    assert_same_gradients(keep, lambda: recomputing(config), call)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_a_private_generator_of_a_module_repeats_its_numbers(config: dict[str, Any], keep: Any) -> None:
    def call(model: Any, ids: Tensor) -> Tensor:
        loss = loss_of(model, ids)
        after.append(model.layers[1][0].ff.net[2].generator.get_state())
        return loss

    after: list[Tensor] = []
    model: Any = assert_same_gradients(keep, lambda: recomputing(config, Noise), call)
    assert torch.equal(model.layers[1][0].ff.net[2].generator.get_state(), after[1])


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_weights_changed_before_the_backward_pass_are_refused(config: dict[str, Any]) -> None:
    model = recomputing(config)
    loss = loss_of(model, torch.randint(0, 13, (2, 33)))
    with torch.no_grad():
        # no other tensor that depends on it is kept
        model.layers[0][0].ff.net[0].gamma.mul_(2)  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match=r'changed in place after the forward pass|modified by an inplace operation'):
        loss.backward()


def test_an_in_place_activation_trains(keep: Any) -> None:
    places = iter((False, True))

    def build() -> HierarchicalTransformer:
        place = next(places)
        return recomputing({}, lambda: nn.SiLU(inplace=place))

    assert_same_gradients(keep, build)


def test_a_scripted_part_is_called(keep: Any) -> None:
    parts = iter((nn.GELU, lambda: torch.jit.script(nn.GELU())))
    assert_same_gradients(keep, lambda: recomputing({}, next(parts)))


@pytest.mark.parametrize(
    'option', [dict(gradient_checkpointing=True), dict(reversible=True)], ids=['checkpointing', 'reversible']
)
def test_buffers_are_updated_once_per_forward_pass(option: dict[str, Any]) -> None:
    """Recomputation with updated buffers would change the gradients."""
    config = dict(
        num_tokens=11, dim=8, depth=2, dim_head=4, heads=2, seq_len=32, hierarchies=(1, 2), window_sizes=4,
        reversible='reversible' in option,
    )  # fmt: skip
    ids, found = torch.randint(0, 11, (2, 24)), []
    for plainly in (False, True):
        torch.manual_seed(0)
        model = HierarchicalTransformer(**{**config, **({} if plainly else option)}).double()
        for name, module in list(model.named_modules()):
            if name.endswith('ff.net.1'):
                torch.nn.utils.parametrizations.spectral_norm(module)
        # with a state, reversible layers keep their activations
        extra = dict(return_state=True) if plainly else {}
        loss, *_ = model(ids, return_loss=True, **extra)
        loss.backward()
        found.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (gradients, buffers), (expected, written) = found
    torch.testing.assert_close(buffers, written)
    torch.testing.assert_close(gradients, expected)
