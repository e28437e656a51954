"""Trains a byte-level hierarchical transformer.

python train.py                                       enwik8, or the Python standard library where it cannot be had
python train.py --data notes.txt --minutes 30         any file, folder or glob, plain or packed
python train.py --segment-length 128                  short segments that remember the ones before
python train.py --eval runs/x/final --split test      score a saved model
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor
from tqdm import tqdm

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer import data as corpora

ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / 'data'
SAMPLE_PROMPT, SAMPLE_LENGTH = 64, 128
STREAMS = 8  # texts that a streaming score on the way reads side by side


@dataclass(frozen=True)
class Preset:
    model: dict[str, Any]
    seq_len: int
    batch_size: int
    grad_accum: int
    lr: float
    steps: int | None = None
    minutes: float | None = None
    every: int = 200  # steps between validations, each with a sample and a row of metrics
    checkpoint_every: int = 1000
    valid_bytes: int = 1 << 16  # how much of the validation split is scored on the way


# every byte counts, so the ignored id is none
BYTES: dict[str, Any] = dict(num_tokens=256, ignore_index=-1, recon_ignore_index=-1)

PRESETS = {
    'cpu': Preset(
        model=dict(
            **BYTES,
            dim=(128, 192),
            depth=4,
            heads=(2, 3),
            hierarchies=(1, 4),
            hierarchical_stride=(1, 4),
            window_sizes=(64, None),
            # after two minutes of training, runs without these were ahead (2.73 bits per byte against 2.76)
            recon_loss_weight=0.0,
            next_latent_loss_weight=0.0,
        ),
        seq_len=512,
        batch_size=2,
        grad_accum=1,
        lr=3e-3,
        minutes=10,
        every=500,
    ),
    'gpu': Preset(
        model=dict(**BYTES, dim=1024, depth=8, hierarchies=(1, 2), window_sizes=(32, 64)),
        seq_len=2048,
        batch_size=8,
        grad_accum=2,
        lr=3e-4,
        steps=100_000,
        valid_bytes=1 << 20,
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', choices=('auto', *PRESETS), default='auto', help='settings to start from')
    parser.add_argument('--data', help="file, folder or glob, plain or .gz .bz2 .xz .zip; or 'enwik8', or 'stdlib'")
    parser.add_argument('--steps', type=positive(int), help='train for that many optimizer steps')
    parser.add_argument('--minutes', type=positive(float), help='train for that long')
    parser.add_argument('--seq-len', type=positive(int), help='bytes in a sequence: the context of the model')
    parser.add_argument(
        '--segment-length', type=positive(int), help='that many bytes a step, with the state of those before'
    )
    parser.add_argument('--batch-size', type=positive(int), help='sequences in a batch, on each device')
    parser.add_argument('--grad-accum', type=positive(int), help='batches in an optimizer step')
    parser.add_argument('--lr', type=positive(float), help='highest learning rate')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--checkpoint-every', type=positive(int), help='steps between checkpoints')
    parser.add_argument('--out', type=Path, help='folder of the run (default: runs/<date>-<time>)')
    parser.add_argument('--eval', type=Path, metavar='CHECKPOINT', help='score a saved model instead of training')
    parser.add_argument('--split', choices=('valid', 'test'), help='what --eval scores (default: valid)')
    args = parser.parse_args(argv)

    if args.steps and args.minutes:
        parser.error('--steps and --minutes: give one of them')
    if args.split and not args.eval:
        parser.error('--split is for --eval, which was not given')
    training = ('steps', 'minutes', 'segment_length', 'grad_accum', 'lr', 'checkpoint_every', 'out')
    for name in training if args.eval else ():
        if getattr(args, name) is not None:
            parser.error(f'--{name.replace("_", "-")} is for training, --eval does none')
    return args


def positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f'must be above 0, got {text}')
        return value

    parse.__name__ = kind.__name__
    return parse


def say(text: str) -> None:
    if os.environ.get('RANK', '0') == '0':
        tqdm.write(text)


def load_corpus(source: str | None) -> tuple[str, Tensor]:
    """The bytes to learn from, memory-mapped, and what to call them: what was asked for, else enwik8, else stdlib."""
    cache = DATA_DIR / 'cache'
    if source not in (None, 'enwik8', 'stdlib'):
        return str(source), corpora.load_bytes(corpora.find_files(str(source)), cache)

    if source != 'stdlib':
        at_hand = [path for name in ('enwik8', 'enwik8.zip', 'enwik8.gz') if (path := DATA_DIR / name).is_file()]
        try:
            if not at_hand:
                with tqdm(total=corpora.ENWIK8.size, unit='B', unit_scale=True, desc='fetching enwik8') as bar:
                    at_hand = [corpora.fetch(corpora.ENWIK8, DATA_DIR / 'enwik8.zip', progress=bar.update)]
            return 'enwik8', corpora.load_bytes(at_hand[:1], cache)
        except OSError as error:
            if source == 'enwik8':
                raise
            say(f'enwik8 is not in {DATA_DIR} and cannot be had: {error}')
            say("using the source text of Python's standard library instead (--data takes any other text)")
    return 'stdlib', corpora.load_bytes(corpora.standard_library(), cache)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Mean over every label of the batches."""
    nats, count = 0.0, 0
    for ids, labels in batches:
        logits = model(ids.to(device)).float()
        nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(device), reduction='sum').item()
        count += labels.numel()
    return nats / count / math.log(2)


