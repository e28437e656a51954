"""What a run is asked to do: the command line, the presets, and the settings that a run keeps."""

from __future__ import annotations

import argparse
import ast
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..data.batches import IGNORED, PAD
from ..terminal import Number
from .optim import OPTIMIZERS, SCHEDULES
from .sources import NAMED
from .trackers import TRACKERS

# every byte counts, so the ignored id is none; where texts end, one beyond the bytes says so, and one fills up
BYTES: dict[str, Any] = dict(num_tokens=256, ignore_index=IGNORED, recon_ignore_index=IGNORED)
TEXTS: dict[str, Any] = dict(num_tokens=PAD + 1, ignore_index=PAD, recon_ignore_index=PAD)

# beyond these no number is meant, and products of several would overflow
LEAST, MOST = 1e-12, 10**12
# what generators of random numbers take
MOST_SEED = 2**32 - 1
MOST_WORKERS = 1024

PRECISIONS = ('no', 'bf16', 'fp16')

DEFAULTS: dict[str, Any] = dict(
    data=None, documents=False, text_key='text', segment_length=None, steps=None, minutes=None,
    optimizer='adamw', table_lr=None, weight_decay=0.1, clip=1.0, warmup=0.03, schedule='cosine', ema=None,
    mixed_precision=None, compile=False, gradient_checkpointing=False, seed=42,
    every=None, checkpoint_every=1000, keep=3, log_every=10, log_with=None, workers=0,
    valid_bytes=1 << 16,  # how much of the validation split is scored on the way
)  # fmt: skip
# what may be otherwise when a run goes on
FREE = ('every', 'checkpoint_every', 'keep', 'log_every', 'log_with', 'workers', 'batch_size', 'grad_accum')

# what a finished run may be given more of
LENGTH = ('steps', 'minutes')

# arguments of the model that --model does not take
ELSEWHERE = {
    'seq_len': 'give --seq-len',
    'gradient_checkpointing': 'give --gradient-checkpointing',
    'num_tokens': 'it is made for bytes',
    'ignore_index': 'no byte is ignored; --documents fills up with an id of its own',
    'recon_ignore_index': 'no byte is ignored; --documents fills up with an id of its own',
}

