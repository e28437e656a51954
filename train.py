"""Trains a byte-level hierarchical transformer.

python train.py                                       enwik8, or the Python standard library where it cannot be had
python train.py --data notes.txt --minutes 30         any file, folder or glob, plain or packed
python train.py --data a.txt=0.7 b.jsonl=0.3          several, with weights
python train.py --segment-length 128                  short segments that remember the ones before
python train.py --resume                              go on with the run that stopped last
python train.py --resume runs/x --minutes 20          train a finished run longer: 20 minutes in all
python train.py --dry-run                             what a run would cost
python train.py --eval runs/x/final --split test      score a saved model
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.config_file import CONFIG_FILE
from simple_hierarchical_transformer.data.batches import (
    END,
    Batches,
    evaluation_batches,
    find_windows,
    seed_of,
    split_bytes,
)
from simple_hierarchical_transformer.data.corpus import Corpus
from simple_hierarchical_transformer.memory import State
from simple_hierarchical_transformer.terminal import UNREAD, abandon, prepare, printable
from simple_hierarchical_transformer.training import checkpoints, cost, report
from simple_hierarchical_transformer.training.compiled import compile_blocks
from simple_hierarchical_transformer.training.optim import WeightAverage, build_optimizer, learning_rate
from simple_hierarchical_transformer.training.processes import (
    Stop,
    check_processes,
    from_main,
    meet,
    outlive_signals,
    say,
)
from simple_hierarchical_transformer.training.record import check_record
from simple_hierarchical_transformer.training.scores import STREAMS, bits_per_byte, sample_text, validation_scores
from simple_hierarchical_transformer.training.settings import (
    BYTES,
    DEFAULTS,
    TEXTS,
    new_settings,
    old_settings,
    parse_args,
    share_rows,
)
from simple_hierarchical_transformer.training.sharded import full
from simple_hierarchical_transformer.training.sources import load_sources
from simple_hierarchical_transformer.training.trackers import check_trackers, start_trackers
from simple_hierarchical_transformer.training.watch import Bar, counted
from simple_hierarchical_transformer.weights import shared_names

ROOT = Path(__file__).resolve().parent
DATA_DIR, RUNS = ROOT / 'data', ROOT / 'runs'
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient
MAX_SKIPPED_SCALED = 30  # likewise in float16, whose scale is found by trying
VALIDATIONS = 10  # of a run, where --every does not say how often


@dataclass
class Progress:
    """How far a run has come, as its checkpoints keep it."""

    identity: str = ''
    """What trackers know the run by."""
    step: int = 0
    elapsed: float = 0.0
    """Seconds of training and scoring, over all parts of the run."""
    skipped: int = 0
    """Steps not taken, since their loss or gradient was not finite."""
    in_a_row: int = 0
    position: int = 0
    """That of the state of segments."""
    updates: int = 0
    """Those of the averaged weights."""
    nats: float = 0.0
    """Sum of the training scores since the last row of metrics, of `scored` steps."""
    scored: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    """The scale that float16's losses are multiplied by, and how it moves."""
    rows: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def said_of(folder: Path | None) -> Iterator[None]:
    """Names a checkpoint whose record asks for a model that cannot be built, in what fails inside."""
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if folder is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f'{folder}: {error}') from error