def streaming_texts(data: Tensor, span: range, size: int) -> Tensor:
    """Texts spread over the span, `size` bytes in all, to be scored side by side: `(STREAMS, size / STREAMS)`."""
    # no more than have two bytes each
    streams = max(min(STREAMS, len(span) // 2), 1)
    length = min(size, len(span)) // streams
    starts = torch.tensor([span.start + i * (len(span) // streams) for i in range(streams)])
    return data[starts[:, None] + torch.arange(length)].long()


def learning_rate(progress: float, highest: float) -> float:
    """Rises over the first 3 % of the run, then falls along a cosine to a tenth."""
    if progress < 0.03:
        return highest * max(progress / 0.03, 0.01)
    return highest * (0.55 + 0.45 * math.cos(math.pi * (progress - 0.03) / 0.97))


def save_checkpoint(model: HierarchicalTransformer, folder: Path) -> None:
    """Writes under another name first, so that a folder of this name is whole."""
    partial = folder.with_name(f'{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    os.replace(partial, folder)


def draw_curve(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
    for name, label in (('train_bits_per_byte', 'training'), ('valid_bits_per_byte', 'validation')):
        points = [(row['step'], row[name]) for row in rows if not math.isnan(row[name])]
        axes.plot(*zip(*points, strict=True), label=label, marker='.')
    axes.set(xlabel='step', ylabel='bits per byte')
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_suffix('.partial.png')
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    pyplot.close(figure)


def sample_text(model: HierarchicalTransformer, data: Tensor, span: range, device: torch.device) -> str:
    """The first bytes of a split, and how the model goes on from them."""
    prompt = data[span.start : span.start + SAMPLE_PROMPT].long()
    new = model.generate(prompt[None].to(device), SAMPLE_LENGTH)[0].cpu()
    text = [bytes(ids.tolist()).decode('utf-8', errors='replace') for ids in (prompt, new)]
    return '\n'.join(f'    {line}' for line in '>>>'.join(text).splitlines())


def check_processes(accelerator: Accelerator) -> None:
    """Refuses a launch in which each process would take itself for the only one."""
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    if launched != accelerator.num_processes:
        raise ValueError(
            f'{launched} processes were launched and {accelerator.num_processes} found each other: '
            'on CPUs, set ACCELERATE_USE_CPU=true'
        )


def evaluate(args: argparse.Namespace) -> None:
    if not (args.eval / 'config.json').is_file():
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

    name, data = load_corpus(args.data)
    span = corpora.split_bytes(len(data), seq_len=seq_len)[split]
    batches = corpora.evaluation_batches(data, span, seq_len=seq_len, batch_size=batch_size)
    count = -(-len(span) // (seq_len * batch_size))
    score = bits_per_byte(model, tqdm(batches, total=count, desc=split), accelerator.device)
    say(f'{split}: {score:.4f} bits per byte over {len(span):,} bytes of {name}, in windows of {seq_len:,}')
    score = model.score(data[span.start - 1 : span.stop].long())
    say(f'{split}: {score:.4f} bits per byte over {len(span):,} bytes of {name}, in one stream')


def train(args: argparse.Namespace) -> None:
    preset = PRESETS[('gpu' if torch.cuda.is_available() else 'cpu') if args.preset == 'auto' else args.preset]
    seq_len, batch_size, grad_accum, lr, checkpoint_every = (
        getattr(args, name) or getattr(preset, name)
        for name in ('seq_len', 'batch_size', 'grad_accum', 'lr', 'checkpoint_every')
    )
    steps, minutes = (args.steps, args.minutes) if args.steps or args.minutes else (preset.steps, preset.minutes)
    length = args.segment_length or seq_len

    half = 'bf16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'no'
    accelerator = Accelerator(
        mixed_precision=os.environ.get('ACCELERATE_MIXED_PRECISION', half), gradient_accumulation_steps=grad_accum
    )
    check_processes(accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    set_seed(args.seed)

    # what cannot work is refused before anything is written

    with accelerator.main_process_first():
        name, data = load_corpus(args.data)
    spans = corpora.split_bytes(len(data), seq_len=max(seq_len, length))
    model = HierarchicalTransformer(**preset.model, seq_len=seq_len)
    draws = importlib.util.find_spec('matplotlib') is not None
    if not draws:
        say("no loss curve will be drawn: matplotlib is missing (pip install '.[train]')")

    out = args.out or ROOT / 'runs' / time.strftime('%Y%m%d-%H%M%S')
    if main:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f'--out: {out} is not empty')
        out.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f'{parameters:,} parameters on {device}, {len(spans["train"]):,} bytes of {name} to train on, run in {out}')

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    # every process draws its own sequences

    generator = torch.Generator().manual_seed(args.seed + accelerator.process_index)
    sizes = dict(batch_size=batch_size, seq_len=length)
    # a stretch of segments fills the context; the longer it is, the more alike are the batches one after the other
    sizes['segments'] = max(4, -(-seq_len // length)) if args.segment_length else 1
    batches = corpora.segment_batches(data, spans['train'], **sizes, generator=generator)

    texts = streaming_texts(data, spans['valid'], preset.valid_bytes)
    rows: list[dict[str, float]] = []

    def report(step: int, train_score: float, elapsed: float, rate: float) -> None:
        windows = corpora.evaluation_batches(
            data, spans['valid'], seq_len=seq_len, batch_size=8, max_bytes=preset.valid_bytes
        )
        row = dict(
            step=step,
            minutes=round(elapsed / 60, 3),
            bytes=step * grad_accum * batch_size * length * accelerator.num_processes,
            lr=rate,
            train_bits_per_byte=train_score,
            valid_bits_per_byte=bits_per_byte(model, windows, device),
            valid_streaming_bits_per_byte=model.score(texts),
        )
        rows.append(row)
        with open(out / 'metrics.csv', 'a', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=row)
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(row)
        scores = row['valid_bits_per_byte'], row['valid_streaming_bits_per_byte']
        say(f'step {step}: validation {scores[0]:.3f} bits per byte, {scores[1]:.3f} streaming')
        if step:
            say(sample_text(model, data, spans['valid'], device))
        if step and draws:
            draw_curve(rows, out / 'loss.png')

    if main:
        report(0, math.nan, 0.0, 0.0)
    accelerator.wait_for_everyone()

    start, step, progress, state = time.monotonic(), 0, 0.0, None
    recent: list[Tensor] = []
    bar = tqdm(total=steps, disable=not main, unit='step', smoothing=0.05)

    try:
        while progress < 1:
            rate = learning_rate(progress, lr)
            for group in optimizer.param_groups:
                group['lr'] = rate

            for _ in range(grad_accum):
                ids, begins = next(batches)
                with accelerator.accumulate(wrapped):
                    if args.segment_length:
                        # the context of earlier segments, without their gradients
                        state = None if begins or state is None else state.detach()
                        loss, parts, state = wrapped(ids.to(device), return_loss=True, state=state, return_state=True)
                    else:
                        loss, parts = wrapped(ids.to(device), return_loss=True)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                recent.append(parts.ce.detach())

            step += 1
            elapsed = time.monotonic() - start
            if steps:
                progress = step / steps
            elif minutes:
                # one clock for all: processes that disagree about the end would wait for each other forever
                clock = broadcast(torch.tensor(elapsed, device=device)) if accelerator.num_processes > 1 else elapsed
                progress = float(clock) / (60 * minutes)

            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str(f'{torch.stack(recent[-100:]).mean().item() / math.log(2):.3f} bits per byte')

            if main and progress >= 1:
                save_checkpoint(model, out / 'final')
            elif main and step % checkpoint_every == 0:
                save_checkpoint(model, out / f'checkpoint-{step}')
            if step % preset.every == 0 or progress >= 1:
                train_score = accelerator.reduce(torch.stack(recent).mean(), 'mean').item() / math.log(2)
                recent.clear()
                if main:
                    report(step, train_score, elapsed, rate)
    except KeyboardInterrupt:
        bar.close()
        if main and step and progress < 1:
            save_checkpoint(model, out / f'interrupted-{step}')
            say(f'\ninterrupted: saved to {out / f"interrupted-{step}"}')
        sys.exit(130)

    bar.close()
    if main:
        first, last = rows[0]['valid_bits_per_byte'], rows[-1]['valid_bits_per_byte']
        final = shlex.quote(str(out / 'final'))
        say(f'\nvalidation went from {first:.3f} to {last:.3f} bits per byte in {step:,} steps')
        say(f'saved to {out / "final"}')
        say(f'score all of it:  python train.py --eval {final} --data {shlex.quote(name)}')
        say(f'sample from it:   python -m simple_hierarchical_transformer.sample {final} --prompt "The "')
    accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        evaluate(args) if args.eval else train(args)
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
