"""Scores of a model in bits per byte, and samples. The processes share the work, and each gets the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batches import IGNORED, evaluation_batches, streaming_rows
from ..data.corpus import Corpus
from ..model import HierarchicalTransformer

SAMPLE_PROMPT, SAMPLE_LENGTH = 64, 128
STREAMS = 8  # number of streams that are scored in parallel

AllReduce = Callable[[Tensor], Tensor]


def single_process(total: Tensor) -> Tensor:
    """The sum over all processes if there is only one."""
    return total


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    all_reduce: AllReduce = single_process,
) -> float:
    """Mean bits per label over all batches. `all_reduce` sums over processes."""
    nats, count = 0.0, 0
    for ids, labels in batches:
        logits = model(ids.to(device)).float()
        flat = labels.flatten().to(device)
        nats += F.cross_entropy(logits.flatten(0, 1), flat, reduction='sum', ignore_index=IGNORED).item()
        count += int((labels != IGNORED).sum())
    return mean_bits(nats, count, device, all_reduce)


def streaming_bits(
    model: HierarchicalTransformer,
    texts: Tensor,
    part: tuple[int, int] = (0, 1),
    all_reduce: AllReduce = single_process,
) -> float:
    """Mean bits per byte of texts `(rows, length)`, each read in one stream.

    `part` is `(i, n)`: process i of n calls this.
    """
    index, parts = part
    # each process reads the same number of rows; a row that is read twice counts once
    mine = range(index, -(-len(texts) // parts) * parts, parts)
    _, log_probs = model.score(texts[[row % len(texts) for row in mine]], return_log_probs=True)
    counted = log_probs[[i for i, row in enumerate(mine) if row < len(texts)]].cpu()
    return mean_bits(-counted.double().sum().item(), counted.numel(), log_probs.device, all_reduce)


def validation_scores(
    model: HierarchicalTransformer,
    corpora: Sequence[Corpus],
    spans: Sequence[range],
    *,
    seq_len: int,
    size: int,
    documents: bool,
    device: torch.device,
    part: tuple[int, int],
    all_reduce: AllReduce,
) -> tuple[list[float], list[float] | None]:
    """Bits per byte of each corpus in windows, and in streams unless texts are separate (`documents`).

    Args:
        model: the model.
        corpora: the corpora to score.
        spans: the part of each corpus to score.
        seq_len: the number of bytes in a window.
        size: the number of bytes of each corpus to score.
        documents: whether texts are separate.
        device: the device of the model.
        part: `(i, n)`: process i of n calls this.
        all_reduce: sums a tensor over processes.
    """
    windowed, streamed = [], []
    for corpus, span in zip(corpora, spans, strict=True):
        windows = evaluation_batches(
            corpus, span, seq_len=seq_len, batch_size=8, max_bytes=size, documents=documents, part=part
        )
        windowed.append(bits_per_byte(model, windows, device, all_reduce))
        if not documents:
            texts = streaming_rows(corpus, span, rows=STREAMS, size=size)
            streamed.append(streaming_bits(model, texts, part, all_reduce))
    return windowed, streamed or None


def mean_bits(nats: float, count: int, device: torch.device, all_reduce: AllReduce) -> float:
    # 'mps' has no float64
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    nats, count = all_reduce(torch.tensor([nats, count], dtype=dtype, device=device)).tolist()
    return nats / max(count, 1) / math.log(2)


def sample_text(model: HierarchicalTransformer, corpus: Corpus, span: range, seed: int) -> str:
    """The first bytes of a split, then >>> and the continuation by the model."""
    device = model.token_emb.weight.device
    prompt = bytes(corpus[span.start : span.start + SAMPLE_PROMPT].tolist())
    new = model.generate(prompt, SAMPLE_LENGTH, generator=torch.Generator(device).manual_seed(seed))
    return '>>>'.join(text.decode('utf-8', errors='replace') for text in (prompt, new))