class Run:
    """A run from its settings, or from where it stopped. Nothing is written before it trains."""

    def __init__(self, args: argparse.Namespace) -> None:
        meet()
        found = from_main(lambda: self.find(args)) if args.resume else None
        settings = old_settings(args, found[1], found[0]) if found else new_settings(args)
        check_trackers(settings['log_with'])
        checkpoint = found if found and 'progress' in found[1] else None
        self.out = args.out or RUNS / time.strftime('%Y%m%d-%H%M%S')
        if found and not args.out:
            self.out = found[0].parent if checkpoint else found[0]
        # beginning anew where a run was ended before its first checkpoint, and going on, need no empty folder
        self.found_here = checkpoint is not None and checkpoint[0].parent.resolve() == self.out.resolve()
        self.joins = args.resume == 'latest' or self.found_here

        self.accelerator = accelerator = Accelerator(
            mixed_precision=settings['mixed_precision'], log_with=settings['log_with'], project_dir=self.out
        )
        check_processes(accelerator)
        self.device, self.main, self.world = accelerator.device, accelerator.is_main_process, accelerator.num_processes
        self.part = (accelerator.process_index, self.world)
        if found:
            share_rows(settings, found[1]['rows'], args, self.world)
        self.settings = settings
        self.s = s = SimpleNamespace(**settings)
        self.rows, self.length = s.batch_size * s.grad_accum * self.world, s.segment_length or s.seq_len

        self.load_data()
        if found and found[1]['data'] != self.fingerprints:
            raise ValueError(f'{found[0]} was made with other data than {", ".join(self.names)} now holds')
        with said_of(found and found[0]):
            self.plan()
        if not self.fits:
            if args.dry_run:
                return
            raise ValueError(self.shortage)
        if self.shortage and not args.dry_run:
            say(f'warning: {self.shortage}')
        self.states: list[State] = []
        self.sample = ''
        with said_of(found and found[0]):
            self.build()
        if checkpoint:
            self.restore(*checkpoint)
        else:
            self.progress = Progress(identity=found[1]['identity'] if found else uuid.uuid4().hex[:8])
        # what nobody else has in the folder
        self.scratch = self.out / f'.{self.progress.identity}.partial'

    @staticmethod
    def find(args: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
        found = checkpoints.find(args.resume, args.out, RUNS, say)
        if found:
            folder, record = found
            file = folder / checkpoints.RECORD_FILE
            check_record(record, file if file.is_file() else folder / checkpoints.RUN_FILE)
        return found

    def load_data(self) -> None:
        s = self.s
        # the first process of each node unpacks what the others read, on the first node before the others
        for turn in range(3):
            if turn == (0 if self.main else 1 if self.accelerator.is_local_main_process else 2):
                self.sources, self.weights = load_sources(s.data, DATA_DIR, text_key=s.text_key, say=say)
            self.accelerator.wait_for_everyone()
        self.names = [corpus.name for corpus in self.sources]
        if s.data is None:
            # which of them it was, since another may be there when the run goes on
            s.data = self.settings['data'] = self.names
        self.spans = []
        for corpus in self.sources:
            try:
                self.spans.append(split_bytes(len(corpus), seq_len=max(s.seq_len, self.length)))
            except ValueError as error:
                raise ValueError(f'{corpus.name}: {error}') from error
        self.valid_bytes = s.valid_bytes // len(self.sources)
        if self.valid_bytes < 2 * STREAMS:
            raise ValueError(f'--valid-bytes must be at least {2 * STREAMS * len(self.sources)}, got {s.valid_bytes}')
        self.fingerprints = [corpus.fingerprint() for corpus in self.sources]
        self.batches = Batches(
            self.sources,
            [span['train'] for span in self.spans],
            weights=self.weights,
            rows=self.rows,
            seq_len=self.length,
            # a stretch fills the context; the longer it is, the more alike are the batches one after the other
            segments=max(4, -(-s.seq_len // self.length)) if s.segment_length else 1,
            documents=s.documents,
            seed=s.seed,
            part=self.part,
        )

    def make_model(self, device: str) -> Any:
        s = self.s
        own: dict[str, Any] = dict(seq_len=s.seq_len, gradient_checkpointing=s.gradient_checkpointing)
        if device == 'meta' and self.device.type == 'cuda' and s.model.get('attn_backend', 'auto') == 'auto':
            # which is what it takes there
            own['attn_backend'] = 'flex'
        try:
            with torch.device(device):
                return HierarchicalTransformer(**(TEXTS if s.documents else BYTES), **{**s.model, **own})
        except (TypeError, RuntimeError) as error:
            # a name that there is not, or more numbers than can be counted
            raise ValueError(f'--model: {error}') from error

    def make_optimizer(self, model: HierarchicalTransformer) -> Any:
        s = self.s
        return build_optimizer(
            model, s.optimizer, lr=s.lr, table_lr=s.table_lr, weight_decay=s.weight_decay, device=self.device,
            sparse=not (self.accelerator.is_fsdp2 or s.compile),
        )  # fmt: skip

    def plan(self) -> None:
        """What the run costs, and whether it fits, from a model that takes no memory."""
        s, model = self.s, self.make_model('meta')
        self.compressions = [level.compression for level in model.levels]
        if self.length < (stride := max(level.stride for level in model.levels)):
            # a level without a token has no gradient, which processes would wait for
            raise ValueError(f'--segment-length must be at least the largest stride, {stride}, got {self.length}')
        self.parameters = cost.parameters_by_level(model)
        self.flops = cost.step_flops(model, self.length) / self.length
        self.memory, self.shortage, self.fits = {}, '', True
        try:
            self.memory = cost.step_memory(
                model,
                self.make_optimizer(model),
                rows=s.batch_size,
                length=self.length,
                accum=s.grad_accum,
                position=(self.batches.segments - 1) * self.length if s.segment_length else None,
                averaged=bool(s.ema),
                half=s.mixed_precision != 'no',
            )
        except (RuntimeError, TypeError, OverflowError) as error:
            if 'overflow' in str(error).lower():
                raise ValueError(f'a step of this run takes more memory than can be counted: {error}') from error
            # an operation that PyTorch has no form of for 'meta'
            say(f'warning: how much memory the run needs could not be planned: {error}')
            return
        *held, activations = self.memory.values()
        parts, limit = self.world if self.accelerator.is_fsdp2 else 1, cost.device_memory(self.device)
        need = sum(held) // parts + activations
        if limit is not None and need > limit:
            self.shortage = (
                f'the run needs about {need / 1e9:,.1f} GB and this machine has {limit / 1e9:,.1f} GB '
                f'({self.device.type}). Less is taken by a smaller --batch-size with more --grad-accum, by '
                '--gradient-checkpointing, by a shorter --seq-len and by a smaller --model'
            )
            # without memory the system ends a run without a word; a GPU says so, and its kernels may need less
            self.fits = self.device.type != 'cpu' and sum(held) // parts <= limit

    def build(self) -> None:
        s = self.s
        set_seed(s.seed)
        model = self.make_model('cpu')
        if self.accelerator.is_fsdp2 and model.reversible:
            raise ValueError('reversible layers run parts of a block on their own, which cannot be sharded with it')
        if self.accelerator.is_fsdp2 and (shared := shared_names(model)):
            name, first = next(iter(shared.items()))
            raise ValueError(f'weights that blocks share, as {name} and {first}, cannot be sharded with their blocks')
        optimizer = self.make_optimizer(model)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model = self.accelerator.unwrap_model(self.wrapped)
        # a table that moves by rows takes no notice of how long its gradient is
        self.clipped = [p for group in self.optimizer.param_groups if group['rule'] != 'rows' for p in group['params']]
        if s.compile:
            compile_blocks(self.model)
        self.average = WeightAverage(self.model, s.ema) if s.ema else None
        # curves that runs of other settings have too, then each part that is on
        always = [
            'loss',
            'ce',
            'next_latent',
            'recon',
            *(f'next_latent/{level.compression}x' for level in model.levels),
        ]
        self.losses = list(dict.fromkeys((*always, *model.loss_weights)))

    def restore(self, folder: Path, record: dict[str, Any]) -> None:
        try:
            self.progress = Progress(**record['progress'])
            weights, tensors = checkpoints.read_tensors(folder)
            checkpoints.restore_all(self.model, self.optimizer, self.average, weights, tensors)
            if self.average:
                self.average.updates = self.progress.updates
            if self.accelerator.scaler is not None and self.progress.scaler:
                self.accelerator.scaler.load_state_dict(self.progress.scaler)
            if self.progress.position:
                self.states = checkpoints.restore_segments(
                    self.model, tensors, self.progress.position, count=self.s.grad_accum, part=self.part
                )
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            # weights, too, whose shapes do not fit
            raise ValueError(f'{folder} is not what this version writes: {error!r}') from error
        say(f'going on from {folder}, step {self.progress.step:,}, after {report.duration(self.progress.elapsed)}')

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(tensor, 'sum')

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Around what scores and samples: the averaged weights in their place, and nothing compiled for it."""
        with ExitStack() as around:
            if self.average:
                around.enter_context(self.average.applied())
            if self.s.compile:
                around.enter_context(torch.compiler.set_stance('force_eager'))
            yield

    def done(self) -> float:
        """The share of the run that is behind."""
        return self.progress.step / self.s.steps if self.s.steps else self.progress.elapsed / (60 * self.s.minutes)

    # one step

    def gradients(self, ids: Tensor) -> Tensor:
        """Forms those of a step, over all processes. Returns this process's share of the losses, and the norm."""
        # randomness, too, is a function of the step
        torch.manual_seed(seed_of(self.s.seed, self.progress.step, self.accelerator.process_index))
        before: list[Any] = self.states or [None] * self.s.grad_accum
        position = before[0].position if before[0] else 0
        counts = self.all_reduce(self.model.count_targets(ids, position=position).to(self.device))

        if self.model.ngram_emb is not None:
            readings = self.batches.readings(self.progress.step).to(self.device).chunk(self.s.grad_accum)
        self.states, losses = [], torch.zeros(len(self.losses), device=self.device)
        for i, batch in enumerate(ids.chunk(self.s.grad_accum)):
            if self.model.ngram_emb is not None:
                self.model.ngram_emb.readings = readings[i]
            with nullcontext() if i == self.s.grad_accum - 1 else self.accelerator.no_sync(self.wrapped):
                extra: dict[str, Any] = {}
                if self.s.segment_length:
                    # the context of earlier segments, without their gradients
                    extra = dict(state=before[i] and before[i].detach(), return_state=True)
                loss, parts, *after = self.wrapped(batch.to(self.device), return_loss=True, counts=counts, **extra)
                self.states += after
                # gradients are averaged over processes, and each loss is a share of the sum
                self.accelerator.backward(loss * self.world)
            each = dict(loss=loss, ce=parts.ce, next_latent=parts.next_latent, recon=parts.recon)
            each |= parts.named
            # a curve of a loss that is off is one of zeros
            losses += torch.stack([each.get(name, torch.zeros_like(loss)) for name in self.losses]).detach()
        norm = full(self.accelerator.clip_grad_norm_(self.clipped, self.s.clip))
        # which all processes have the same
        return torch.cat((losses, norm.detach()[None].to(losses) / self.world))

    def step(self, ids: Tensor, clock: float = 0.0, stop: bool = False) -> tuple[bool, bool, dict[str, float]]:
        """Learns from a step's sequences, unless loss or gradient is not finite.

        `clock`, the seconds so far, is that of the main process. Returns whether it learnt, whether any process was
        told to stop, and what to log.
        """
        progress = self.progress
        rate = learning_rate(self.done(), highest=self.s.lr, schedule=self.s.schedule, warmup=self.s.warmup)
        for group in self.optimizer.param_groups:
            group['lr'] = rate * group['scale']
        if self.batches.begins(progress.step):
            self.states = []

        # one clock and one end for all: processes that disagree would wait for each other forever
        own = torch.tensor([clock if self.main else 0.0, stop], device=self.device)
        *values, norm, progress.elapsed, stops = self.all_reduce(torch.cat((self.gradients(ids), own))).tolist()
        learnt = math.isfinite(values[0]) and math.isfinite(norm)
        if learnt or self.accelerator.scaler is not None:
            self.optimizer.step()
        if self.accelerator.scaler is not None:
            # a scaler takes no step that is not finite, and tries a smaller scale
            learnt = not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()

        progress.step += 1
        progress.in_a_row = 0 if learnt else progress.in_a_row + 1
        if learnt:
            progress.nats, progress.scored = progress.nats + values[1], progress.scored + 1
            if self.average:
                self.average.update()
        else:
            self.states = []
            progress.skipped += 1
        logged = dict(zip(self.losses, values, strict=True), bits_per_byte=values[1] / math.log(2))
        return learnt, stops > 0, logged | dict(learning_rate=rate, gradient_norm=norm, skipped=progress.skipped)

    # what is seen and kept of it

    def row(self) -> dict[str, Any]:
        """Where the run stands, and the score of what it learnt from since the last row."""
        progress = self.progress
        row: dict[str, Any] = dict(
            step=progress.step,
            minutes=round(progress.elapsed / 60, 3),
            bytes=progress.step * self.rows * self.length,
            skipped=progress.skipped,
            train_bits_per_byte=progress.nats / progress.scored / math.log(2) if progress.scored else None,
        )
        progress.nats, progress.scored = 0.0, 0
        return row

    def validate(self) -> None:
        """A row of metrics with the scores of the validation split."""
        progress = self.progress
        with self.averaged():
            windowed, streamed = validation_scores(
                self.model, self.sources, [span['valid'] for span in self.spans], seq_len=self.s.seq_len,
                size=self.valid_bytes, documents=self.s.documents,
                device=self.device, part=self.part, all_reduce=self.all_reduce,
            )  # fmt: skip
        shares = (self.batches.weights / self.batches.weights.sum()).tolist()

        def mean(scores: list[float]) -> float:
            return sum(share * score for share, score in zip(shares, scores, strict=True))

        row = self.row() | dict(
            valid_bits_per_byte=mean(windowed), valid_streaming_bits_per_byte=mean(streamed) if streamed else None
        )
        if len(windowed) > 1:
            names = map(printable, self.names)
            row |= {f'valid_{name}_bits_per_byte': x for name, x in zip(names, windowed, strict=True)}
        progress.rows.append(row)

    def show(self) -> None:
        """The last validation, and a sample, after what it is of was saved: terminals and trackers may fail."""
        row = self.progress.rows[-1]
        streaming = row['valid_streaming_bits_per_byte']
        streaming = '' if streaming is None else f', {streaming:.3f} streaming'
        from_main(self.write_scores)
        say(f'step {row["step"]}: validation {row["valid_bits_per_byte"]:.3f} bits per byte{streaming}')
        if row['step']:
            self.write_sample()
            say('\n'.join(f'    {line}' for line in self.sample.splitlines()))
        self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=row['step'])

    def due(self) -> bool:
        """Whether a validation is, by --every, or since another tenth of the run is behind."""
        if self.s.every:
            return self.progress.step % self.s.every == 0
        return int(VALIDATIONS * self.done()) > self.tenth and self.progress.elapsed >= self.rested

    def write_sample(self) -> None:
        # where weights are sharded, all processes have to take part
        if self.main or self.accelerator.is_fsdp2:
            try:
                with self.averaged():
                    self.sample = sample_text(self.model, self.sources[0], self.spans[0]['valid'], self.s.seed)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                # of a model that came to nothing, say; the run does not end for it
                self.sample = f'(no sample: {error})'

    def write_scores(self) -> None:
        report.write_metrics(self.progress.rows, self.out / 'metrics.csv')
        if self.draws and self.progress.step:
            report.draw_curve(self.progress.rows, self.out / 'loss.png')

    def save(self) -> None:
        """A checkpoint; of the older ones, the last few and the best stay."""
        progress = self.progress
        progress.position = self.states[0].position if self.states else 0
        progress.updates = self.average.updates if self.average else 0
        progress.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        weights, tensors = checkpoints.gather_all(
            self.model, self.optimizer, self.average, self.states, self.accelerator.gather, keep=self.main
        )
        record = dict(settings=self.settings, rows=self.rows, data=self.fingerprints, progress=asdict(progress))

        def write() -> None:
            checkpoints.save(
                self.out, progress.step, lambda folder: self.save_model(folder, weights), tensors, record,
                scratch=self.scratch,
            )  # fmt: skip
            scores = {row['step']: row['valid_bits_per_byte'] for row in report.validations(progress.rows)}
            scored = [step for step in checkpoints.steps_of(self.out) if math.isfinite(scores.get(step, math.nan))]
            best = min(scored, key=lambda step: scores[step], default=None)
            checkpoints.prune(self.out, progress.step, self.s.keep, best, scratch=self.scratch)

        from_main(write)

    def save_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        card = dict(training=self.account())
        self.model.save_pretrained(folder, state_dict=weights, model_card_kwargs=card)

    def account(self) -> str:
        size = self.progress.step * self.rows * self.length
        where = report.machine(self.device, self.world)
        return report.account(
            self.settings, self.progress.rows, self.names, where,
            steps=self.progress.step, size=size, seconds=self.progress.elapsed,
        )  # fmt: skip

    # all of it

    def train(self) -> None:
        s, progress, stop = self.s, self.progress, Stop()
        trains = self.done() < 1
        from_main(lambda: self.make_folder(trains))
        self.draws = importlib.util.find_spec('matplotlib') is not None
        if not self.draws:
            say("no loss curve will be drawn: matplotlib is missing (pip install '.[train]')")
        size = sum(len(span['train']) for span in self.spans)
        say(
            f'{sum(self.parameters.values()):,} parameters on {self.device}, '
            f'{size:,} bytes of {", ".join(self.names)} to train on, run in {self.out}'
        )
        start_trackers(self.accelerator, self.settings, self.out, step=progress.step, identity=progress.identity)
        peak = self.measure_peak()

        if progress.rows:
            # rows of steps that are taken once more go
            from_main(self.write_scores)
        else:
            self.validate()
            self.show()
        self.tenth, self.rested, validated_at = int(VALIDATIONS * self.done()), 0.0, None
        steps = iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(progress.step, 1 << 62),
                num_workers=s.workers,
                worker_init_fn=outlive_signals,
                pin_memory=self.device.type == 'cuda',
            )
        )
        bar = Bar(self.done(), flops=self.flops, peak=peak, shown=self.main)
        began, at_first, stops = time.monotonic(), progress.elapsed, False

        while self.done() < 1 and not stops:
            start = time.monotonic()
            learnt, stops, logged = self.step(next(steps), at_first + start - began, stop.number > 0)
            bar.add(self.rows * self.length, time.monotonic() - start)
            if validated_at is not None:
                # of a run in minutes, validations take no more than half
                self.rested = 0.0 if s.steps else 2 * progress.elapsed - validated_at
                validated_at = None
            due = self.due()
            # on the way, never what a step may have spoilt
            saves = self.done() >= 1 or (learnt and progress.step % s.checkpoint_every == 0)
            if progress.step % s.log_every == 0:
                logged |= bar.show(self.done(), progress.step, logged['bits_per_byte'], progress.skipped)
                self.accelerator.log({f'train/{name}': value for name, value in logged.items()}, step=progress.step)
                if not (saves or due):
                    progress.rows.append(self.row())

            limit = MAX_SKIPPED if self.accelerator.scaler is None else MAX_SKIPPED_SCALED
            if progress.in_a_row >= limit:
                from_main(self.write_scores)
                raise ValueError(
                    f'loss or gradient was not finite in {limit} steps in a row, the last being step {progress.step}: '
                    f'stopped, with the checkpoints in {self.out} as they were (try a lower --lr or --clip)'
                )
            if saves or due:
                self.validate()
                self.tenth, validated_at = int(VALIDATIONS * self.done()), progress.elapsed
            if saves:
                self.save()
            if saves or due:
                self.show()
        bar.close()

        if self.done() < 1:
            self.save()
            from_main(self.write_scores)
            say(f'stopped at step {progress.step:,} and saved; go on with:')
            say(f'  python train.py --resume {shlex.quote(str(self.out))}')
            # where another process was told, this one ends as it does
            sys.exit(128 + (stop.number or signal.SIGTERM))
        self.finish()

    def make_folder(self, trains: bool) -> None:
        progress = self.progress
        mark = dict(identity=progress.identity, settings=self.settings, rows=self.rows, data=self.fingerprints)
        if self.joins:
            checkpoints.check_own(self.out, progress.identity, progress.step, trains=trains)
        self.lock = checkpoints.claim(self.out, mark, resumes=self.joins, found=self.found_here)

    def measure_peak(self) -> float:
        """Operations a second that all processes could reach."""
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.s.mixed_precision, torch.float32)
        peak = cost.matmul_peak(self.device, dtype) if self.main else 0.0
        return self.all_reduce(torch.tensor(peak, device=self.device)).item() * self.world

    def finish(self) -> None:
        """The model by itself, and the run's report."""
        if not self.sample:
            # all was done before it was stopped
            self.write_sample()
        weights = checkpoints.gather_weights(self.model, self.average, keep=self.main)
        final, out = self.out / 'final', shlex.quote(str(self.out))
        scoring = f'python train.py --eval {out}/final --data {shlex.join(self.names)}'
        if self.s.text_key != 'text':
            scoring += f' --text-key {shlex.quote(self.s.text_key)}'
        sampling = f'python -m simple_hierarchical_transformer.sample {out}/final --prompt "The "'
        resuming = f'python train.py --resume {out}'
        more = f'--steps {2 * self.s.steps}' if self.s.steps else f'--minutes {2 * self.s.minutes:g}'
        rows, count = self.progress.rows, sum(self.parameters.values())

        def write() -> None:
            checkpoints.save_final(
                self.out, self.progress.step, lambda folder: self.save_model(folder, weights),
                identity=self.progress.identity, scratch=self.scratch,
            )  # fmt: skip
            text = report.report(
                self.settings,
                rows,
                self.account(),
                facts={'parameters': f'{count:,}', 'steps skipped': f'{self.progress.skipped:,}'},
                commands={
                    'Score all of it': scoring,
                    'Sample from it': sampling,
                    'Go on, had it stopped': resuming,
                    'Train it longer': f'{resuming} {more}',
                },
                picture='loss.png' if self.draws else None,
                sample=self.sample,
            )
            report.write_text(self.out / 'report.md', text)

        from_main(write)
        first, *_, last = (row['valid_bits_per_byte'] for row in (rows[0], *report.validations(rows)))
        say(f'\nvalidation went from {first:.3f} to {last:.3f} bits per byte in {self.progress.step:,} steps')
        say(f'saved to {final}, with an account of the run in {self.out / "report.md"}')
        say(f'score all of it:  {scoring}')
        say(f'sample from it:   {sampling}')

    def close(self) -> None:
        """Lets go of what holds the processes together, whose threads must not outlive the interpreter."""
        accelerator = self.accelerator
        if Stop.at_work:
            Stop.at_work.release()
        self.__dict__.clear()
        accelerator.free_memory()
        accelerator.end_training()

    def dry_run(self) -> None:
        """What the run would cost, from a few steps of it that leave no trace, where they fit into memory."""
        seconds = []
        for number in range(3 if self.fits else 0):
            cost.wait(self.device)
            start = time.monotonic()
            self.step(self.batches[number])
            cost.wait(self.device)
            seconds.append(time.monotonic() - start)
        for line in report.estimate(
            parameters=self.parameters,
            compressions=self.compressions,
            flops=self.flops,
            memory=self.memory,
            data=list(zip(self.sources, self.spans, strict=True)),
            # the first step sets up what later ones use
            seconds=min(seconds[1:], default=None),
            step_bytes=self.rows * self.length,
            peak=self.measure_peak() if self.fits else 0.0,
            steps=self.s.steps,
            minutes=self.s.minutes,
        ):
            say(line)
        if self.shortage:
            say(self.shortage)