# what both presets have of the model, found at the size of 'cpu' (benchmarks/notes.md)
RECIPE: dict[str, Any] = dict(
    arrangement='hourglass',
    compressor='linear',
    merge='linear',
    ff_activation='relu2',
    mixer_kwargs=dict(qk_norm=True),
    ngrams=(2, 3, 4, 5, 6),
    word_ngrams=(1, 2),
    ngram_dropout=0.5,
    recall=(3, 4, 5, 6, 8, 12),
    word_recall=(1, 2),
    zero_init=True,
    recon_loss_weight=0.0,
    next_latent_loss_weight=0.0,
)
PRESETS: dict[str, dict[str, Any]] = {
    # benchmarks/race.py measures it
    'cpu': dict(
        model=dict(
            RECIPE,
            dim=96,
            depth=(2, 2),
            heads=2,
            dim_head=48,
            ff_mult=(4, 2),
            hierarchies=(1, 4),
            hierarchical_stride=(1, 4),
            window_sizes=(32, None),
        ),
        seq_len=1024,
        batch_size=2,
        grad_accum=1,
        optimizer='muon',
        lr=6e-3,
        table_lr=5e-2,
        weight_decay=0.0,
        schedule='linear',
        minutes=10.0,
        valid_bytes=1 << 14,
    ),
    # the smallest of benchmarks/plan.py. Operations go to the fine level and its small window, which
    # benchmarks/scaling.py found to give most for them; the coarse level hears the whole context for 3 % more of
    # them. Muon's rate is that of 'cpu' over the root of how much wider levels are: so the spectral norm of its steps,
    # 0.2 * lr * sqrt(width), stays what it was (Yang et al. 2023, arXiv 2310.17813). That of tables, among which is the
    # map to logits, is the one of 'cpu' over the width itself; weights decay, since a run is long (Liu et al. 2025,
    # arXiv 2502.16982). The steps are twelve passes of enwik8
    'gpu': dict(
        model=dict(
            RECIPE,
            dim=768,
            depth=(10, 4),
            heads=12,
            hierarchies=(1, 16),
            hierarchical_stride=(1, 16),
            window_sizes=(64, None),
        ),
        seq_len=8192,
        batch_size=4,
        grad_accum=4,
        compile=True,
        optimizer='muon',
        lr=2e-3,
        table_lr=6e-3,
        schedule='linear',
        steps=8_000,
        valid_bytes=1 << 20,
    ),
}


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(group: Any, name: str, **settings: Any) -> None:
        if settings.get('type') is int:
            settings['type'] = Number(int, 1, MOST)
        elif settings.get('type') is float:
            settings['type'] = Number(float, LEAST, MOST)
        group.add_argument(f'--{name}', **settings)

    def switch(group: Any, name: str, text: str) -> None:
        group.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, default=None, help=text)

    run = parser.add_argument_group('the run')
    run.add_argument('--preset', choices=('auto', *PRESETS), help='settings to start from')
    option(run, 'steps', type=int, help='train for that many optimizer steps, in all')
    option(run, 'minutes', type=float, help='train for that long, in all')
    run.add_argument('--seed', type=Number(int, 0, MOST_SEED))
    run.add_argument('--out', type=folder, help='folder of the run (default: runs/<date>-<time>)')
    run.add_argument(
        '--resume', nargs='?', const='latest', metavar='FOLDER', type=named,
        help='go on from a run or one of its checkpoints; without a name from the run in --out, if there is one yet, '
        'or from the one that was at work last. A finished run is trained longer with more --steps or --minutes, in '
        'all: each schedule goes on with the rate that a run of that length has there',
    )  # fmt: skip
    run.add_argument('--dry-run', action='store_true', default=None, help='say what the run costs, and do not begin it')

    data = parser.add_argument_group('data')
    data.add_argument(
        '--data', nargs='+', metavar='SOURCE[=WEIGHT]',
        help=f'files, folders or globs: text, .gz .bz2 .xz .zst, .zip .tar, .jsonl .parquet; or {", ".join(NAMED)}',
    )  # fmt: skip
    switch(data, 'documents', 'no sequence crosses from one file, or row, into the next')
    data.add_argument('--text-key', help='the column of .jsonl and .parquet that holds the text')
    option(data, 'seq-len', type=int, help='bytes in a sequence: the context of the model')
    option(data, 'segment-length', type=int, help='that many bytes a step, with the state of those before')
    option(data, 'batch-size', type=int, help='sequences in a batch, on each device')
    option(data, 'grad-accum', type=int, help='batches in an optimizer step')
    data.add_argument('--workers', type=Number(int, 0, MOST_WORKERS), help='processes that read ahead')

    learning = parser.add_argument_group('learning')
    learning.add_argument('--model', nargs='+', metavar='NAME=VALUE', help='arguments of the model: dim=256 depth=2')
    learning.add_argument('--optimizer', choices=OPTIMIZERS)
    option(learning, 'lr', type=float, help='highest learning rate')
    option(learning, 'table-lr', type=float, help='that of tables of ids and what maps to ids (default: --lr)')
    learning.add_argument('--schedule', choices=SCHEDULES, help='how the learning rate falls after its warm-up')
    learning.add_argument('--warmup', type=share, help='share of the run over which it rises')
    learning.add_argument('--weight-decay', type=share, help='of matrices')
    option(learning, 'clip', type=float, help='largest norm of the gradient')
    learning.add_argument('--ema', type=share, help='decay of averaged weights, which are scored and saved')
    learning.add_argument('--mixed-precision', choices=PRECISIONS)
    switch(learning, 'compile', 'torch.compile the blocks')
    switch(learning, 'gradient-checkpointing', 'less memory, a third more time')

    watching = parser.add_argument_group('watching')
    option(watching, 'every', type=int, help='steps between validations, each with a sample (default: ten in a run)')
    option(watching, 'checkpoint-every', type=int, help='steps between checkpoints')
    option(watching, 'keep', type=int, help='how many checkpoints stay, besides the best')
    watching.add_argument('--log-with', nargs='+', choices=TRACKERS)
    option(watching, 'log-every', type=int, help='steps between rows of metrics and entries of a tracker')
    option(watching, 'valid-bytes', type=int, help='bytes of the validation split to score on the way')

    scoring = parser.add_argument_group('scoring')
    scoring.add_argument('--eval', type=folder, metavar='CHECKPOINT', help='score a saved model instead of training')
    scoring.add_argument('--split', choices=('valid', 'test'), help='what --eval scores (default: valid)')
    return parser


