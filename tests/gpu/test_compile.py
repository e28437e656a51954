"""A compiled training step has the gradients of the eager step and is compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contracts.cases import NO_LOSSES, RECIPE, TWO, WINDOW, build, words
from torch._dynamo.utils import counters

from .compare import assert_gradients_close, assert_losses_close, cosine, loss_and_gradients

pytestmark = pytest.mark.gpu

LENGTH = 301
FLAT = dict(WINDOW, **NO_LOSSES, depth=1)


def compile_whole(model: torch.nn.Module, device: torch.device, **settings: Any) -> Any:
    """Compiles with inductor on CUDA. On the CPU, its C++ compiler would take minutes."""
    backend = 'inductor' if device.type == 'cuda' else 'aot_eager'
    return torch.compile(model, fullgraph=True, backend=backend, **settings)


@contextmanager
def compiled_into(graphs: int) -> Iterator[None]:
    """Starts with nothing compiled and allows at most `graphs` graphs, without graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters['graph_break']
    assert 1 <= counters['stats']['unique_graphs'] <= graphs


def test_steps_of_one_length_share_a_graph(device: torch.device) -> None:
    model = build(dict(TWO, depth=1)).to(device)
    with compiled_into(graphs=1):
        compiled = compile_whole(model, device)
        for _ in range(2):
            ids = words(2, LENGTH).to(device)
            losses, gradients = loss_and_gradients(compiled, model, ids)
    exact, exact_gradients = loss_and_gradients(model, model, ids)
    assert_losses_close(losses, exact, 5e-5)
    assert_gradients_close(gradients, exact_gradients, 1e-3)


def test_a_step_in_bfloat16_compiles(device: torch.device) -> None:
    """The preset of train.py at a small size, with FlexAttention inside the graph."""
    backend = 'flex' if device.type == 'cuda' else 'auto'
    model, ids = build(dict(RECIPE, depth=(1, 1), attn_backend=backend)).to(device), words(2, LENGTH).to(device)
    with compiled_into(graphs=1), torch.autocast(device.type, dtype=torch.bfloat16):
        losses, gradients = loss_and_gradients(compile_whole(model, device), model, ids)
    exact, exact_gradients = loss_and_gradients(model, model, ids)
    assert_losses_close(losses, exact, 2e-2)
    assert cosine(gradients, exact_gradients) > 0.99


def test_steps_of_any_length_share_a_graph(device: torch.device) -> None:
    """One graph for up to a block of queries, one for longer sequences, and on CUDA one for FlexAttention."""
    model = build(dict(FLAT, seq_len=2048)).to(device)
    with compiled_into(graphs=3 if device.type == 'cuda' else 2):
        compiled = compile_whole(model, device, dynamic=True)
        for n in (301, 250, 44, 33, 190, 1500, 1200):
            ids = words(2, n).to(device)
            losses, gradients = loss_and_gradients(compiled, model, ids)
            exact, exact_gradients = loss_and_gradients(model, model, ids)
            assert_losses_close(losses, exact, 5e-5)
            assert_gradients_close(gradients, exact_gradients, 1e-3)
