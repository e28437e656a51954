"""The model of a run, its optimizer, and a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..boundaries import Surprise
from ..data.batches import Batches, seed_of
from ..memory import State
from ..model import HierarchicalTransformer
from ..objectives import PieceShare, Ratio, Surprised
from ..weights import shared_names
from . import checkpoints, run_tensors
from .compiled import compile_blocks
from .optim import WeightAverage, build_optimizer, learning_rate
from .progress import Progress
from .report import PIECES
from .settings import BYTES, TEXTS
from .sharded import full


def make_model(s: SimpleNamespace, device: str, runs_on: torch.device) -> HierarchicalTransformer:
    """Builds the model of the settings `s` on `device`.

    `runs_on` is the device that the model will run on. It matters if `device` is 'meta'.

    Raises ValueError if --model has a wrong name or value.
    """
    given: dict[str, Any] = dict(seq_len=s.seq_len, gradient_checkpointing=s.gradient_checkpointing)
    if device == 'meta' and runs_on.type == 'cuda' and s.model.get('attn_backend', 'auto') == 'auto':
        # 'auto' would choose 'flex' on CUDA, but not on 'meta'
        given['attn_backend'] = 'flex'
    try:
        with torch.device(device):
            return HierarchicalTransformer(**(TEXTS if s.documents else BYTES), **{**s.model, **given})
    except (TypeError, RuntimeError) as error:
        # an unknown argument, or a size that overflows
        raise ValueError(f'--model: {error}') from error


def make_optimizer(
    s: SimpleNamespace, model: HierarchicalTransformer, accelerator: Accelerator
) -> torch.optim.Optimizer:
    return build_optimizer(
        model, s.optimizer, lr=s.lr, table_lr=s.table_lr, weight_decay=s.weight_decay, device=accelerator.device,
        sparse=not (accelerator.is_fsdp2 or s.compile),
    )  # fmt: skip


class Learner:
    """The model, its optimizer and the states of segments: everything that a training step changes.

    Args:
        s: the settings of the run.
        accelerator: the accelerator of this process.
        batches: the training data.
        progress: the progress of the run. Each step updates it.

    Raises:
        ValueError: the settings cannot build a model, or FSDP2 cannot shard it.
    """

    def __init__(self, s: SimpleNamespace, accelerator: Accelerator, batches: Batches, progress: Progress) -> None:
        self.s, self.accelerator, self.batches, self.progress = s, accelerator, batches, progress
        self.device, self.main, self.world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
        self.states: list[State] = []
        set_seed(s.seed)
        model = make_model(s, 'cpu', self.device)
        if accelerator.is_fsdp2 and model.reversible:
            raise ValueError('reversible layers call the parts of a block separately, so FSDP2 cannot shard the block')
        if accelerator.is_fsdp2 and (shared := shared_names(model)):
            name, first = next(iter(shared.items()))
            raise ValueError(f'FSDP2 cannot shard weights that blocks share, such as {name} and {first}')
        self.wrapped, self.optimizer = accelerator.prepare(model, make_optimizer(s, model, accelerator))
        self.model: Any = accelerator.unwrap_model(self.wrapped)
        # gradient clipping skips row-wise tables
        self.clipped = [p for group in self.optimizer.param_groups if group['rule'] != 'rows' for p in group['params']]
        if s.compile:
            compile_blocks(self.model)
        self.average = WeightAverage(self.model, s.ema) if s.ema else None
        # first the curves that all runs have, then those of the losses that are on
        common = [
            'loss',
            'ce',
            'next_latent',
            'recon',
            *(f'next_latent/{level.compression}x' for level in model.levels),
        ]
        self.losses = list(dict.fromkeys((*common, *model.loss_weights)))
        # training moves these without gradients, so processes must share them
        self.thresholds = [each.threshold for each in self.model.modules() if isinstance(each, Surprise)]
        self.piece_shares = [each for each in model.objectives if isinstance(each, PieceShare)]
        # the losses that rows of metrics have besides the score
        self.placing = [each.name for each in model.objectives if isinstance(each, (Ratio, Surprised))]

    def restore(self, folder: Path) -> None:
        """Loads the tensors of a checkpoint. `progress` must already be that of its record."""
        weights, tensors = checkpoints.read_tensors(folder)
        run_tensors.restore_all(self.model, self.optimizer, self.average, weights, tensors)
        if self.average:
            self.average.updates = self.progress.updates
        if self.accelerator.scaler is not None and self.progress.scaler:
            self.accelerator.scaler.load_state_dict(self.progress.scaler)
        if self.progress.position:
            part = (self.accelerator.process_index, self.world)
            self.states = run_tensors.restore_segments(
                self.model, tensors, self.progress.position, count=self.s.grad_accum, part=part
            )

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gathers the weights and the other tensors of a checkpoint in the main process. Updates `progress`."""
        progress, scaler = self.progress, self.accelerator.scaler
        progress.position = self.states[0].position if self.states else 0
        progress.updates = self.average.updates if self.average else 0
        progress.scaler = scaler.state_dict() if scaler is not None else {}
        return run_tensors.gather_all(
            self.model, self.optimizer, self.average, self.states, self.accelerator.gather, keep=self.main
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context for scoring and sampling: the model has its averaged weights and runs without torch.compile."""
        with ExitStack() as stack:
            if self.average:
                stack.enter_context(self.average.applied())
            if self.s.compile:
                stack.enter_context(torch.compiler.set_stance('force_eager'))
            yield

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes."""
        return self.accelerator.reduce(tensor, 'sum')

    def done(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        return self.progress.step / self.s.steps if self.s.steps else self.progress.elapsed / (60 * self.s.minutes)

    def gradients(self, ids: Tensor) -> Tensor:
        """Computes the gradients of a step, over all processes.

        Args:
            ids: this process's sequences, `(grad_accum * batch_size, length)`.

        Returns:
            This process's share of the losses, in the order of `losses`, then its share of the gradient norm: float32
            `(losses + 1,)`.
        """
        # seeded by the step, so that a resumed run draws the same random numbers
        torch.manual_seed(seed_of(self.s.seed, self.progress.step, self.accelerator.process_index))
        before: list[Any] = self.states or [None] * self.s.grad_accum
        position = before[0].position if before[0] else 0
        counts = self.all_reduce(self.model.count_targets(ids, position=position).to(self.device))

        readings: Sequence[Tensor] = ()
        if self.model.ngram_emb is not None:
            readings = self.batches.readings(self.progress.step).to(self.device).chunk(self.s.grad_accum)
        self.states, losses = [], torch.zeros(len(self.losses), device=self.device)
        for i, batch in enumerate(ids.chunk(self.s.grad_accum)):
            with nullcontext() if i == self.s.grad_accum - 1 else self.accelerator.no_sync(self.wrapped):
                extra: dict[str, Any] = dict(readings=readings[i]) if readings else {}
                if self.s.segment_length:
                    # the context of earlier segments, without their gradients
                    extra |= dict(state=before[i] and before[i].detach(), return_state=True)
                loss, parts, *after = self.wrapped(batch.to(self.device), return_loss=True, counts=counts, **extra)
                self.states += after
                # gradients are averaged over processes, but each loss is a share of a sum
                self.accelerator.backward(loss * self.world)
            values = dict(loss=loss, ce=parts.ce, next_latent=parts.next_latent, recon=parts.recon)
            values |= parts.named
            # a loss that is off counts as zero
            losses += torch.stack([values.get(name, torch.zeros_like(loss)) for name in self.losses]).detach()
        norm = full(self.accelerator.clip_grad_norm_(self.clipped, self.s.clip))
        # all processes have the same norm
        return torch.cat((losses, norm.detach()[None].to(losses) / self.world))

    def placed_row(self) -> dict[str, float | None]:
        """What a row of metrics has of placed levels: means over the steps since the last row. Begins new ones."""
        sums, scored = self.progress.sums, self.progress.scored
        self.progress.sums = {}
        row: dict[str, float | None] = {}
        for each in self.piece_shares:
            share = sums.get(each.name, 0.0)
            row[bytes_per_piece(each)] = scored / share if share else None
        return row | {name: sums[name] / scored if scored and name in sums else None for name in self.placing}

    def piece_lengths(self, values: Mapping[str, float]) -> list[float]:
        """The mean lengths of the pieces of placed levels among values to log, in bytes."""
        names = map(bytes_per_piece, self.piece_shares)
        return [values[name] for name in names if name in values]

    def measure_spacing(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes the latest lengths of pieces in rows of metrics as those that the model's cost is computed from."""
        for each in self.piece_shares:
            found = [row[name] for row in rows if row.get(name := bytes_per_piece(each))]
            if found and each.level is not None:
                self.model.measured_spacing[each.level] = found[-1]

    def step(self, ids: Tensor, clock: float = 0.0, stop: bool = False) -> tuple[bool, bool, dict[str, float]]:
        """Trains on the sequences of a step, unless its loss or gradient is not finite.

        Args:
            ids: this process's sequences, `(grad_accum * batch_size, length)`.
            clock: seconds of the run so far. Only the value of the main process is used.
            stop: whether this process was asked to stop.

        Returns:
            Whether the weights were updated, whether any process was asked to stop, and values to log.
        """
        progress = self.progress
        rate = learning_rate(self.done(), highest=self.s.lr, schedule=self.s.schedule, warmup=self.s.warmup)
        for group in self.optimizer.param_groups:
            group['lr'] = rate * group['scale']
        if self.batches.begins(progress.step):
            self.states = []

        # one clock and one decision to stop for all: processes that disagree would wait for each other forever
        shared = torch.tensor([clock if self.main else 0.0, stop], device=self.device)
        own = self.gradients(ids), shared, *(each.to(self.device)[None] / self.world for each in self.thresholds)
        found = self.all_reduce(torch.cat(own)).tolist()
        for threshold in reversed(self.thresholds):
            threshold.fill_(found.pop())
        *values, norm, progress.elapsed, stops = found
        learned = math.isfinite(values[0]) and math.isfinite(norm)
        if learned or self.accelerator.scaler is not None:
            self.optimizer.step()
        if self.accelerator.scaler is not None:
            # a scaler skips steps that are not finite, and reduces its scale
            learned = not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()

        progress.step += 1
        progress.in_a_row = 0 if learned else progress.in_a_row + 1
        if learned:
            progress.nats, progress.scored = progress.nats + values[1], progress.scored + 1
            named = dict(zip(self.losses, values, strict=True))
            for name in (*self.placing, *(each.name for each in self.piece_shares)):
                progress.sums[name] = progress.sums.get(name, 0.0) + named[name]
            if self.average:
                self.average.update()
        else:
            self.states = []
            progress.skipped += 1
        logged = dict(zip(self.losses, values, strict=True), bits_per_byte=values[1] / math.log(2))
        for each in self.piece_shares:
            # a segment may have no piece
            if share := logged[each.name]:
                logged[bytes_per_piece(each)] = 1 / share
        return learned, stops > 0, logged | dict(learning_rate=rate, gradient_norm=norm, skipped=progress.skipped)


def bytes_per_piece(share: PieceShare) -> str:
    """The name of the mean length of a level's pieces in metrics and trackers."""
    return f'{PIECES}{share.compression}x'
