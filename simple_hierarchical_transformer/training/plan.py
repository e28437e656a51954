"""The cost of a run and whether it fits, computed before any memory is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

from accelerate import Accelerator
from torch import Tensor

from ..boundaries import BOUNDARIES, OF_SURPRISE, Finer
from ..model import HierarchicalTransformer
from ..pieces import Frame, longest_piece, place
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
    spacing: dict[int, float] = field(default_factory=dict)
    """The mean number of bytes in a piece of each placed level, by its index."""
    counted: dict[int, float] = field(default_factory=dict)
    """Those of them that were counted in the text. The others are the intended ones."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes on one device at the peak of a step, by purpose. Empty if they cannot be planned."""
    shortage: str = ''
    """A message if the run needs more memory than the device has."""
    fits: bool = True
    """Whether the run may begin."""


def make_plan(
    s: SimpleNamespace,
    accelerator: Accelerator,
    *,
    length: int,
    segments: int,
    sample: Callable[[], Tensor] | None = None,
) -> Plan:
    """Plans a run with a model on 'meta', which takes no memory.

    Args:
        s: the settings of the run.
        accelerator: the accelerator of this process.
        length: the number of bytes of a sequence in a step.
        segments: the number of consecutive segments.
        sample: returns sequences of the run, `(rows, n)`. Pieces are counted in them where a rule reads only ids.

    Raises:
        ValueError: --model or --segment-length is not allowed, or the memory cannot be counted.
    """
    device = accelerator.device
    model = make_model(s, 'meta', device)
    if length < (stride := max(level.stride for level in model.levels)):
        # a level without a token has no gradient, and other processes would wait for it
        raise ValueError(f'--segment-length must be at least the largest stride, {stride}, got {length}')
    counts: dict[int, Tensor] = {}
    if sample is not None and any(level.is_placed for level in model.levels):
        ids = sample()
        counts, width = count_pieces(model, ids), ids.shape[1]
        model.measured_spacing = {i: width / each.double().mean().item() for i, each in counts.items()}
    plan = Plan(
        compressions=[level.compression for level in model.levels],
        parameters=cost.parameters_by_level(model),
        flops=cost.step_flops(model, length) / length,
        spacing={i: model.spacing(i) for i, level in enumerate(model.levels) if level.is_placed},
        counted=model.measured_spacing,
    )
    model.measured_spacing = densest_spacing(model, {i: width / int(each.max()) for i, each in counts.items()})
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


def count_pieces(model: HierarchicalTransformer, ids: Tensor) -> dict[int, Tensor]:
    """The number of tokens that placed levels have in each row of ids `(rows, n)`, int64 `(rows,)`, by their index.

    Levels whose rules read more than ids are left out, and so are those inside them.
    """
    counts: dict[int, Tensor] = {}
    frame = None
    for i, j in pairwise(model.order):
        finer, level = model.levels[i], model.levels[j]
        if level.boundaries not in BOUNDARIES:
            continue
        intended = level.spacing / finer.spacing
        # the rule of a model on 'meta' has no values
        rule = BOUNDARIES[level.boundaries](Finer(finer.dim, model.num_tokens, intended))
        if rule.reads_tokens or (finer.is_placed and i not in counts):
            break
        frame = Frame.of_grid(finer.grid, 0, ids) if frame is None else frame
        tokens = ids.new_empty(*frame.positions.shape, 0)
        pieces, _ = place(rule, intended, tokens, ids, frame, None, longest=longest_piece(level, finer))
        counts[j], frame = pieces.lengths, pieces.frame
    return counts


def densest_spacing(model: HierarchicalTransformer, counted: Mapping[int, float]) -> dict[int, float]:
    """The number of ids to a token of placed levels in a step that takes the most memory, by the index of the level.

    A batch is as wide as its row with the most tokens. `counted` holds what was counted in such rows. Of learned rules,
    an untrained one has a boundary at up to half of the finer tokens, and later ones stay near the intended share.
    Surprise is calibrated over batches. One row of a batch may have twice as many boundaries as intended.
    """
    found: dict[int, float] = {}
    for i, j in pairwise(model.order):
        finer, level = model.levels[i], model.levels[j]
        if level.is_placed:
            intended = level.spacing / finer.spacing
            expected = intended / 2 if level.boundaries in OF_SURPRISE else min(intended, 2)
            found[j] = counted.get(j, found.get(i, finer.spacing) * max(expected, 1))
    return found
