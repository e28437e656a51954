"""Trains a byte-level hierarchical transformer.

python train.py                                       enwik8, or the Python standard library where it cannot be had
python train.py --data notes.txt --minutes 30         any file, folder or glob, plain or packed
python train.py --data a.txt=0.7 b.jsonl=0.3          several, with weights
python train.py --segment-length 128                  short segments that remember the ones before
python train.py --resume                              go on with the run that stopped last
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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.batches import END, Batches, evaluation_batches, seed_of, split_bytes
from simple_hierarchical_transformer.pretrained import CONFIG_FILE, shared_names
from simple_hierarchical_transformer.state import State
from simple_hierarchical_transformer.training import checkpoints, cost, report
from simple_hierarchical_transformer.training.optim import WeightAverage, build_optimizer, learning_rate
from simple_hierarchical_transformer.training.processes import Stop, check_processes, from_main, meet, say
from simple_hierarchical_transformer.training.scores import STREAMS, bits_per_byte, sample_text, validation_scores
from simple_hierarchical_transformer.training.settings import (
    BYTES,
    TEXTS,
    new_settings,
    old_settings,
    parse_args,
    share_rows,
)
from simple_hierarchical_transformer.training.sharded import full
from simple_hierarchical_transformer.training.sources import load_sources
from simple_hierarchical_transformer.training.trackers import check_trackers, start_trackers
from simple_hierarchical_transformer.training.watch import Bar

ROOT = Path(__file__).resolve().parent
DATA_DIR, RUNS = ROOT / 'data', ROOT / 'runs'
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient
MAX_SKIPPED_SCALED = 30  # likewise in float16, whose scale is found by trying


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


class Run:
    """A run from its settings, or from where it stopped. Nothing is written before it trains."""

    def __init__(self, args: argparse.Namespace) -> None:
        meet()
        found = from_main(lambda: checkpoints.find(args.resume, args.out, RUNS, say)) if args.resume else None
        settings = old_settings(args, found[1], found[0]) if found else new_settings(args)
        check_trackers(settings['log_with'])
        self.out = args.out or (found[0].parent if found else RUNS / time.strftime('%Y%m%d-%H%M%S'))
        # beginning anew where a run was ended before its first checkpoint, and going on, need no empty folder
        self.joins = args.resume == 'latest' or (found is not None and self.out.resolve() == found[0].parent.resolve())

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
        self.plan()
        if not self.fits:
            if args.dry_run:
                return
            raise ValueError(self.shortage)
        if self.shortage and not args.dry_run:
            say(f'warning: {self.shortage}')
        self.build()
        self.progress = Progress(identity=uuid.uuid4().hex[:8])
        self.states: list[State] = []
        self.sample = ''
        if found:
            self.restore(*found)

    def load_data(self) -> None:
        s = self.s
        # the first process of each node unpacks what the others read, on the first node before the others
        for turn in range(3):
            if turn == (0 if self.main else 1 if self.accelerator.is_local_main_process else 2):
                self.sources, self.weights = load_sources(s.data, DATA_DIR, text_key=s.text_key, say=say)
            self.accelerator.wait_for_everyone()
        self.names = [corpus.name for corpus in self.sources]
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
        if device == 'meta' and s.model.get('attn_backend') == 'flex':
            # which trains on CUDA alone
            own['attn_backend'] = 'auto'
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
        self.call = torch.compile(self.wrapped) if s.compile else self.wrapped
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
        except (KeyError, TypeError) as error:
            raise ValueError(f'{folder} is not what this version writes: {error!r}') from error
        say(f'going on from {folder}, step {self.progress.step:,}, after {report.duration(self.progress.elapsed)}')

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(tensor, 'sum')

    def averaged(self) -> Any:
        """Around what scores and samples: the averaged weights in their place."""
        return self.average.applied() if self.average else nullcontext()

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
                loss, parts, *after = self.call(batch.to(self.device), return_loss=True, counts=counts, **extra)
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

    def validate(self) -> None:
        """A row of metrics, and a sample."""
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

        row: dict[str, Any] = dict(
            step=progress.step,
            minutes=round(progress.elapsed / 60, 3),
            bytes=progress.step * self.rows * self.length,
            skipped=progress.skipped,
            train_bits_per_byte=progress.nats / progress.scored / math.log(2) if progress.scored else None,
            valid_bits_per_byte=mean(windowed),
            valid_streaming_bits_per_byte=mean(streamed) if streamed else None,
        )
        if len(windowed) > 1:
            row |= {f'valid_{name}_bits_per_byte': x for name, x in zip(self.names, windowed, strict=True)}
        progress.nats, progress.scored = 0.0, 0
        progress.rows.append(row)
        self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=progress.step)
        streaming = f', {mean(streamed):.3f} streaming' if streamed else ''
        say(f'step {progress.step}: validation {mean(windowed):.3f} bits per byte{streaming}')
        if progress.step:
            self.write_sample()
            say('\n'.join(f'    {line}' for line in self.sample.splitlines()))
        from_main(self.write_scores)

    def write_sample(self) -> None:
        # where weights are sharded, all processes have to take part
        if self.main or self.accelerator.is_fsdp2:
            with self.averaged():
                self.sample = sample_text(self.model, self.sources[0], self.spans[0]['valid'], self.s.seed)

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
            checkpoints.save(self.out, progress.step, lambda folder: self.save_model(folder, weights), tensors, record)
            scores = {row['step']: row['valid_bits_per_byte'] for row in progress.rows}
            scored = [step for step in checkpoints.steps_of(self.out) if math.isfinite(scores.get(step, math.nan))]
            best = min(scored, key=lambda step: scores[step], default=None)
            checkpoints.prune(self.out, progress.step, self.s.keep, best)

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
        from_main(self.make_folder)
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

        if not progress.rows:
            self.validate()
        steps = iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(progress.step, 1 << 62),
                num_workers=s.workers,
                pin_memory=self.device.type == 'cuda',
            )
        )
        bar = Bar(self.done(), flops=self.flops, peak=peak, shown=self.main)
        began, at_first, stops = time.monotonic(), progress.elapsed, False

        while self.done() < 1 and not stops:
            start = time.monotonic()
            learnt, stops, logged = self.step(next(steps), at_first + start - began, stop.number > 0)
            bar.add(self.rows * self.length, time.monotonic() - start)
            if progress.step % s.log_every == 0:
                logged |= bar.show(self.done(), progress.step, logged['bits_per_byte'], progress.skipped)
                self.accelerator.log({f'train/{name}': value for name, value in logged.items()}, step=progress.step)

            limit = MAX_SKIPPED if self.accelerator.scaler is None else MAX_SKIPPED_SCALED
            if progress.in_a_row >= limit:
                raise ValueError(
                    f'loss or gradient was not finite in {limit} steps in a row, the last being step {progress.step}: '
                    f'stopped, with the checkpoints in {self.out} as they were (try a lower --lr or --clip)'
                )
            # on the way, never what a step may have spoilt
            saves = self.done() >= 1 or (learnt and progress.step % s.checkpoint_every == 0)
            if saves or progress.step % s.every == 0:
                self.validate()
            if saves:
                self.save()
        bar.close()

        if self.done() < 1:
            self.save()
            say(f'stopped at step {progress.step:,} and saved; go on with:')
            say(f'  python train.py --resume {shlex.quote(str(self.out))}')
            # where another process was told, this one ends as it does
            sys.exit(128 + (stop.number or signal.SIGTERM))
        self.finish()

    def make_folder(self) -> None:
        there = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        begun = self.progress.step or 'metrics.csv' in there or all(name.startswith('.') for name in there)
        if there and not (self.joins and begun):
            raise OSError(f'--out: {self.out} is not empty')
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = checkpoints.lock(self.out)

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
        rows, count = self.progress.rows, sum(self.parameters.values())

        def write() -> None:
            checkpoints.write_folder(final, lambda folder: self.save_model(folder, weights))
            text = report.report(
                self.settings,
                rows,
                self.account(),
                facts={'parameters': f'{count:,}', 'steps skipped': f'{self.progress.skipped:,}'},
                commands={'Score all of it': scoring, 'Sample from it': sampling, 'Go on, had it stopped': resuming},
                picture='loss.png' if self.draws else None,
                sample=self.sample,
            )
            report.write_text(self.out / 'report.md', text)

        from_main(write)
        first, last = rows[0]['valid_bits_per_byte'], rows[-1]['valid_bits_per_byte']
        say(f'\nvalidation went from {first:.3f} to {last:.3f} bits per byte in {self.progress.step:,} steps')
        say(f'saved to {final}, with an account of the run in {self.out / "report.md"}')
        say(f'score all of it:  {scoring}')
        say(f'sample from it:   {sampling}')

    def close(self) -> None:
        """Lets go of what holds the processes together, whose threads must not outlive the interpreter."""
        accelerator = self.accelerator
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
    for corpus in load_sources(args.data, DATA_DIR, text_key=args.text_key or 'text', say=say)[0]:
        span = split_bytes(len(corpus), seq_len=seq_len)[split]
        batches = evaluation_batches(corpus, span, seq_len=seq_len, batch_size=batch_size, documents=documents)
        score = bits_per_byte(model, tqdm(batches, desc=split, unit='batch'), accelerator.device)
        said = f'{split}: {{:.4f}} bits per byte over {len(span):,} bytes of {corpus.name}, in '
        say(said.format(score) + f'windows of {seq_len:,}')
        if not documents:
            say(said.format(model.score(corpus[span.start - 1 : span.stop])) + 'one stream')


def main(argv: list[str] | None = None) -> None:
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
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
    except torch.OutOfMemoryError as error:
        sys.exit(f'error: out of memory (try a smaller --batch-size or --gradient-checkpointing): {error}')
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
