"""A training run: its data, its loop, its checkpoints and its report."""

from __future__ import annotations

import argparse
import importlib.util
import math
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.batches import Batches, split_bytes, streaming_rows
from ..terminal import UNREAD, abandon, printable
from . import checkpoints, cost, piece_report, report, run_folder, run_tensors
from .evaluate import evaluate
from .learner import Learner
from .plan import make_plan
from .processes import Stop, check_processes, from_main, init_distributed, outlive_signals, say
from .progress import Progress, Workspace
from .record import check_record
from .scores import STREAMS, sample_text, validation_scores
from .settings import new_settings, old_settings, share_rows
from .sources import load_sources
from .trackers import check_trackers, start_trackers
from .watch import Bar

MAX_SKIPPED = 5  # consecutive steps without a finite loss and gradient
MAX_SKIPPED_SCALED = 30  # the same in float16, where the scaler must first find its scale
SAMPLED = 1 << 15  # number of bytes in which the plan of a run counts pieces
VALIDATIONS = 10  # number of validations in a run without --every


@contextmanager
def naming(folder: Path | None) -> Iterator[None]:
    """Names the checkpoint in errors raised inside: its record describes a model that cannot be built."""
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if folder is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f'{folder}: {error}') from error


class Run:
    """A run, new or resumed.

    Constructing it loads the data, plans the cost and builds the model, but writes nothing.

    Args:
        args: the parsed command line.
        workspace: the folders of data and runs.

    Raises:
        ValueError: arguments, data or a checkpoint cannot be used.
        OSError: a file cannot be read.
    """

    def __init__(self, args: argparse.Namespace, workspace: Workspace) -> None:
        init_distributed()
        self.workspace = workspace
        found = from_main(lambda: self.find(args)) if args.resume else None
        settings = old_settings(args, found[1], found[0]) if found else new_settings(args)
        check_trackers(settings['log_with'])
        checkpoint = found if found and 'progress' in found[1] else None
        self.out = args.out or workspace.runs / time.strftime('%Y%m%d-%H%M%S')
        if found and not args.out:
            self.out = found[0].parent if checkpoint else found[0]
        # a run that resumes, or begins again before its first checkpoint, may use a folder that is not empty
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
            raise ValueError(f'{found[0]} was trained on other data than {", ".join(self.names)} now holds')
        with naming(found and found[0]):
            self.plan = make_plan(
                s, accelerator, length=self.length, segments=self.batches.segments, sample=self.sample_ids
            )
        if not self.plan.fits:
            if args.dry_run:
                return
            raise ValueError(self.plan.shortage)
        if self.plan.shortage and not args.dry_run:
            say(f'warning: {self.plan.shortage}')
        self.sample = ''
        self.progress = Progress(identity=found[1]['identity'] if found and not checkpoint else uuid.uuid4().hex[:8])
        if checkpoint:
            self.progress = Progress(**checkpoint[1]['progress'])
        with naming(found and found[0]):
            self.learner = Learner(s, accelerator, self.batches, self.progress)
        if checkpoint:
            self.restore(checkpoint[0])
            self.measure()
        # no other process uses a folder of this name
        self.scratch = self.out / f'.{self.progress.identity}.partial'

    def restore(self, folder: Path) -> None:
        progress = self.progress
        try:
            self.learner.restore(folder)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            # includes weights whose shapes do not fit
            raise ValueError(f'{folder} has other contents than this version writes: {error!r}') from error
        say(f'resuming from {folder}, step {progress.step:,}, after {report.duration(progress.elapsed)}')

    def find(self, args: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
        """Finds the checkpoint that --resume names, and its record."""
        found = checkpoints.find(args.resume, args.out, self.workspace.runs, say)
        if found:
            folder, record = found
            file = folder / checkpoints.RECORD_FILE
            check_record(record, file if file.is_file() else folder / checkpoints.RUN_FILE)
        return found

    def load_data(self) -> None:
        """Loads and splits the corpora."""
        s = self.s
        # the first process of each node unpacks the files for the others, and the first node goes first
        for turn in range(3):
            if turn == (0 if self.main else 1 if self.accelerator.is_local_main_process else 2):
                self.sources, self.weights = load_sources(s.data, self.workspace.data, text_key=s.text_key, say=say)
            self.accelerator.wait_for_everyone()
        self.names = [corpus.name for corpus in self.sources]
        if s.data is None:
            # records which default was used: another may be available when the run resumes
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
            # enough to fill the context: with longer stretches, consecutive batches would be more similar
            segments=max(4, -(-s.seq_len // self.length)) if s.segment_length else 1,
            documents=s.documents,
            seed=s.seed,
            part=self.part,
        )

    def sample_ids(self) -> Tensor:
        """Evenly spaced sequences of the text to train on, `(rows, n)`: the same in all processes."""
        weights, parts = self.batches.weights / self.batches.weights.sum(), []
        for corpus, span, weight in zip(self.sources, self.spans, weights.tolist(), strict=True):
            rows = min(math.ceil(weight * SAMPLED / self.length), len(span['train']) // self.length)
            parts.append(streaming_rows(corpus, span['train'], rows=rows, size=rows * self.length))
        return torch.cat(parts)

    # metrics, samples and checkpoints

    def row(self) -> dict[str, Any]:
        """Makes a row of metrics, with the training score since the last row."""
        progress = self.progress
        row: dict[str, Any] = dict(
            step=progress.step,
            minutes=round(progress.elapsed / 60, 3),
            bytes=progress.step * self.rows * self.length,
            skipped=progress.skipped,
            train_bits_per_byte=progress.nats / progress.scored / math.log(2) if progress.scored else None,
        )
        row |= self.learner.placed_row()
        progress.nats, progress.scored = 0.0, 0
        return row

    def measure(self) -> None:
        """Computes operations per byte anew, if levels are placed: from the lengths of pieces in the latest rows."""
        if self.learner.piece_shares:
            self.learner.measure_spacing(self.progress.rows)
            self.plan.flops = cost.step_flops(self.learner.model, self.length) / self.length

    def validate(self) -> None:
        """Scores the validation split and adds a row of metrics."""
        progress = self.progress
        with self.learner.averaged():
            windowed, streamed = validation_scores(
                self.learner.model, self.sources, [span['valid'] for span in self.spans], seq_len=self.s.seq_len,
                size=self.valid_bytes, documents=self.s.documents,
                device=self.device, part=self.part, all_reduce=self.learner.all_reduce,
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
        self.measure()

    def show(self) -> None:
        """Shows the last validation and a sample. Save first, because terminals and trackers may fail."""
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
        """Whether a validation is due: by --every, or because another tenth of the run is done."""
        if self.s.every:
            return self.progress.step % self.s.every == 0
        return int(VALIDATIONS * self.learner.done()) > self.tenth and self.progress.elapsed >= self.rested

    def write_sample(self) -> None:
        """Generates `sample` from the beginning of the validation split."""
        # with sharded weights, all processes must take part
        if self.main or self.accelerator.is_fsdp2:
            try:
                with self.learner.averaged():
                    self.sample = sample_text(self.learner.model, self.sources[0], self.spans[0]['valid'], self.s.seed)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                # for example, the model diverged: this must not end the run
                self.sample = f'(no sample: {error})'

    def write_scores(self) -> None:
        """Writes metrics.csv and loss.png."""
        report.write_metrics(self.progress.rows, self.out / 'metrics.csv')
        if self.draws and self.progress.step:
            report.draw_curve(self.progress.rows, self.out / 'loss.png')

    def save(self) -> None:
        """Writes a checkpoint, and removes older ones except for the last few and the best."""
        progress = self.progress
        weights, tensors = self.learner.gather()
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
        """Writes a model that `from_pretrained` loads, and its model card."""
        card = dict(training=self.account())
        self.learner.model.save_pretrained(folder, state_dict=weights, model_card_kwargs=card)

    def account(self) -> str:
        """The model card's section on this run."""
        size = self.progress.step * self.rows * self.length
        where = report.machine(self.device, self.world)
        return report.account(
            self.settings, self.progress.rows, self.names, where,
            steps=self.progress.step, size=size, seconds=self.progress.elapsed,
        )  # fmt: skip

    # the loop

    def train(self) -> None:
        """Trains to the end, or until a signal stops the run. Writes checkpoints, and a report at the end."""
        s, progress, stop = self.s, self.progress, Stop()
        trains = self.learner.done() < 1
        from_main(lambda: self.make_folder(trains))
        self.draws = importlib.util.find_spec('matplotlib') is not None
        if not self.draws:
            say('no loss curve will be drawn: matplotlib is missing (pip install matplotlib)')
        size = sum(len(span['train']) for span in self.spans)
        say(
            f'{sum(self.plan.parameters.values()):,} parameters on {self.device}, '
            f'{size:,} bytes of {", ".join(self.names)} to train on, run in {self.out}'
        )
        start_trackers(self.accelerator, self.settings, self.out, step=progress.step, identity=progress.identity)
        peak = self.measure_peak()

        if progress.rows:
            # removes from metrics.csv the rows of steps that will be repeated
            from_main(self.write_scores)
        else:
            self.validate()
            self.show()
        self.tenth, self.rested, validated_at = int(VALIDATIONS * self.learner.done()), 0.0, None
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
        bar = Bar(self.learner.done(), flops=self.plan.flops, peak=peak, shown=self.main)
        began, at_first, stops = time.monotonic(), progress.elapsed, False

        while self.learner.done() < 1 and not stops:
            start = time.monotonic()
            learned, stops, logged = self.learner.step(next(steps), at_first + start - began, stop.number > 0)
            bar.add(self.rows * self.length, time.monotonic() - start)
            if validated_at is not None:
                # validations take at most half of a run in minutes
                self.rested = 0.0 if s.steps else 2 * progress.elapsed - validated_at
                validated_at = None
            due = self.due()
            # before the end of the run, saves only after a successful step
            saves = self.learner.done() >= 1 or (learned and progress.step % s.checkpoint_every == 0)
            if progress.step % s.log_every == 0:
                pieces = self.learner.piece_lengths(logged)
                bar.flops = self.plan.flops
                logged |= bar.show(
                    self.learner.done(), progress.step, logged['bits_per_byte'], progress.skipped, pieces
                )
                self.accelerator.log({f'train/{name}': value for name, value in logged.items()}, step=progress.step)
                if not (saves or due):
                    progress.rows.append(self.row())

            limit = MAX_SKIPPED if self.accelerator.scaler is None else MAX_SKIPPED_SCALED
            if progress.in_a_row >= limit:
                from_main(self.write_scores)
                raise ValueError(
                    f'loss or gradient was not finite in {limit} steps in a row, up to step {progress.step}: '
                    f'stopped. The checkpoints in {self.out} are unchanged (try a lower --lr or --clip)'
                )
            if saves or due:
                self.validate()
                self.tenth, validated_at = int(VALIDATIONS * self.learner.done()), progress.elapsed
            if saves:
                self.save()
            if saves or due:
                self.show()
        bar.close()

        if self.learner.done() < 1:
            self.save()
            from_main(self.write_scores)
            say(f'stopped at step {progress.step:,} and saved; continue with:')
            say(f'  {self.workspace.resuming(self.out)}')
            # the same exit code in all processes, even if only one got the signal
            sys.exit(128 + (stop.number or signal.SIGTERM))
        self.finish()

    def make_folder(self, trains: bool) -> None:
        """Claims the folder of the run. Raises OSError if it holds files of anything else."""
        progress = self.progress
        mark = dict(identity=progress.identity, settings=self.settings, rows=self.rows, data=self.fingerprints)
        if self.joins:
            checkpoints.check_own(self.out, progress.identity, progress.step, trains=trains)
        self.lock = run_folder.claim(self.out, mark, resumes=self.joins, found=self.found_here)

    def measure_peak(self) -> float:
        """Measures the operations per second that all processes together could reach."""
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.s.mixed_precision, torch.float32)
        peak = cost.matmul_peak(self.device, dtype) if self.main else 0.0
        return self.learner.all_reduce(torch.tensor(peak, device=self.device)).item() * self.world

    def finish(self) -> None:
        """Writes the final model and the report."""
        if not self.sample:
            # the run was stopped after its last step
            self.write_sample()
        weights = run_tensors.gather_weights(self.learner.model, self.learner.average, keep=self.main)
        final, workspace = self.out / checkpoints.FINAL, self.workspace
        scoring, sampling = workspace.scoring(final, self.names, self.s.text_key), workspace.sampling(final)
        resuming = workspace.resuming(self.out)
        more = f'--steps {2 * self.s.steps}' if self.s.steps else f'--minutes {2 * self.s.minutes:g}'
        rows, count = self.progress.rows, sum(self.plan.parameters.values())
        pieces = piece_report.segment(self.learner, self.sources[0], self.spans[0]['valid'])

        def write() -> None:
            checkpoints.save_final(
                self.out, self.progress.step, lambda folder: self.save_model(folder, weights),
                identity=self.progress.identity, scratch=self.scratch,
            )  # fmt: skip
            if pieces and self.draws:
                piece_report.draw_pieces(pieces, self.out / 'pieces.png')
            text = report.report(
                self.settings,
                rows,
                self.account(),
                facts={
                    'parameters': f'{count:,}',
                    'operations per byte': f'{self.plan.flops:,.0f}',
                    'steps skipped': f'{self.progress.skipped:,}',
                },
                commands={
                    'Score all of it': scoring,
                    'Sample from it': sampling,
                    'Continue it, had it stopped': resuming,
                    'Train it longer': f'{resuming} {more}',
                },
                picture='loss.png' if self.draws else None,
                sample=self.sample,
                pieces=piece_report.section(pieces, 'pieces.png' if self.draws else None) if pieces else '',
            )
            report.write_text(self.out / 'report.md', text)

        from_main(write)
        first, *_, last = (row['valid_bits_per_byte'] for row in (rows[0], *report.validations(rows)))
        say(f'\nvalidation went from {first:.3f} to {last:.3f} bits per byte in {self.progress.step:,} steps')
        say(f'saved to {final}, with a report of the run in {self.out / "report.md"}')
        say(f'score all of it:  {scoring}')
        say(f'sample from it:   {sampling}')

    def close(self) -> None:
        """Shuts down the process group and trackers: their threads must not outlive the interpreter."""
        accelerator = self.accelerator
        if Stop.active:
            Stop.active.release()
        self.__dict__.clear()
        accelerator.free_memory()
        accelerator.end_training()

    def dry_run(self) -> None:
        """Prints the cost of the run. Times a few steps if they fit into memory. Writes no files."""
        seconds = []
        for number in range(3 if self.plan.fits else 0):
            cost.wait(self.device)
            start = time.monotonic()
            self.learner.step(self.batches[number])
            cost.wait(self.device)
            seconds.append(time.monotonic() - start)
        for line in report.estimate(
            parameters=self.plan.parameters,
            compressions=self.plan.compressions,
            flops=self.plan.flops,
            spacing=self.plan.spacing,
            counted=self.plan.counted,
            memory=self.plan.memory,
            data=list(zip(self.sources, self.spans, strict=True)),
            # the first step is slower: it sets up caches
            seconds=min(seconds[1:], default=None),
            step_bytes=self.rows * self.length,
            peak=self.measure_peak() if self.plan.fits else 0.0,
            steps=self.s.steps,
            minutes=self.s.minutes,
        ):
            say(line)
        if self.plan.shortage:
            say(self.plan.shortage)


def execute(args: argparse.Namespace, workspace: Workspace) -> None:
    """Runs a parsed command line. Errors of the user end the process with a line on stderr."""
    try:
        if args.eval:
            evaluate(args, workspace.data)
            return
        run = Run(args, workspace)
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