def evaluate(args: argparse.Namespace) -> None:
    """Scores the whole of a split: in windows, and in one stream."""
    if not (args.eval / CONFIG_FILE).is_file():
        raise ValueError(f'--eval: {args.eval} is no saved model (a folder with config.json and model.safetensors)')
    accelerator = Accelerator()
    check_processes(accelerator)
    if accelerator.num_processes > 1:
        raise ValueError(f'--eval runs in one process, got {accelerator.num_processes}')

    split = args.split or 'valid'
    model = HierarchicalTransformer.from_pretrained(args.eval).to(accelerator.device)
    seq_len, batch_size = args.seq_len or model.seq_len, args.batch_size or 8
    if seq_len > model.seq_len:
        raise ValueError(f'--seq-len must be at most the {model.seq_len} of the model, got {seq_len}')

    # a model of texts that end was not taught to read on from one into the next
    documents = model.num_tokens > END
    for corpus in evaluated(args):
        span = split_bytes(len(corpus), seq_len=seq_len)[split]
        batches = evaluation_batches(corpus, span, seq_len=seq_len, batch_size=batch_size, documents=documents)
        count = -(-len(find_windows(corpus, span, seq_len, documents)[0]) // batch_size)
        score = bits_per_byte(model, counted(batches, count, split, 'batch'), accelerator.device)
        said = f'{split}: {{:.4f}} bits per byte over {len(span):,} bytes of {corpus.name}, in '
        say(said.format(score) + f'windows of {seq_len:,}')
        if not documents:
            say(said.format(model.score(corpus[span.start - 1 : span.stop])) + 'one stream')


def evaluated(args: argparse.Namespace) -> list[Corpus]:
    """What --eval scores: --data, or what the model's run was trained on, or, of a model without a run, the default.

    Raises ValueError where the run's data is gone or has changed.
    """
    found = checkpoints.run_of(args.eval.resolve()) if args.data is None else None
    if found is None:
        return load_sources(args.data, DATA_DIR, text_key=args.text_key or 'text', say=say)[0]
    run, file = found
    check_record(run, file)
    settings = {**DEFAULTS, **run['settings']}
    named = ' '.join(settings['data'] or ['the default'])
    try:
        text_key = args.text_key or settings['text_key']
        corpora = load_sources(settings['data'], DATA_DIR, text_key=text_key, say=say)[0]
    except (ValueError, OSError) as error:
        raise ValueError(f'--eval: the data of the run, {named}, cannot be had: {error}. Give --data') from error
    if args.text_key is None and [corpus.fingerprint() for corpus in corpora] != run['data']:
        raise ValueError(f'--eval: the data of the run, {named}, has changed since. Give --data')
    say(f'the data of the run: {named}')
    return corpora


def main(argv: list[str] | None = None) -> None:
    prepare()
    args = parse_args(argv, __doc__)
    try:
        if args.eval:
            evaluate(args)
        else:
            run = Run(args)
            try:
                run.dry_run() if args.dry_run else run.train()
            finally:
                run.close()
    except BrokenPipeError:
        abandon(sys.stderr)
        sys.exit(UNREAD)
    except (ValueError, OSError) as error:
        sys.exit(f'error: {printable(str(error))}')
    except torch.OutOfMemoryError as error:
        sys.exit(f'error: out of memory (try a smaller --batch-size or --gradient-checkpointing): {error}')
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
