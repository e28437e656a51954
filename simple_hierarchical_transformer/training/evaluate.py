"""Scores the whole of a split with a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator

from ..config_file import CONFIG_FILE
from ..data.batches import END, evaluation_batches, find_windows, split_bytes
from ..data.corpus import Corpus
from ..model import HierarchicalTransformer
from .processes import check_processes, say
from .record import check_record
from .run_folder import run_of
from .scores import bits_per_byte
from .settings import DEFAULTS
from .sources import load_sources
from .watch import counted


def evaluate(args: argparse.Namespace, data_folder: Path) -> None:
    """Prints bits per byte over a split in windows. If the model reads across ends of texts, also in one stream.

    Raises ValueError if there is no saved model, where several processes run, or where the data does not fit.
    """
    if not (args.eval / CONFIG_FILE).is_file():
        raise ValueError(f'{args.eval} is not a saved model (a folder with config.json and model.safetensors)')
    accelerator = Accelerator()
    check_processes(accelerator)
    if accelerator.num_processes > 1:
        raise ValueError(f'scoring a saved model runs in one process, got {accelerator.num_processes}')

    split = args.split or 'valid'
    model = HierarchicalTransformer.from_pretrained(args.eval).to(accelerator.device)
    seq_len, batch_size = args.seq_len or model.seq_len, args.batch_size or 8
    if seq_len > model.seq_len:
        raise ValueError(f'--seq-len must be at most the {model.seq_len} of the model, got {seq_len}')

    # a model trained with --documents has not learned to continue from one text into the next
    documents = model.num_tokens > END
    for corpus in load_evaluated(args, data_folder):
        span = split_bytes(len(corpus), seq_len=seq_len)[split]
        batches = evaluation_batches(corpus, span, seq_len=seq_len, batch_size=batch_size, documents=documents)
        count = -(-len(find_windows(corpus, span, seq_len, documents)[0]) // batch_size)
        score = bits_per_byte(model, counted(batches, count, split, 'batch'), accelerator.device)
        message = f'{split}: {{:.4f}} bits per byte over {len(span):,} bytes of {corpus.name}, in '
        say(message.format(score) + f'windows of {seq_len:,}')
        if not documents:
            say(message.format(model.score(corpus[span.start - 1 : span.stop])) + 'one stream')


def load_evaluated(args: argparse.Namespace, data_folder: Path) -> list[Corpus]:
    """Loads the corpora to score: --data, else the data of the run that trained the model, else the default.

    Raises ValueError if the run's data is gone or has changed.
    """
    found = run_of(args.eval.resolve()) if args.data is None else None
    if found is None:
        return load_sources(args.data, data_folder, text_key=args.text_key or 'text', say=say)[0]
    run, file = found
    check_record(run, file)
    settings = {**DEFAULTS, **run['settings']}
    named = ' '.join(settings['data'] or ['the default'])
    try:
        text_key = args.text_key or settings['text_key']
        corpora = load_sources(settings['data'], data_folder, text_key=text_key, say=say)[0]
    except (ValueError, OSError) as error:
        raise ValueError(f'the data of the run, {named}, cannot be loaded: {error}. Give --data') from error
    if args.text_key is None and [corpus.fingerprint() for corpus in corpora] != run['data']:
        raise ValueError(f'the data of the run, {named}, has changed since. Give --data')
    say(f'the data of the run: {named}')
    return corpora
