"""The cost of a run and whether it fits, computed before any memory is allocated."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

from accelerate import Accelerator

from . import cost
from .learner import make_model, make_optimizer
from .processes import say


@dataclass
class Plan:
    """The cost of a run."""

    compressions: list[int]
    """The compression of each level."""
    parameters: dict[int | None, int]
    """The number of parameters of each level, by its index. None holds those that serve several levels."""
    flops: float
    """Operations per byte, forward and backward."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes on one device at the peak of a step, by purpose. Empty if they cannot be planned."""
    shortage: str = ''
    """A message if the run needs more memory than the device has."""
    fits: bool = True
    """Whether the run may begin."""


def make_plan(s: SimpleNamespace, accelerator: Accelerator, *, length: int, segments: int) -> Plan:
    """Plans a run with a model on 'meta', which takes no memory.

    Args:
        s: the settings of the run.
        accelerator: the accelerator of this process.
        length: the number of bytes of a sequence in a step.
        segments: the number of consecutive segments.

    Raises:
        ValueError: --model or --segment-length is not allowed, or the memory cannot be counted.
    """
    device = accelerator.device
    model = make_model(s, 'meta', device)
    if length < (stride := max(level.stride for level in model.levels)):
        # a level without a token has no gradient, and other processes would wait for it
        raise ValueError(f'--segment-length must be at least the largest stride, {stride}, got {length}')
    plan = Plan(
        compressions=[level.compression for level in model.levels],
        parameters=cost.parameters_by_level(model),
        flops=cost.step_flops(model, length) / length,
    )
    try:
        plan.memory = cost.step_memory(
            model,
            make_optimizer(s, model, accelerator),
            rows=s.batch_size,
            length=length,
            accum=s.grad_accum,
            position=(segments - 1) * length if s.segment_length else None,
            averaged=bool(s.ema),
            half=s.mixed_precision != 'no',
        )
    except (RuntimeError, TypeError, OverflowError) as error:
        if 'overflow' in str(error).lower():
            raise ValueError(f'a step of this run takes more memory than can be counted: {error}') from error
        # PyTorch does not implement some operation on 'meta'
        say(f'warning: how much memory the run needs could not be planned: {error}')
        return plan
    *held, activations = plan.memory.values()
    parts, limit = accelerator.num_processes if accelerator.is_fsdp2 else 1, cost.device_memory(device)
    need = sum(held) // parts + activations
    if limit is not None and need > limit:
        plan.shortage = (
            f'the run needs about {need / 1e9:,.1f} GB and this machine has {limit / 1e9:,.1f} GB '
            f'({device.type}). To need less, give a smaller --batch-size with more --grad-accum, '
            '--gradient-checkpointing, a shorter --seq-len or a smaller --model'
        )
        # without memory, the system kills a run and shows no message. A GPU raises an error, and its kernels may need
        # less
        plan.fits = device.type != 'cpu' and sum(held) // parts <= limit
    return plan
