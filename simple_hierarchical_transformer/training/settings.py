"""The settings of a run: command line, presets and stored settings."""

from __future__ import annotations

import argparse
import ast
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import Config
from ..data.batches import IGNORED, PAD
from ..options import describe
from ..terminal import Number
from .optim import OPTIMIZERS, SCHEDULES
from .sources import NAMED
from .trackers import TRACKERS

# model arguments for a stream of bytes, where no id is ignored, and for separate texts, with ids for the end of a
# text and for padding
BYTES: dict[str, Any] = dict(num_tokens=256, ignore_index=IGNORED, recon_ignore_index=IGNORED)
TEXTS: dict[str, Any] = dict(num_tokens=PAD + 1, ignore_index=PAD, recon_ignore_index=PAD)

# numbers outside these bounds are mistakes, and products of several would overflow
LEAST, MOST = 1e-12, 10**12
# the range of NumPy's seeds
MOST_SEED = 2**32 - 1
MOST_WORKERS = 1024

PRECISIONS = ('no', 'bf16', 'fp16')

DEFAULTS: dict[str, Any] = dict(
    data=None, documents=False, text_key='text', segment_length=None, steps=None, minutes=None,
    optimizer='adamw', table_lr=None, weight_decay=0.1, clip=1.0, warmup=0.03, schedule='cosine', ema=None,
    mixed_precision=None, compile=False, gradient_checkpointing=False, seed=42,
    every=None, checkpoint_every=1000, keep=3, log_every=10, log_with=None, workers=0,
    valid_bytes=1 << 16,  # how much of the validation split each validation scores
)  # fmt: skip
# settings that may change when a run resumes
FREE = ('every', 'checkpoint_every', 'keep', 'log_every', 'log_with', 'workers', 'batch_size', 'grad_accum')

# settings that may grow when a finished run resumes
LENGTH = ('steps', 'minutes')

# arguments of the model that --model refuses
ELSEWHERE = {
    'seq_len': 'give --seq-len',
    'gradient_checkpointing': 'give --gradient-checkpointing',
    'num_tokens': 'train.py reads bytes',
    'ignore_index': 'no byte is ignored; --documents pads with a separate id',
    'recon_ignore_index': 'no byte is ignored; --documents pads with a separate id',
}

# the model settings of both presets, found at the size of 'cpu'
# (benchmarks/results/recipe_search/2026-11-26-x86_64-1-thread/notes.md)
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
    # benchmarks/quality/race.py measures it
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
    # the smallest model of benchmarks/speed/plan.py. Most operations go to the fine level and its small window, which
    # benchmarks/quality/scaling.py found to gain most from them. The coarse level reads the whole context for 3 % more
    # operations. Muon's rate is that of 'cpu' divided by the square root of the ratio of widths: this keeps the
    # spectral norm of its steps, 0.2 * lr * sqrt(width), unchanged (Yang et al. 2023, arXiv 2310.17813). The rate of
    # tables and of the map to logits is that of 'cpu' divided by the ratio of widths. Weights decay, since a run is
    # long (Liu et al. 2025, arXiv 2502.16982). The steps are twelve passes over enwik8
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


