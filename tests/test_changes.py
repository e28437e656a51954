"""What a user changes takes effect: wrapped and replaced modules, hooks, dropout, adapters, quantized weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, configs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import FeedForward, HierarchicalBlock
from simple_hierarchical_transformer.compressors import by_window
from simple_hierarchical_transformer.ops.coupling import run_plainly
from simple_hierarchical_transformer.ops.cross_entropy import cross_entropy
from simple_hierarchical_transformer.ops.linear import Chain, chain
from simple_hierarchical_transformer.ops.norm import RMSNorm
from simple_hierarchical_transformer.ops.scan import scan
from simple_hierarchical_transformer.training.settings import PRESETS

SMALL: dict[str, Any] = dict(
    num_tokens=13,
    dim=16,
    depth=2,
    seq_len=48,
    dim_head=8,
    heads=2,
    hierarchies=(1, 4),
    hierarchical_stride=(1, 2),
    window_sizes=(4, None),
    ignore_index=-1,
)
# one of each mixer, compressor, merge, head and arrangement
KINDS: dict[str, dict[str, Any]] = {
    'attention': {},
    'lsh': dict(mixer='lsh', mixer_kwargs=dict(buckets=4, entries=8)),
    'gateloop': dict(mixer='gateloop'),
    'simple-gateloop': dict(mixer='simple-gateloop'),
    's4d': dict(mixer='s4d'),
    'h3': dict(mixer='h3'),
    'hyena': dict(mixer='hyena'),
    'all losses': dict(prophet_loss_weight=0.2, quantized_loss_weight=0.2, num_rollouts=2),
    'autoencoder': dict(autoencoder=True, autoencoder_loss_weight=0.1, dim=(16, 12)),
    'linear': dict(compressor='linear', merge='linear', merge_into='all', dim=(16, 12)),
    'pooled': dict(compressor='attention', merge='attention', merge_window=1, merge_into='all'),
    'mean': dict(compressor='mean', hierarchies=(4, 1), hierarchical_stride=(4, 1), dim=(12, 16), merge_into='all'),
    'hourglass': dict(arrangement='hourglass', residual='gru', ff_activation='swiglu', dim=(16, 12)),
    'reversible': dict(reversible=True),
    'checkpointed': dict(gradient_checkpointing=True, ff_chunks=2),
    'shared': dict(share_layers=True, halting='act', ff_activation='relu2', mixer_kwargs=dict(qk_norm=True)),
}
MAPS = (nn.Linear, nn.Conv1d, nn.LayerNorm, RMSNorm)


class Scaled(nn.Module):
    """What an adapter does: the module's output, times a number that is learnt. It has no other attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in another's place, under all the names that it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                setattr(parent, name, new)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(ids, return_loss=True)[0]


def read_in_chunks(model: HierarchicalTransformer, ids: Tensor) -> Tensor:
    state, found = None, []
    for chunk in ids.split([3, 1, ids.shape[1] - 4], dim=1):
        logits, state = model(chunk, state=state, return_state=True)
        found.append(logits)
    return torch.cat(found, dim=1)


