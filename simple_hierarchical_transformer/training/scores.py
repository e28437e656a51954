"""How good a model is: bits per byte, and how it writes. Processes share the work, and all learn the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches import IGNORED, PAD
from ..data import Corpus
from ..model import HierarchicalTransformer

SAMPLE_PROMPT, SAMPLE_LENGTH = 64, 128

AddUp = Callable[[Tensor], Tensor]


def alone(total: Tensor) -> Tensor:
    """The sum over all processes, where there is one."""
    return total


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, add_up: AddUp = alone
) -> float:
    """Mean over every label of the batches, those of all processes where `add_up` adds them up."""
    nats, count = 0.0, 0
    for ids, labels in batches:
        logits = model(ids.to(device)).float()
        flat = labels.flatten().to(device)
        nats += F.cross_entropy(logits.flatten(0, 1), flat, reduction='sum', ignore_index=IGNORED).item()
        count += int((labels != IGNORED).sum())
    return mean_bits(nats, count, device, add_up)


def streaming_bits(
    model: HierarchicalTransformer, texts: Tensor, part: tuple[int, int] = (0, 1), add_up: AddUp = alone
) -> float:
    """Mean over texts `(rows, length)`, each read in one stream; `part` is the process and how many there are."""
    index, parts = part
    # as many rows for each process; what is read twice counts once
    mine = range(index, -(-len(texts) // parts) * parts, parts)
    _, log_probs = model.score(texts[[row % len(texts) for row in mine]], return_log_probs=True)
    counted = log_probs[[i for i, row in enumerate(mine) if row < len(texts)]]
    return mean_bits(-counted.double().sum().item(), counted.numel(), log_probs.device, add_up)


def mean_bits(nats: float, count: int, device: torch.device, add_up: AddUp) -> float:
    # not every device has float64
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    nats, count = add_up(torch.tensor([nats, count], dtype=dtype, device=device)).tolist()
    return nats / max(count, 1) / math.log(2)


def sample_text(model: HierarchicalTransformer, corpus: Corpus, span: range, seed: int) -> str:
    """The first bytes of a split, and after >>> how the model goes on from them."""
    device = model.token_emb.weight.device
    prompt = corpus.data[span.start : span.start + SAMPLE_PROMPT].long()
    generator = torch.Generator(device).manual_seed(seed)
    new = model.generate(prompt[None].to(device), SAMPLE_LENGTH, generator=generator)[0].cpu()
    texts = [bytes(i for i in ids.tolist() if i < PAD).decode('utf-8', errors='replace') for ids in (prompt, new)]
    return '>>>'.join(texts)
