"""Comparisons of a device with the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Gradients = Mapping[str, Tensor]

# the error of a gradient is relative to its norm, but at least to this share of the norm of all gradients: a gradient
# that should be zero consists of rounding errors
LEAST = 1e-5


class Precision(NamedTuple):
    dtype: torch.dtype
    values: float
    """Absolute tolerance of losses, logits and bits."""
    gradients: float
    """Tolerance of a gradient, relative to its norm."""


PRECISIONS = {
    'float32': Precision(torch.float32, 5e-5, 5e-4),
    'float64': Precision(torch.float64, 1e-10, 1e-8),
}


def loss_and_gradients(call: Any, model: nn.Module, ids: Tensor, **extra: Any) -> tuple[dict[str, float], Gradients]:
    """The loss and its parts, and the gradients of all weights as float64 tensors on the CPU."""
    model.zero_grad(set_to_none=True)
    loss, parts, *_ = call(ids, return_loss=True, **extra)
    loss.backward()
    losses = {name: part.item() for name, part in dict(parts.named, loss=loss).items()}
    return losses, gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.detach().to_dense().double().cpu() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_losses_close(ours: Mapping[str, float], theirs: Mapping[str, float], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    wrong = {name: (ours[name], theirs[name]) for name in ours if not abs(ours[name] - theirs[name]) <= tolerance}
    assert not wrong


def assert_gradients_close(ours: Gradients, theirs: Gradients, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    least = LEAST * norm(theirs)
    errors = {name: ((ours[name] - each).norm() / each.norm().clamp(min=least)).item() for name, each in theirs.items()}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


def norm(tensors: Gradients) -> float:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm().item()


def cosine(ours: Gradients, theirs: Gradients) -> float:
    """The cosine similarity of all gradients as one vector."""
    product = sum((ours[name] * theirs[name]).sum().item() for name in theirs)
    return product / norm(ours) / norm(theirs)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.detach().double().cpu(), theirs.detach().double().cpu(), rtol=0, atol=tolerance)


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """The peak of allocated bytes during a step, minus those allocated before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
