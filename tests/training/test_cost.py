"""Counts of parameters and operations, and the peak of the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.configs import build, configs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.roles import walk


@given(config=configs())
@settings(max_examples=20)
def test_levels_share_out_the_parameters(config: dict[str, Any]) -> None:
    model = build(config)
    counts = cost.parameters_by_level(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert set(counts) == {*range(len(model.levels)), None}
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for i in range(len(model.levels)):
        # some layers of an hourglass have no block of this level
        blocks = [layer[i] for layer in model.layers if layer[i] is not None]
        own = [p for block in blocks for p in block.parameters() if names[id(p)] == 1]
        assert counts[i] >= sum(p.numel() for p in own)


class Operations(TorchDispatchMode):
    """Counts operations by kind, as PyTorch does. PyTorch's own counter adds hooks, which turn the fused paths off."""

    measures_routes = True

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.overloadpacket in flop_registry:
            self.counted[func.overloadpacket] += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


@pytest.mark.parametrize(
    'changes',
    [
        dict(hierarchies=1, dim=32),
        dict(hierarchies=1, dim=32, window_sizes=7),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=(16, 32)),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=(16, 32), merge='attention', merge_into='all'),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=(16, 32), merge='attention', merge_window=2),
        # nothing reads the last merge into level 4
        dict(hierarchies=(1, 4), dim=16, merge='attention', merge_into='all', recon_loss_weight=0.0),
        dict(hierarchies=(1, 4), dim=16, merge='attention', merge_into='all', recon_loss_weight=0.0, reversible=True),
        dict(hierarchies=(1, 2, 4), hierarchical_stride=(1, 2, 4), dim=(16, 32, 8), merge_into='all'),
        dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 8), dim=(16, 8, 32), arrangement='hourglass'),
        dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 8), dim=16, arrangement='hourglass', merge='linear'),
        dict(hierarchies=(1, 2, 4, 8), hierarchical_stride=(1, 2, 4, 8), dim=16, merge='linear', merge_into='all'),
        dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 8), dim=16, arrangement='hourglass', merge='attention'),
        dict(hierarchies=(1, 4, 8), hierarchical_stride=(1, 1, 8), dim=(16, 32, 8), compressor='attention'),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=16, autoencoder=True, prophet_loss_weight=0.1),
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), dim=16, share_feed_forward=True, compressor='linear'),
    ],
)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """Matrix products with weights. Attention is left out: PyTorch counts its kernels in another way."""
    n = 64
    model = HierarchicalTransformer(
        num_tokens=50, depth=2, seq_len=n, dim_head=8, heads=2, **changes, next_latent_loss_weight=0.0
    )
    weights = forms_at_once = 0.0
    for weight in (weight for visit in walk(model, n) for weight in visit.weights if weight.multiplies):
        each = 2 * weight.parameter.numel() * weight.tokens
        weights += each
        # computing logits also computes the two products of their gradient
        forms_at_once += 2 * each * (weight.role == 'head')

    with Operations() as counter:
        model(torch.randint(1, 50, (1, n + 1)), return_loss=True)
    counted = counter.counted
    products = sum(flops for op, flops in counted.items() if 'attention' not in str(op) and 'bmm' not in str(op))
    # a compressor by attention also scores the zeros before the first token
    assert products == pytest.approx(weights + forms_at_once, rel=0.005 if 'compressor' in changes else 1e-9)
    assert weights < cost.step_flops(model, n) / 3 < 2 * weights


def test_what_is_kept_for_the_backward_pass_is_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(32, 8, requires_grad=True)
    # the input, and the output of tanh, which serves its own gradient and that of the next product
    assert cost.bytes_kept(model, x) == 4 * (32 * 8 + 32 * 16)


def test_the_peak_is_one_that_products_reach() -> None:
    peak = cost.matmul_peak(torch.device('cpu'))
    assert 1e8 < peak < 1e14
