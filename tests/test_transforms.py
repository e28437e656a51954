"""What looks through a model: torch.func, torch.compile over many lengths, torch.export and ONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build
from torch import Tensor
from torch.export import Dim, export
from torch.func import functional_call, grad, vmap

from simple_hierarchical_transformer.ops.export import stable_sort

SMALL: dict[str, Any] = dict(
    num_tokens=256, dim=8, depth=1, seq_len=128, heads=2, dim_head=4, ff_mult=1, hierarchies=(1, 4),
    hierarchical_stride=(1, 2), window_sizes=(3, None), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip
# what the presets are made of, and phases besides
RECIPE: dict[str, Any] = dict(
    SMALL, arrangement='hourglass', compressor='linear', merge='linear', ff_activation='relu2',
    mixer_kwargs=dict(qk_norm=True), ngrams=(2, 3), word_ngrams=(1, 2), ngram_rows=64, recall=(2,), word_recall=(1,),
    recon_loss_weight=0.0, next_latent_loss_weight=0.0,
)  # fmt: skip
LOSSES: dict[str, Any] = dict(
    SMALL, prophet_loss_weight=0.2, quantized_loss_weight=0.2, quantizer_codebook_size=5, quantizer_dim=3
)


def words(batch: int, n: int) -> Tensor:
    """Ids in which words and n-grams come again."""
    drawn = torch.randint(0, 4, (batch, n))
    return torch.tensor(list(b'ab A'))[drawn]


@pytest.mark.parametrize(
    'config',
    [
        RECIPE,
        LOSSES,
        dict(SMALL, reversible=True, share_layers=True),
        dict(SMALL, gradient_checkpointing=True, ff_chunks=2),
        dict(SMALL, mixer='lsh'),
    ],
    ids=['recipe', 'losses', 'reversible', 'computed again', 'lsh'],
)
def test_vmap_gives_the_gradients_of_each_sample(config: dict[str, Any]) -> None:
    model, samples = build(config), torch.stack([words(2, 21) for _ in range(3)])
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        # PyTorch does not put back weights of a shared module that it ties
        return functional_call(model, weights, (ids, True), tie_weights=False)[0]

    each = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in weights.items()}, samples)
    for i, ids in enumerate(samples):
        expected = torch.autograd.grad(model(ids, return_loss=True)[0], weights.values(), allow_unused=True)
        for name, right in zip(weights, expected, strict=True):
            torch.testing.assert_close(each[name][i], torch.zeros_like(each[name][i]) if right is None else right)


ONE_LEVEL: dict[str, Any] = dict(
    num_tokens=256, dim=8, depth=1, seq_len=128, heads=2, dim_head=4, ff_mult=1, next_latent_loss_weight=0.0
)


@torch._dynamo.config.patch(recompile_limit=32)
@pytest.mark.parametrize(
    ('config', 'most'),
    [
        ({**RECIPE, 'word_ngrams': (), 'word_recall': ()}, 4),
        # a graph for each size of a block or of a Fourier transform, not for each length
        (dict(ONE_LEVEL, mixer='gateloop'), 8),
        (dict(ONE_LEVEL, mixer='s4d', mixer_kwargs=dict(state_dim=8)), 14),
    ],
    ids=['recipe', 'gateloop', 's4d'],
)
def test_few_graphs_serve_all_lengths(config: dict[str, Any], most: int) -> None:
    model, graphs = build(config), 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for n in range(6, 126, 10):
        # even and odd, of whole rounds over phases and others, shorter and longer than a block of queries
        ids = words(2, n + n // 6 % 4)
        torch.testing.assert_close(compiled(ids, return_loss=True)[0], model(ids, return_loss=True)[0])
    assert graphs <= most


# what torch.onnx of PyTorch 2.13 names as missing
NOT_IN_ONNX = ('prims.', 'aten.cumprod', 'aten.cummax', 'aten.sort.stable')


@torch.no_grad()
@pytest.mark.parametrize('config', [RECIPE, LOSSES, dict(ONE_LEVEL, mixer='lsh')], ids=['recipe', 'parallel', 'lsh'])
def test_an_exported_model_reads_any_length_and_has_no_operator_that_onnx_lacks(config: dict[str, Any]) -> None:
    model = build(config).eval()
    program = export(model, (words(2, 90),), dynamic_shapes={'ids': {1: Dim.AUTO}})
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes if node.op == 'call_function'}
    assert not [target for target in targets if target.startswith(NOT_IN_ONNX)]

    exported = program.module()
    for n in (9, 10, 31, 63, 64, 65, 127, 128):
        ids = words(2, n)
        torch.testing.assert_close(exported(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    'config',
    [dict(attn_backend='flex', window_sizes=8), dict(mixer='hyena', mixer_kwargs=dict(fft='monarch'))],
    ids=str,
)
def test_an_export_leaves_nothing_behind(config: dict[str, Any]) -> None:
    """What is kept between calls must be none of an exporter's tensors, which hold no numbers."""
    model, ids = build({**ONE_LEVEL, **config}).float().eval(), words(1, 23)
    exported = export(model, (ids,)).module()
    torch.testing.assert_close(model(ids), exported(ids))


def test_a_sort_is_stable_in_an_exported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randint(-3, 3, (4, 500)) * (1 << 60)
    expected = numbers.sort(dim=-1, stable=True)
    monkeypatch.setattr('simple_hierarchical_transformer.ops.export.is_exporting', lambda: True)
    for got, right in zip(stable_sort(numbers), expected, strict=True):
        assert torch.equal(got, right)
