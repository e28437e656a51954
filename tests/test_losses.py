"""Losses that never hold all logits equal those that do."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from simple_hierarchical_transformer import losses
from simple_hierarchical_transformer.losses import cross_entropy, linear_cross_entropy, reconstruction_loss


@given(rows=st.integers(0, 9), sets=st.integers(1, 3), chunk=st.integers(1, 40), train=st.booleans())
def test_loss_and_gradients_equal_those_over_all_logits(rows: int, sets: int, chunk: int, train: bool) -> None:
    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=train)
    weight = torch.randn(sets * 7, 5, dtype=torch.float64, requires_grad=train)
    targets, row_weights = torch.randint(0, 7, (rows, sets)), torch.rand(rows, sets, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, 'CHUNK', chunk)
        patch.setattr(losses, 'MIN_CHUNK_ROWS', 1)
        loss = linear_cross_entropy(x, weight, targets, row_weights)

    logits = (x @ weight.t()).view(-1, 7)
    expected = (F.cross_entropy(logits, targets.flatten(), reduction='none') * row_weights.flatten()).sum()
    torch.testing.assert_close(loss, expected)
    if train:
        ours, theirs = (torch.autograd.grad(3 * whole, (x, weight)) for whole in (loss, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('ignore_index', [0, -1])
def test_mean_leaves_ignored_targets_out(ignore_index: int) -> None:
    x, weight, targets = torch.randn(2, 6, 5), torch.randn(7, 5), torch.randint(0, 7, (2, 6))
    targets[0, :3] = ignore_index
    expected = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(cross_entropy(x, weight, targets, ignore_index), expected)
    assert cross_entropy(x, weight, torch.full_like(targets, ignore_index), ignore_index) == 0


def test_gradients_come_in_the_dtypes_of_what_they_are_for() -> None:
    x, weight, targets = torch.randn(1, 300, 16), torch.randn(11, 16), torch.randint(0, 11, (1, 300))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    exact = torch.autograd.grad(cross_entropy(x, weight, targets, -1), (x, weight))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = cross_entropy(x, weight, targets, -1)
        half = torch.autograd.grad(cross_entropy(x.bfloat16(), weight, targets, -1), (x, weight))
    assert loss.dtype == torch.float32
    for ours, expected in zip((*torch.autograd.grad(loss, (x, weight)), *half), exact * 2, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=2e-4)


def test_a_sample_of_the_reconstruction_is_unbiased() -> None:
    x, weight, ids = torch.randn(2, 20, 5), torch.randn(4 * 7, 5), torch.randint(0, 7, (2, 20))
    ids[:, 3:9] = 0
    settings = dict(compression=4, stride=1, ignore_index=0)
    whole = reconstruction_loss(x, weight, ids, **settings)
    for share in (0.1, 0.5):
        drawn = torch.stack([reconstruction_loss(x, weight, ids, **settings, sample=share) for _ in range(3000)])
        assert drawn.std() > 0
        # six times the error of the mean
        assert (drawn.mean() - whole).abs() < 6 * drawn.std() / 3000**0.5


@pytest.mark.skipif(sys.platform == 'win32', reason='the peak of memory is read the POSIX way')
def test_a_large_vocabulary_takes_no_memory_for_its_logits() -> None:
    """4 x 4,096 x 50,000 logits in float32 take 3.3 GB, and their gradient as much again."""
    code = """
        import resource, sys, torch
        from simple_hierarchical_transformer.losses import reconstruction_loss
        kib = 1 if sys.platform == 'darwin' else 1024
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
        x, weight = torch.randn(1, 4096, 8, requires_grad=True), torch.randn(4 * 50_000, 8, requires_grad=True)
        ids = torch.randint(0, 50_000, (1, 4096))
        # a first small one, for what the libraries themselves take
        (torch.randn(64, 8, requires_grad=True) @ torch.randn(8, 64)).sum().backward()
        before = peak()
        reconstruction_loss(x, weight, ids, compression=4, stride=1, ignore_index=-1).backward()
        assert weight.grad.norm() > 0
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 300e6
