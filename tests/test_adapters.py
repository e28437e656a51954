"""LoRA adapters and quantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kinds import KIND_BASE, KINDS, loss_of, read_in_chunks
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training.settings import PRESETS


def adapted(model: nn.Module, **config: Any) -> Any:
    """The model with LoRA adapters of random initial weights."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **config))  # type: ignore[arg-type]


def preset(name: str) -> dict[str, Any]:
    """The options of a preset at a small size."""
    config = {**PRESETS[name]['model'], 'num_tokens': 256, 'seq_len': 64, 'ngram_rows': 64}
    return config | (dict(dim=32, depth=(2, 1), heads=2, dim_head=16) if name == 'gpu' else {})


@pytest.mark.parametrize('kind', [*KINDS, *PRESETS])
def test_lora_trains_and_merges_on_every_linear_map_and_convolution(kind: str) -> None:
    config = preset(kind) if kind in PRESETS else {**KIND_BASE, **KINDS[kind]}
    # in float64, so that large sums do not round merged weights by more than 1e-5
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
    model = HierarchicalTransformer(**KIND_BASE)
    lora = adapted(model, target_modules='all-linear', modules_to_save=['norm'])
    loss_of(lora, torch.randint(0, 13, (2, 33))).backward()
    norms = {name: p for name, p in lora.named_parameters() if 'modules_to_save' in name}
    assert len(norms) > 4
    assert all(p.grad is not None and p.grad.any() for p in norms.values())


@pytest.mark.parametrize('kind', KINDS)
def test_int8_weights_score_and_generate_like_the_model(kind: str) -> None:
    """The width is one that the fast kernels support. They must not run on quantized layers."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = HierarchicalTransformer(**{**KIND_BASE, **KINDS[kind], 'dim': 256, 'depth': 1}).eval()
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
    model = HierarchicalTransformer(**{**KIND_BASE, **KINDS[kind], 'depth': 1}).eval()
    ids = torch.randint(0, 13, (2, 33))
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    converted = [
        name for name, module in small.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
    ]
    assert converted == [name for name, module in model.named_modules() if type(module) is nn.Linear]
    with torch.no_grad():
        assert 0 < (small(ids) - model(ids)).norm() < 0.1 * model(ids).norm()
        torch.testing.assert_close(loss_of(small, ids), loss_of(model, ids), rtol=0.02, atol=0.02)
