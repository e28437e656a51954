"""What a run costs and whether it fits, before any memory is allocated."""

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
    """Of the levels."""
    parameters: dict[int | None, int]
    """Of each level; under None those that serve several."""
    flops: float
    """Operations for a byte, forward and backward."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes on one device at the peak of a step, by purpose. Empty where they cannot be planned."""
    shortage: str = ''
    """A message where the memory exceeds that of the device."""
    fits: bool = True
    """Whether the run may begin all the same."""


def make_plan(s: SimpleNamespace, accelerator: Accelerator, *, length: int, segments: int) -> Plan:
    """Plans a run from a model on 'meta', which takes no memory.

    Args:
        s: the settings of the run.
        accelerator: of the process.
        length: bytes of a sequence in a step.
        segments: how many segments follow one another.

    Raises:
        ValueError: --model or --segment-length is not allowed, or the memory cannot be counted.
    """
    device = accelerator.device
    model = make_model(s, 'meta', device)
    if length < (stride := max(level.stride for level in model.levels)):
        # a level without a token has no gradient, for which processes would wait
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
        # PyTorch has no form of some operation for 'meta'
        say(f'warning: how much memory the run needs could not be planned: {error}')
        return plan
    *held, activations = plan.memory.values()
    parts, limit = accelerator.num_processes if accelerator.is_fsdp2 else 1, cost.device_memory(device)
    need = sum(held) // parts + activations
    if limit is not None and need > limit:
        plan.shortage = (
            f'the run needs about {need / 1e9:,.1f} GB and this machine has {limit / 1e9:,.1f} GB '
            f'({device.type}). Less is taken by a smaller --batch-size with more --grad-accum, by '
            '--gradient-checkpointing, by a shorter --seq-len and by a smaller --model'
        )
        # without memory the system kills a run silently; a GPU raises an error, and its kernels may need less
        plan.fits = device.type != 'cpu' and sum(held) // parts <= limit
    return plan