@settings(max_examples=40)
@given(config=configs(), kind=st.sampled_from(MAPS))
def test_a_wrapped_map_or_norm_takes_effect_wherever_it_stands(config: dict[str, Any], kind: type[nn.Module]) -> None:
    """A map's or norm's output is linear in its parameters, so a scale of 1 has the gradient sum(p * p.grad)."""
    ids = torch.randint(0, 11, (2, 19))
    model = build(config)
    wrapped = copy.deepcopy(model)
    loss = loss_of(model, ids)
    loss.backward()
    pairs = []
    for module, twin in zip(list(model.modules()), list(wrapped.modules()), strict=True):
        if isinstance(module, kind) and any(p.grad is not None for p in module.parameters()):
            pairs.append((module, Scaled(twin)))
            replace(wrapped, twin, pairs[-1][1])

    again = loss_of(wrapped, ids)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    again.backward()
    for module, scaled in pairs:
        expected = sum((p.detach() * p.grad).sum() for p in module.parameters() if p.grad is not None)
        assert scaled.scale.grad is not None, module
        torch.testing.assert_close(scaled.scale.grad, expected, rtol=1e-8, atol=1e-10)

    # a scale of 1.5 does what parameters that are 1.5 times as large do, in a pass and in chunks
    with torch.no_grad():
        for module, scaled in pairs:
            scaled.scale.fill_(1.5)
            for parameter in module.parameters():
                parameter.mul_(1.5)
        torch.testing.assert_close(wrapped(ids), model(ids), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(read_in_chunks(wrapped, ids), read_in_chunks(model, ids), rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(config=configs(), backward=st.booleans())
def test_hooks_fire_and_see_what_the_module_reads_and_gives(config: dict[str, Any], backward: bool) -> None:
    """On every module, with numbers that stay the same. What a map or a norm got and gave fits its own formula."""
    config = {**config, 'reversible': False}
    ids = torch.randint(0, 11, (2, 19))
    model = build(config)
    expected = loss_of(model, ids)
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    fired: set[nn.Module] = set()

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fired.add(module)
        if type(module) in MAPS:
            torch.testing.assert_close(type(module).forward(module, *args), output, rtol=1e-10, atol=1e-10)

    for module in model.modules():
        if backward:
            module.register_full_backward_hook(lambda module, *_: fired.add(module) and None)
        else:
            module.register_forward_hook(check)
    loss = loss_of(model, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, gradients, rtol=1e-8, atol=1e-9)
    trained = {id(p) for p, grad in zip(model.parameters(), gradients, strict=True) if grad is not None}
    for name, module in model.named_modules():
        if type(module) in MAPS and any(id(p) in trained for p in module.parameters()):
            assert module in fired, name


@pytest.mark.parametrize('kind', ['attention', 'checkpointed', 'reversible', 'hourglass'])
def test_replaced_norms_and_activations_are_trained(kind: str) -> None:
    model = HierarchicalTransformer(**{**SMALL, **KINDS[kind]})
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
    model = HierarchicalTransformer(**{**SMALL, **KINDS[kind], 'depth': 1})
    expected = torch.autograd.grad(loss_of(model, ids), list(model.parameters()))
    norm = model.layers[0][0].attn.norm  # type: ignore[index, union-attr]
    model.layers[0][0].attn.norm = torch.compile(norm, backend='aot_eager')  # type: ignore[index, union-attr]
    model.layers[0][0].ff.net[1].compile(backend='aot_eager')  # type: ignore[index, union-attr]
    found = torch.autograd.grad(loss_of(model, ids), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_reversible_layers_refuse_hooks_that_would_not_fire() -> None:
    model = HierarchicalTransformer(**SMALL, reversible=True)
    handle = model.layers[1][0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    with pytest.raises(ValueError, match=r'hooks on layers\.1\.0 would not fire'):
        model(torch.randint(0, 13, (1, 9)))
    handle.remove()
    model(torch.randint(0, 13, (1, 9)))


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
    model = HierarchicalTransformer(**SMALL, **changes, mixer=DropoutMixer, next_latent_loss_weight=0).double()
    for layer in model.layers:
        for block in layer:  # type: ignore[union-attr]
            block.ff.net[2] = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    ids = torch.randint(0, 13, (2, 33))
    loss_of(model, ids).backward()
    after = torch.rand(1)
    names = ('token_emb.weight', 'layers.0.1.attn.to_out.weight', 'layers.1.0.ff.net.1.weight')
    for parameter in map(model.get_parameter, names):
        # central differences, with the same dropout each time
        place, step = (3, 2), 1e-6
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter[place] += sign * step
                ends.append(loss_of(model, ids))
                parameter[place] -= sign * step
        torch.testing.assert_close(parameter.grad[place], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    # the backward pass leaves the generator where the forward pass left it
    loss_of(model, ids)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize('kind', ['reversible', 'shared', 'all losses'])
def test_replicas_of_data_parallel_have_all_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # its replication is for CUDA alone: here each replica gets views in place of copies
    module = importlib.import_module('torch.nn.parallel.replicate')
    monkeypatch.setattr(module, '_get_device_index', lambda device, _: device)
    monkeypatch.setattr(
        module, '_broadcast_coalesced_reshape', lambda tensors, devices, detach=False: [[t.view_as(t) for t in tensors]]
    )
    model = HierarchicalTransformer(**{**SMALL, **KINDS[kind]}).double()
    ids = torch.randint(0, 13, (2, 33))
    expected = torch.autograd.grad(loss_of(model, ids), list(model.parameters()), allow_unused=True)
    (replica,) = module.replicate(model, [0])
    found = torch.autograd.grad(loss_of(replica, ids), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('kind', ['attention', 's4d', 'gateloop', 'all losses'])
def test_second_derivatives_are_whole(kind: str) -> None:
    """A Hessian times a vector is how the gradient moves along it, where no target is detached."""
    changes = {} if kind in ('s4d', 'gateloop') else dict(mixer='simple-gateloop')
    model = HierarchicalTransformer(
        **{**SMALL, **KINDS[kind], **changes, 'depth': 1}, next_latent_loss_weight=0
    ).double()
    ids = torch.randint(0, 13, (2, 17))
    parameters = [p for p in model.parameters() if p.requires_grad]
    along = [torch.randn_like(p) for p in parameters]

    def gradients(**create: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(model, ids), parameters, **create)

    slope: Any = sum((grad * v).sum() for grad, v in zip(gradients(create_graph=True), along, strict=True))
    found = torch.autograd.grad(slope, parameters, allow_unused=True)
    ends, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p += sign * step * v
        ends.append(gradients())
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p -= sign * step * v
    for (name, _), hessian, up, down in zip(model.named_parameters(), found, *ends, strict=True):
        expected = (up - down) / (2 * step)
        hessian = torch.zeros_like(expected) if hessian is None else hessian
        torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f'{name}: {text}')  # noqa: B023


def test_a_hessian_of_the_loss_and_of_the_scan() -> None:
    head, targets = nn.Linear(5, 7, bias=False).double(), torch.randint(0, 7, (2, 6))
    x = torch.randn(2, 6, 5, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return cross_entropy(x, head, targets, -1)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(head(x).flatten(0, 1), targets.flatten())

    v = torch.randn_like(x)
    found, expected = (torch.autograd.functional.hvp(fn, x, v)[1] for fn in (ours, plain))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    a, b = (torch.rand(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    initial = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(scan, (a, b, initial))


def test_reversible_layers_refuse_second_derivatives() -> None:
    model = HierarchicalTransformer(**SMALL, reversible=True)
    loss = loss_of(model, torch.randint(0, 13, (1, 9)))
    with pytest.raises(RuntimeError, match='reversible layers cannot be differentiated twice'):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize('kind', KINDS)
def test_a_flop_counter_sees_a_training_step(kind: str) -> None:
    model = HierarchicalTransformer(**{**SMALL, **KINDS[kind], 'dim': 16})
    ids = torch.randint(0, 13, (1, 33))
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids).backward()
    # forward and backward, as many as without a counter: twice the products of the forward pass for gradients
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        loss_of(model, ids)
    assert counter.get_total_flops() > 2 * forward.get_total_flops()


def adapted(model: nn.Module, **config: Any) -> Any:
    """The model with LoRA adapters that begin with random weights."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **config))  # type: ignore[arg-type]


def preset(name: str) -> dict[str, Any]:
    """A preset's options at a size for tests."""
    config = {**PRESETS[name]['model'], 'num_tokens': 256, 'seq_len': 64, 'ngram_rows': 64}
    return config | (dict(dim=32, depth=(2, 1), heads=2, dim_head=16) if name == 'gpu' else {})


@pytest.mark.parametrize('kind', [*KINDS, *PRESETS])
def test_lora_trains_and_merges_on_every_linear_map_and_convolution(kind: str) -> None:
    config = preset(kind) if kind in PRESETS else {**SMALL, **KINDS[kind]}
    # in float64 for what is merged to be the same to 1e-5 and not to rounding of large sums
    model = HierarchicalTransformer(**config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    maps = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))]
    lora, ids = adapted(model, target_modules=maps), torch.randint(0, 13, (2, 33))
    before = [p.clone() for p in lora.parameters()]
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    first = loss_of(lora, ids)
    first.backward()
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(lora.parameters(), before, strict=True)]
    assert moved == [p.requires_grad for p in lora.parameters()]
    with torch.no_grad():
        loss, logits, chunked = loss_of(lora, ids), lora(ids), read_in_chunks(lora, ids)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(ids), logits, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(read_in_chunks(merged, ids), chunked, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(loss_of(merged, ids), loss, rtol=1e-5, atol=1e-5)
    assert loss != first


def test_norms_saved_beside_adapters_are_trained() -> None:
    model = HierarchicalTransformer(**SMALL)
    lora = adapted(model, target_modules='all-linear', modules_to_save=['norm'])
    loss_of(lora, torch.randint(0, 13, (2, 33))).backward()
    norms = {name: p for name, p in lora.named_parameters() if 'modules_to_save' in name}
    assert len(norms) > 4
    assert all(p.grad is not None and p.grad.any() for p in norms.values())


@pytest.mark.parametrize('kind', KINDS)
def test_int8_weights_score_and_write_as_the_model_does(kind: str) -> None:
    """At a width that the fast kernels serve, where they must leave the quantized layers alone."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = HierarchicalTransformer(**{**SMALL, **KINDS[kind], 'dim': 256, 'depth': 1}).eval()
    ids = torch.randint(0, 13, (2, 33))
    maps = [module for module in model.modules() if type(module) is nn.Linear]
    with torch.no_grad():
        logits, loss, bits = model(ids), loss_of(model, ids), model.score(ids)
        quantize_(model, Int8WeightOnlyConfig())
        assert all(module.weight.data.qdata.dtype == torch.int8 for module in maps)  # type: ignore[union-attr]
        assert 0 < (model(ids) - logits).norm() < 0.1 * logits.norm()
        torch.testing.assert_close(loss_of(model, ids), loss, rtol=0.02, atol=0.02)
        assert model.score(ids) == pytest.approx(bits, rel=0.02)
        torch.testing.assert_close(read_in_chunks(model, ids), model(ids), rtol=1e-4, atol=1e-4)
        assert model.generate(ids[:, :5], 4, temperature=0).shape == (2, 4)


@pytest.mark.parametrize('kind', ['attention', 'hyena', 'all losses', 'pooled'])
def test_dynamic_quantization_converts_every_linear_map(kind: str) -> None:
    model = HierarchicalTransformer(**{**SMALL, **KINDS[kind], 'depth': 1}).eval()
    ids = torch.randint(0, 13, (2, 33))
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    converted = [
        name for name, module in small.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
    ]
    assert converted == [name for name, module in model.named_modules() if type(module) is nn.Linear]
    with torch.no_grad():
        assert 0 < (small(ids) - model(ids)).norm() < 0.1 * model(ids).norm()
        torch.testing.assert_close(loss_of(small, ids), loss_of(model, ids), rtol=0.02, atol=0.02)


def test_chains_within_chains_and_inserted_layers_are_trained() -> None:
    model = HierarchicalTransformer(**{**SMALL, 'merge_into': 'all'})
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
    model, ids = HierarchicalTransformer(**SMALL), torch.randint(0, 13, (2, 33))
    with torch.no_grad():
        logits = model(ids)
    loss, old = loss_of(model, ids), kind.forward
    monkeypatch.setattr(kind, 'forward', lambda self, x: 2 * old(self, x))
    assert not torch.allclose(loss_of(model, ids), loss)
    with torch.no_grad():
        assert not torch.allclose(model(ids), logits)


@pytest.mark.parametrize('settings', [dict(groups=2), dict(padding=1), dict(dilation=2, padding=2)])
def test_a_convolution_of_other_settings_is_called(settings: dict[str, Any]) -> None:
    conv = nn.Conv1d(4, 6, 3, **settings)
    windows = torch.randn(2, 5, 12)
    expected = conv(windows.view(10, 4, 3))[..., 0].view(2, 5, 6)
    torch.testing.assert_close(chain(windows, by_window(conv, 3)), expected)


RECOMPUTED: list[dict[str, Any]] = [
    dict(gradient_checkpointing=True),
    dict(reversible=True),
    dict(ff_chunks=3),
    dict(gradient_checkpointing=True, arrangement='hourglass', ff_chunks=2),
]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which forward passes keep what the backward pass needs."""

    @contextmanager
    def keeping() -> Iterator[None]:
        def call(fn: Any, modules: Any, *args: Any) -> Any:
            return fn(*args)

        with monkeypatch.context() as patch:
            patch.setattr('simple_hierarchical_transformer.block.recompute', call)
            patch.setattr('simple_hierarchical_transformer.model.recompute', call)
            patch.setattr(
                'simple_hierarchical_transformer.model.run_couplings', lambda *args, modules: run_plainly(*args)
            )
            yield

    return keeping


def recomputing(config: dict[str, Any], make: Any = None, seed: int = 0) -> HierarchicalTransformer:
    """A model of float64, with a part of the user's own in each feed-forward where `make` is given."""
    torch.manual_seed(seed)
    model = HierarchicalTransformer(**{**SMALL, 'next_latent_loss_weight': 0.0, **config}).double()
    for block in model.modules():
        if make is not None and isinstance(block, FeedForward):
            block.net[2] = make()
    return model


def assert_same_gradients(keep: Any, build: Any, call: Any = loss_of, change: Any = None) -> HierarchicalTransformer:
    """As where all is kept, with a change between the forward pass and the backward pass."""
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
def test_weights_of_one_call_get_their_gradients(config: dict[str, Any], computed: bool, keep: Any) -> None:
    model, ids, found = recomputing(config), torch.randint(0, 13, (2, 33)), []
    given = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    for context in (keep, nullcontext):
        weights: dict[str, Tensor] = dict(given)
        if computed:
            # weights that have a history of their own, where one is made of another
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
def test_a_change_after_the_forward_pass_does_not_reach_its_backward_pass(
    config: dict[str, Any], change: Any, keep: Any
) -> None:
    model = assert_same_gradients(keep, lambda: recomputing(config, lambda: nn.Dropout(0.5)), change=change)
    # and is there after
    ff: Any = model.layers[0][0].ff  # type: ignore[index, union-attr]
    changed = {
        change_mode: not ff.net.training,
        add_hooks: bool(ff.net[0]._forward_hooks),
        replace_parts: len(ff.net) == 1,
    }
    assert changed[change]


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_a_hook_that_is_removed_before_the_backward_pass_counts(config: dict[str, Any], keep: Any) -> None:
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
def test_a_tensor_that_a_hook_captures_may_be_a_part_of_the_loss(config: dict[str, Any], keep: Any) -> None:
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
def test_a_generator_of_a_modules_own_draws_the_same_numbers_again(config: dict[str, Any], keep: Any) -> None:
    def call(model: Any, ids: Tensor) -> Tensor:
        loss = loss_of(model, ids)
        after.append(model.layers[1][0].ff.net[2].generator.get_state())
        return loss

    after: list[Tensor] = []
    model: Any = assert_same_gradients(keep, lambda: recomputing(config, Noise), call)
    assert torch.equal(model.layers[1][0].ff.net[2].generator.get_state(), after[1])


@pytest.mark.parametrize('config', RECOMPUTED, ids=str)
def test_weights_that_are_written_before_the_backward_pass_are_refused(config: dict[str, Any]) -> None:
    model = recomputing(config)
    loss = loss_of(model, torch.randint(0, 13, (2, 33)))
    with torch.no_grad():
        # of which nothing else is kept
        model.layers[0][0].ff.net[0].gamma.mul_(2)  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match=r'changed in place after the forward pass|modified by an inplace operation'):
        loss.backward()


def test_an_activation_that_works_in_place_trains(keep: Any) -> None:
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
def test_buffers_that_a_forward_pass_writes_are_written_once(option: dict[str, Any]) -> None:
    """Recomputation with other buffers would have other gradients."""
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
        # with a state, reversible layers keep what they compute
        extra = dict(return_state=True) if plainly else {}
        loss, *_ = model(ids, return_loss=True, **extra)
        loss.backward()
        found.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (gradients, buffers), (expected, written) = found
    torch.testing.assert_close(buffers, written)
    torch.testing.assert_close(gradients, expected)
