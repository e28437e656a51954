"""All backends of windowed attention agree, and FlexAttention stays compiled for all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from simple_hierarchical_transformer.ops.window_attention import BACKENDS, Backend, attend_window

from .compare import peak_memory

pytestmark = pytest.mark.gpu

WINDOW, HEADS, CHANNELS = 64, 2, 32
# relative to the norm
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

backends = pytest.mark.parametrize('backend', BACKENDS)


def draw(n: int, past: int, device: torch.device, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    """Queries of `n` tokens, keys and values of these and of `past` tokens before, and weights of the result."""
    lengths = (n, past + n, past + n, n)
    return [torch.randn(batch, HEADS, length, CHANNELS).to(device, dtype) for length in lengths]


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, keys = q.shape[-2], k.shape[-2]
    distance = torch.arange(keys - n, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= WINDOW))


def with_gradients(attend: object, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> list[Tensor]:
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*given)  # type: ignore[operator]
    return [out, *torch.autograd.grad((out * weights).sum(), given)]


def compare(backend: Backend, drawn: list[Tensor]) -> None:
    """Compare the result and all gradients with those in float64 on the CPU."""
    tolerance = TOLERANCES[drawn[0].dtype]
    exact = with_gradients(attend_by_mask, *(t.double().cpu() for t in drawn))
    ours = with_gradients(lambda q, k, v: attend_window(q, k, v, WINDOW, backend), *drawn)
    for got, expected in zip(ours, exact, strict=True):
        assert got.shape == expected.shape
        # a single key has no gradient
        assert (got.double().cpu() - expected).norm() <= tolerance * expected.norm().clamp(min=1)


def skip_unless_it_trains(backend: Backend, device: torch.device) -> None:
    if backend == 'flex' and device.type != 'cuda':
        pytest.skip('FlexAttention trains on CUDA alone')


@backends
@pytest.mark.parametrize('n', [1, 40, 300, 1100])
@pytest.mark.parametrize('past', [0, 40])
def test_backends_agree_with_a_mask(backend: Backend, n: int, past: int, device: torch.device) -> None:
    skip_unless_it_trains(backend, device)
    compare(backend, draw(n, past, device))


@backends
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_backends_agree_in_half_precision(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    skip_unless_it_trains(backend, device)
    compare(backend, draw(300, 40, device, dtype))


@contextmanager
def counted_compilations(most: int) -> Iterator[None]:
    """Starts without compiled graphs, and allows at most `most`. Exceeding the limit of dynamo is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    graphs = counters['stats']['unique_graphs']
    assert graphs <= most, f'{graphs} graphs were compiled, and {most} are enough'


@pytest.mark.parametrize('trains', [False, True])
def test_many_lengths_stay_compiled(trains: bool, cuda: torch.device) -> None:
    """A model scores and generates texts of all lengths, with or without past tokens, in one block or several.

    This takes a few graphs. One graph for each length would exceed the limit of dynamo, which then runs FlexAttention
    uncompiled, with all `n` by `n` scores.
    """
    torch.cuda.empty_cache()

    def attend(n: int, past: int, batch: int = 2) -> None:
        drawn = draw(n, past, cuda, batch=batch)
        if trains:
            with_gradients(lambda q, k, v: attend_window(q, k, v, WINDOW, 'flex'), *drawn)
        else:
            with torch.no_grad():
                attend_window(*drawn[:3], WINDOW, 'flex')

    lengths = range(50, 1050, 100 if trains else 25)
    with counted_compilations(most=8):
        for i, n in enumerate(lengths):
            attend(n, past=(0, 40, WINDOW)[i % 3])

    n = 16384
    one_copy = HEADS * n * CHANNELS * 4
    all_scores = HEADS * n * n * 4
    assert peak_memory(lambda: attend(n, past=0, batch=1), cuda) < 32 * one_copy < all_scores / 8