def build_parser(
    description: str | None,
    prog: str | None = None,
    *,
    task: Literal['train', 'plan', 'eval'] = 'train',
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """The command line of a task.

    'train' has all options. 'plan' has those of a run, and sets --dry-run. 'eval' has those that score a model.
    """
    parser = kind(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(group: Any, name: str, **settings: Any) -> None:
        if settings.get('type') is int:
            settings['type'] = Number(int, 1, MOST)
        elif settings.get('type') is float:
            settings['type'] = Number(float, LEAST, MOST)
        group.add_argument(f'--{name}', **settings)

    def switch(group: Any, name: str, text: str) -> None:
        group.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, default=None, help=text)

    def add_source(group: Any) -> None:
        group.add_argument(
            '--data', nargs='+', metavar='SOURCE[=WEIGHT]',
            help='files, folders or globs: text, .gz .bz2 .xz .zst, .zip .tar, .jsonl .parquet; or '
            + ', '.join(NAMED),
        )  # fmt: skip

    def add_text_key(group: Any) -> None:
        group.add_argument('--text-key', help='column of .jsonl and .parquet files that holds the text')

    split: dict[str, Any] = dict(choices=('valid', 'test'), help='the split to score (default: valid)')
    if task == 'eval':
        parser.add_argument('eval', type=folder, metavar='CHECKPOINT', help='folder of the saved model to score')
        parser.add_argument('--split', **split)
        add_source(parser)
        add_text_key(parser)
        option(parser, 'seq-len', type=int, help="bytes in a window (default: the model's context)")
        option(parser, 'batch-size', type=int, help='windows in a batch (default: 8)')
        return parser

    run = parser.add_argument_group('the run')
    run.add_argument('--preset', choices=('auto', *PRESETS), help='settings to start from')
    option(run, 'steps', type=int, help='optimizer steps, in all')
    option(run, 'minutes', type=float, help='minutes of training, in all')
    run.add_argument('--seed', type=Number(int, 0, MOST_SEED))
    run.add_argument('--out', type=folder, help='folder of the run (default: runs/<date>-<time>)')
    run.add_argument(
        '--resume', nargs='?', const='latest', metavar='FOLDER', type=named,
        help='continue a run or one of its checkpoints. Without a name, continue the run in --out, or start it if '
        'there is none yet; without --out, the run that was active last. More --steps or --minutes, in all, train a '
        'finished run longer: each schedule continues at the rate that a run of that length has there',
    )  # fmt: skip
    if task == 'train':
        run.add_argument('--dry-run', action='store_true', default=None, help='print what the run would cost, and exit')

    data = parser.add_argument_group('data')
    add_source(data)
    switch(data, 'documents', 'keep sequences within one file or row')
    add_text_key(data)
    option(data, 'seq-len', type=int, help='bytes in a sequence: the context of the model')
    option(data, 'segment-length', type=int, help='bytes in a segment, which is read with the state of earlier ones')
    option(data, 'batch-size', type=int, help='sequences in a batch, on each device')
    option(data, 'grad-accum', type=int, help='batches in an optimizer step')
    data.add_argument('--workers', type=Number(int, 0, MOST_WORKERS), help='processes that load data')

    learning = parser.add_argument_group('learning')
    learning.add_argument(
        '--model',
        nargs='+',
        metavar='NAME=VALUE',
        help='options of the model, as dim=256 depth=2; --model help lists them',
    )
    learning.add_argument('--optimizer', choices=OPTIMIZERS)
    option(learning, 'lr', type=float, help='highest learning rate')
    option(learning, 'table-lr', type=float, help='learning rate of tables of ids and of maps to ids (default: --lr)')
    learning.add_argument('--schedule', choices=SCHEDULES, help='how the learning rate falls after its warm-up')
    learning.add_argument('--warmup', type=share, help='share of the run over which the learning rate rises')
    learning.add_argument('--weight-decay', type=share, help='weight decay of matrices')
    option(learning, 'clip', type=float, help='largest norm of the gradient')
    learning.add_argument('--ema', type=share, help='decay of averaged weights, which are scored and saved')
    learning.add_argument('--mixed-precision', choices=PRECISIONS)
    switch(learning, 'compile', 'torch.compile the blocks')
    switch(learning, 'gradient-checkpointing', 'save memory at the cost of a third more time')

    watching = parser.add_argument_group('watching')
    option(watching, 'every', type=int, help='steps between validations, each with a sample (default: ten in a run)')
    option(watching, 'checkpoint-every', type=int, help='steps between checkpoints')
    option(watching, 'keep', type=int, help='how many checkpoints to keep, besides the best')
    watching.add_argument('--log-with', nargs='+', choices=TRACKERS)
    option(watching, 'log-every', type=int, help='steps between rows of metrics and entries of a tracker')
    option(watching, 'valid-bytes', type=int, help='bytes of the validation split that a validation scores')

    if task == 'plan':
        parser.set_defaults(dry_run=True, eval=None, split=None)
        return parser
    scoring = parser.add_argument_group('scoring')
    scoring.add_argument('--eval', type=folder, metavar='CHECKPOINT', help='score a saved model instead of training')
    scoring.add_argument('--split', **split)
    return parser


def parse_args(
    argv: Sequence[str] | None,
    description: str | None,
    prog: str | None = None,
    task: Literal['train', 'plan'] = 'train',
) -> argparse.Namespace:
    """Parses the command line of train.py. Wrong arguments end the process with a message."""
    parser = build_parser(description, prog, task=task)
    args = parser.parse_args(argv)

    if args.steps and args.minutes:
        parser.error('--steps and --minutes: give one of them')
    if args.split and not args.eval:
        parser.error('--split is for --eval, which was not given')
    if args.eval:
        scores = {'eval', 'split', 'data', 'text_key', 'seq_len', 'batch_size'}
        for name, value in vars(args).items():
            if value is not None and name not in scores:
                parser.error(f'--{name.replace("_", "-")} is for training, and cannot be given with --eval')
    if args.model == ['help']:
        print(describe(Config, indent=0, skip=ELSEWHERE))
        parser.exit()
    if args.model:
        args.model = dict(parse_setting(parser, text) for text in args.model)
    return args


def parse_eval_args(argv: Sequence[str], description: str, prog: str) -> argparse.Namespace:
    """Parses the command line that scores a model. The result is as `parse_args` returns it for --eval."""
    return build_parser(description, prog, task='eval').parse_args(argv)


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
        # a run stores its settings as JSON
        as_json(value)
    except (ValueError, TypeError, RecursionError):
        parser.error(f'--model {name}: must be a number, a string, None, True, False, a tuple or a dict, got {written}')
    return name, value


def flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def new_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a new run. Raises ValueError if an argument is not allowed."""
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
    """The settings of a resumed run. Raises ValueError if an argument differs from them."""
    settings, changed, unlike = {**DEFAULTS, **record['settings']}, [], []
    length = {name: value for name in LENGTH if (value := getattr(args, name)) is not None}
    if length and any(settings[name] != value for name, value in length.items()) and is_finished(record):
        settings |= {**dict.fromkeys(LENGTH), **length}
        if is_finished({**record, 'settings': settings}):
            raise ValueError(
                f'{folder} has run for {reached(record)}: {" ".join(f"{flag(k)} {v}" for k, v in length.items())} is '
                'not longer (it counts the whole run, from the beginning)'
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
    """Whether the run of a checkpoint has no step left."""
    settings, progress = record['settings'], record.get('progress', dict(step=0, elapsed=0.0))
    if settings['steps']:
        return progress['step'] >= settings['steps']
    return progress['elapsed'] >= 60 * settings['minutes']


def reached(record: dict[str, Any]) -> str:
    progress = record['progress']
    return f'{progress["step"]:,} steps and {progress["elapsed"] / 60:.2f} minutes'


def share_rows(settings: dict[str, Any], rows: int, args: argparse.Namespace, processes: int) -> None:
    """Sets batch_size so that a step has `rows` sequences over all processes, as before the run stopped.

    Raises ValueError if that is impossible.
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
