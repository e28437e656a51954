"""Sampling and the generation loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def sample(logits: Tensor, *, temperature: float = 1.0, filter_thres: float = 0.9) -> Tensor:
    """Draws one id a row: `(batch, num_tokens)` to `(batch,)`.

    The most likely `1 - filter_thres` share of the vocabulary is kept, at least one id. A temperature of 0 takes
    the likeliest.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)

    # rounded first: (1 - 0.9) * 30 is a hair off 3, and a ceiling would make a whole id of it
    kept = max(math.ceil(round((1 - filter_thres) * logits.shape[-1], 6)), 1)
    values, ids = logits.topk(kept, dim=-1)
    probs = (values.float() / temperature).softmax(dim=-1)
    return ids.gather(-1, torch.multinomial(probs, 1)).squeeze(-1)


def generate(
    model: Callable[[Tensor], Tensor],
    prompt: Tensor,
    seq_len: int,
    *,
    context: int,
    temperature: float = 1.0,
    filter_thres: float = 0.9,
) -> Tensor:
    """Samples `seq_len` new ids after `prompt`, `(batch, n)` to `(batch, seq_len)`.

    `model` maps ids to logits; each step it reads the last `context` ids.
    """
    ids = prompt.long()
    for _ in range(seq_len):
        logits = model(ids[:, -context:])[:, -1]
        ids = torch.cat((ids, sample(logits, temperature=temperature, filter_thres=filter_thres)[:, None]), dim=-1)
    return ids[:, prompt.shape[1] :]
