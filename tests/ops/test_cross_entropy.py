"""Cross entropies that never hold all logits equal those that do."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simple_hierarchical_transformer.objectives.base import past_windows
from simple_hierarchical_transformer.ops import cross_entropy as kernel
from simple_hierarchical_transformer.ops.cross_entropy import cross_entropy, linear_cross_entropy


def head_of(weight: Tensor) -> nn.Linear:
    """A linear head that uses this tensor as its weight."""
    # the transforms of torch.func refuse its initialization
    head = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(head)
    head.weight, head.bias = weight, None  # type: ignore[assignment]
    return head


@given(rows=st.integers(0, 9), sets=st.integers(1, 3), chunk=st.integers(1, 40), train=st.booleans())
def test_loss_and_gradients_equal_those_over_all_logits(rows: int, sets: int, chunk: int, train: bool) -> None:
    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=train)
    weight = torch.randn(sets * 7, 5, dtype=torch.float64, requires_grad=train)
    targets, row_weights = torch.randint(0, 7, (rows, sets)), torch.rand(rows, sets, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, 'CHUNK', chunk)
        patch.setattr(kernel, 'MIN_CHUNK_ROWS', 1)
        loss = linear_cross_entropy(x, weight, targets, row_weights)

    logits = (x @ weight.t()).view(-1, 7)
    expected = (F.cross_entropy(logits, targets.flatten(), reduction='none') * row_weights.flatten()).sum()
    torch.testing.assert_close(loss, expected)
    if train:
        ours, theirs = (torch.autograd.grad(3 * whole, (x, weight)) for whole in (loss, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('ignore_index', [0, -1])
def test_mean_skips_ignored_targets(ignore_index: int) -> None:
    x, weight, targets = torch.randn(2, 6, 5), torch.randn(7, 5), torch.randint(0, 7, (2, 6))
    targets[0, :3] = ignore_index
    expected = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(cross_entropy(x, head_of(weight), targets, ignore_index), expected)
    assert cross_entropy(x, head_of(weight), torch.full_like(targets, ignore_index), ignore_index) == 0


def test_a_mean_in_float64_is_exact() -> None:
    x, weight, targets = torch.randn(2, 6, 5).double(), torch.randn(7, 5).double(), torch.randint(0, 7, (2, 6))
    targets[0, :5] = -1
    expected = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(cross_entropy(x, head_of(weight), targets, -1), expected, rtol=1e-15, atol=1e-15)


def test_gradients_have_the_dtype_of_their_tensor() -> None:
    x, weight, targets = torch.randn(1, 300, 16), torch.randn(11, 16), torch.randint(0, 11, (1, 300))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    exact = torch.autograd.grad(cross_entropy(x, head_of(weight), targets, -1), (x, weight))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = cross_entropy(x, head_of(weight), targets, -1)
        half = torch.autograd.grad(cross_entropy(x.bfloat16(), head_of(weight), targets, -1), (x, weight))
    assert loss.dtype == torch.float32
    for ours, expected in zip((*torch.autograd.grad(loss, (x, weight)), *half), exact * 2, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=2e-4)


def test_a_sample_of_the_reconstruction_is_unbiased() -> None:
    x, weight, ids = torch.randn(2, 20, 5), torch.randn(4 * 7, 5), torch.randint(0, 7, (2, 20))
    ids[:, 3:9] = 0
    seen = past_windows(ids, compression=4, stride=1, ignore_index=0)
    whole = cross_entropy(x, head_of(weight), seen, 0)
    for share in (0.1, 0.5):
        drawn = torch.stack([cross_entropy(x, head_of(weight), seen, 0, sample=share) for _ in range(3000)])
        assert drawn.std() > 0
        # six standard errors of the mean
        assert (drawn.mean() - whole).abs() < 6 * drawn.std() / 3000**0.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='the peak of memory is read the POSIX way')
def test_a_large_vocabulary_needs_no_memory_for_its_logits() -> None:
    """4 x 4,096 x 50,000 logits take 3.3 GB in float32, and their gradient takes as much."""
    code = """
        import resource, sys, torch
        from simple_hierarchical_transformer.objectives.base import past_windows
        from simple_hierarchical_transformer.ops.cross_entropy import cross_entropy
        kib = 1 if sys.platform == 'darwin' else 1024
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
        x, head = torch.randn(1, 4096, 8, requires_grad=True), torch.nn.Linear(8, 4 * 50_000, bias=False)
        ids = torch.randint(0, 50_000, (1, 4096))
        # a small product first, so that memory of the libraries is not counted
        (torch.randn(64, 8, requires_grad=True) @ torch.randn(8, 64)).sum().backward()
        before = peak()
        seen = past_windows(ids, compression=4, stride=1, ignore_index=-1)
        cross_entropy(x, head, seen, -1).backward()
        assert head.weight.grad.norm() > 0
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 300e6


def test_half_precision_keeps_the_small_gradients_of_a_long_mean() -> None:
    """The gradient of each row in a mean over many rows is below the range of float16, before a scaler can help."""
    torch.manual_seed(0)
    x, weight = torch.randn(30_000, 8), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (1, 30_000))
    (exact,) = torch.autograd.grad(cross_entropy(x[None], head_of(weight), targets, -1), weight)
    with torch.autocast('cpu', dtype=torch.float16):
        loss = cross_entropy(x[None], head_of(weight), targets, -1)
    (found,) = torch.autograd.grad(loss * 2.0**16, weight)
    torch.testing.assert_close(found / 2.0**16, exact, rtol=0.02, atol=2e-4 * exact.abs().max().item())


def test_gradients_can_be_computed_twice() -> None:
    x, weight = torch.randn(1, 20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = cross_entropy(x, head_of(weight), torch.randint(0, 50, (1, 20)), -1)
    first = torch.autograd.grad(loss * 3, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, (x, weight)), first)


def test_the_loss_works_with_function_transforms() -> None:
    targets = torch.randint(0, 50, (3, 1, 20))
    x, weight = torch.randn(3, 1, 20, 8), torch.randn(50, 8)

    def loss(weight: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(x, head_of(weight), targets, -1)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, targets)
    leaf = weight.clone().requires_grad_()
    for i in range(3):
        (expected,) = torch.autograd.grad(loss(leaf, x[i], targets[i]), leaf)
        torch.testing.assert_close(each[i], expected)