def parse_args(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    parser = build_parser(description)
    args = parser.parse_args(argv)

    if args.steps and args.minutes:
        parser.error('--steps and --minutes: give one of them')
    if args.split and not args.eval:
        parser.error('--split is for --eval, which was not given')
    if args.eval:
        scores = {'eval', 'split', 'data', 'text_key', 'seq_len', 'batch_size'}
        for name, value in vars(args).items():
            if value is not None and name not in scores:
                parser.error(f'--{name.replace("_", "-")} is for training, --eval does none')
    if args.model:
        args.model = dict(parse_setting(parser, text) for text in args.model)
    return args


def named(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError('must name a folder, got an empty name')
    return text


def folder(text: str) -> Path:
    return Path(named(text))


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 0 and below 1, got {text}')
    return value


def parse_setting(parser: argparse.ArgumentParser, text: str) -> tuple[str, Any]:
    name, equals, written = text.partition('=')
    if not equals:
        parser.error(f'--model takes NAME=VALUE, got {text}')
    try:
        value = ast.literal_eval(written)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = written
    try:
        # a run keeps its settings as JSON
        as_json(value)
    except (ValueError, TypeError, RecursionError):
        parser.error(f'--model {name}: must be a number, a string, None, True, False, a tuple or a dict, got {written}')
    return name, value


def flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def new_settings(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name, value in vars(args).items() if value is not None}
    name = given.get('preset', 'auto')
    if name == 'auto':
        name = 'gpu' if torch.cuda.is_available() else 'cpu'
    preset = PRESETS[name]
    settings = {**DEFAULTS, **preset, 'preset': name}
    settings |= {key: value for key, value in given.items() if key in settings}
    settings['model'] = {**preset['model'], **given.get('model', {})}
    for key, instead in ELSEWHERE.items():
        if key in settings['model']:
            raise ValueError(f'--model {key}: {instead}')
    if 'steps' in given or 'minutes' in given:
        settings |= dict(steps=given.get('steps'), minutes=given.get('minutes'))
    if settings['mixed_precision'] is None:
        half = 'bf16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'no'
        settings['mixed_precision'] = precision = os.environ.get('ACCELERATE_MIXED_PRECISION', half)
        if precision not in PRECISIONS:
            raise ValueError(f'ACCELERATE_MIXED_PRECISION must be one of {", ".join(PRECISIONS)}, got {precision!r}')
    return as_json(settings)


def old_settings(args: argparse.Namespace, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Those of the run that goes on. Raises ValueError where something else was asked for."""
    settings, changed, unlike = {**DEFAULTS, **record['settings']}, [], []
    length = {name: value for name in LENGTH if (value := getattr(args, name)) is not None}
    if length and any(settings[name] != value for name, value in length.items()) and is_finished(record):
        settings |= {**dict.fromkeys(LENGTH), **length}
        if is_finished({**record, 'settings': settings}):
            raise ValueError(
                f'{folder} has {reached(record)} behind it: {" ".join(f"{flag(k)} {v}" for k, v in length.items())} is '
                'no longer (it counts all of the run, from the beginning)'
            )
    for name, value in as_json({k: v for k, v in vars(args).items() if v is not None and k in settings}).items():
        if name in FREE:
            settings[name] = value
        elif name == 'model':
            changed += [f'--model {k}={v!r}, not {settings["model"].get(k)!r}' for k, v in value.items()
                        if settings['model'].get(k) != v]  # fmt: skip
        elif value != settings[name] and (name, value) != ('preset', 'auto'):
            unlike.append(name)
            changed.append(f'{flag(name)} {value}, not {settings[name]}')
    if changed:
        raise ValueError(
            f'{folder} was made with other arguments: {"; ".join(changed)}. Leave them out to go on as before, '
            'or begin another run without --resume'
            + ('. A run can be made longer once it is finished' if set(length) & set(unlike) else '')
        )
    return settings


def is_finished(record: dict[str, Any]) -> bool:
    """Whether the run that a checkpoint is of has no step left."""
    settings, progress = record['settings'], record.get('progress', dict(step=0, elapsed=0.0))
    if settings['steps']:
        return progress['step'] >= settings['steps']
    return progress['elapsed'] >= 60 * settings['minutes']


def reached(record: dict[str, Any]) -> str:
    progress = record['progress']
    return f'{progress["step"]:,} steps and {progress["elapsed"] / 60:.2f} minutes'


def share_rows(settings: dict[str, Any], rows: int, args: argparse.Namespace, processes: int) -> None:
    """Sets batch_size so that the processes there are learn from as many sequences a step as the run did before.

    Raises ValueError where they cannot.
    """
    accum = settings['grad_accum']
    if args.batch_size is None:
        settings['batch_size'] = rows // (accum * processes)
    if settings['batch_size'] * accum * processes != rows:
        raise ValueError(
            f'a step of this run has {rows} sequences, and {processes} processes x --batch-size '
            f'{settings["batch_size"]} x --grad-accum {accum} have {settings["batch_size"] * accum * processes}: '
            'give both so that they match'
        )
