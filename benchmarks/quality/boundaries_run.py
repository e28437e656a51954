"""One run of boundaries.py, with a budget of processor time or of operations. Reads and prints JSON.

    python benchmarks/quality/boundaries_run.py < run.json

A step is that of train.py. Only the clock differs: it counts the time of this process, or operations, and stands still
while the model is scored.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.common.machine import commit, machine
from benchmarks.common.training import DATA
from benchmarks.quality.contestants import matmul_pace
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.data.batches import Batches, streaming_rows
from simple_hierarchical_transformer.data.corpus import Corpus, load_corpus
from simple_hierarchical_transformer.data.files import find_files
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.learner import Learner
from simple_hierarchical_transformer.training.progress import Progress
from simple_hierarchical_transformer.training.settings import BYTES

# one stream in PART is scored on the way
PART = 4
# a run ends after that many consecutive steps without a finite loss and gradient
MOST_SKIPPED = 20


def load_text(sources: Sequence[str]) -> Corpus:
    """All files as one corpus, in the order of `sources`."""
    files = [file for source in sources for file in find_files(source)]
    return load_corpus(' '.join(file.name for file in files), files, DATA / 'cache')


def split(size: int, held_out: int) -> dict[str, range]:
    """The bytes of each split. The last `held_out` bytes are the test split, and as many before them choose.

    A quarter of that is left out before each of the two, so that they do not begin in an article that was read.
    """
    gap = held_out // 4
    test = range(size - held_out, size)
    valid = range(test.start - gap - held_out, test.start - gap)
    if valid.start - gap <= held_out:
        raise ValueError(f'data has {size:,} bytes, too few to hold out twice {held_out:,} and train on more')
    return dict(train=range(valid.start - gap), valid=valid, test=test)


def read_streams(corpus: Corpus, span: range, terms: Mapping[str, Any]) -> Tensor:
    """Evenly spaced streams of a split, `(streams, stream_bytes + 1)`."""
    rows, length = terms['streams'], terms['stream_bytes'] + 1
    return streaming_rows(corpus, span, rows=rows, size=rows * length)


def bits_of(model: HierarchicalTransformer, texts: Tensor) -> list[float]:
    """Bits per byte of each stream."""
    model.eval()
    _, log_probs = model.score(texts, return_log_probs=True)
    model.train()
    return (-log_probs.double().mean(dim=1) / math.log(2)).tolist()


def build(settings: Mapping[str, Any], length: int) -> HierarchicalTransformer:
    """A model without memory for its weights."""
    with torch.device('meta'):
        return HierarchicalTransformer(**BYTES, seq_len=length, **settings)


def operations_of(settings: Mapping[str, Any], length: int) -> Callable[[Mapping[int, float]], float]:
    """A function from the share of boundaries of each placed level to the operations of a step on one sequence."""
    model = build(settings, length)

    def count(shares: Mapping[int, float]) -> float:
        model.measured_spacing = {i: 1 / share if share else math.inf for i, share in shares.items()}
        return cost.step_flops(model, length)

    return count


class Shares:
    """The shares of boundaries that a step logs, and their means over the run."""

    def __init__(self, model: HierarchicalTransformer) -> None:
        self.names = {i: f'pieces/{level.compression}x' for i, level in enumerate(model.levels) if level.is_placed}
        self.sums, self.steps = dict.fromkeys(self.names, 0.0), 0

    def add(self, logged: Mapping[str, float]) -> dict[int, float]:
        found = {i: logged[name] for i, name in self.names.items()}
        self.steps += 1
        for i, share in found.items():
            self.sums[i] += share
        return found

    def piece(self) -> list[float]:
        """The mean length of the pieces of each placed level so far."""
        return [round(self.steps / total, 4) if total else math.inf for total in self.sums.values()]


def train(run: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a model until its budget is spent, and scores it.

    Args:
        run: `settings` of train.py; `data`, a list of sources; `budget`, in the unit `unit` ('seconds' of this process
            or 'operations'); `split`, the held-out text to score; `moments`, the shares of the budget after which a
            part of it is scored; `terms` of the scores.
    """
    settings, terms, budget, moments = run['settings'], run['terms'], run['budget'], run['moments']
    torch.set_num_threads(1)
    corpus = load_text(run['data'])
    spans = split(len(corpus), terms['held_out'])
    texts = read_streams(corpus, spans[run['split']], terms)
    rows, length = settings['batch_size'], settings['seq_len']
    batches = Batches([corpus], [spans['train']], rows=rows, seq_len=length, seed=settings['seed'])
    progress = Progress()
    # the learner reads how much of the run is done from a clock of one minute
    learner = Learner(SimpleNamespace(**settings), Accelerator(cpu=True), batches, progress)
    count, shares = operations_of(settings['model'], length), Shares(learner.model)
    pace = [matmul_pace()]

    operations = seconds = 0.0
    curve: list[dict[str, Any]] = []
    wall = time.monotonic()
    done = 0.0
    while done < 1 and progress.in_a_row < MOST_SKIPPED:
        began = time.process_time()
        progress.elapsed = 60 * done
        _, _, logged = learner.step(batches[progress.step], progress.elapsed)
        seconds += time.process_time() - began
        operations += rows * count(shares.add(logged))
        before, done = done, (seconds if run['unit'] == 'seconds' else operations) / budget
        if done < 1 and any(before < share <= done for share in moments):
            bits = statistics.mean(bits_of(learner.model, texts[::PART]))
            curve.append(dict(done=done, step=progress.step, seconds=seconds, operations=operations, bits=bits))
    streams = bits_of(learner.model, texts) if done >= 1 else [math.inf] * len(texts)
    bits = statistics.mean(streams[::PART])
    curve.append(dict(done=done, step=progress.step, seconds=seconds, operations=operations, bits=bits))
    size = progress.step * rows * length
    return dict(
        bits=statistics.mean(streams),
        streams=streams,
        curve=curve,
        steps=progress.step,
        skipped=progress.skipped,
        bytes=size,
        readings=size / len(spans['train']),
        seconds=seconds,
        wall_seconds=time.monotonic() - wall,
        operations=operations,
        piece=shares.piece(),
        parameters=sum(p.numel() for p in learner.model.parameters()),
        tables=0 if learner.model.ngram_emb is None else learner.model.ngram_emb.weight.numel(),
        pace=[*pace, matmul_pace()],
        commit=commit(),
        machine=machine(),
    )


if __name__ == '__main__':
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    print(json.dumps(train(json.load(sys.stdin))))
