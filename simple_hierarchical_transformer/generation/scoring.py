"""Scores: how well a model predicts given ids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_int
from .prompts import TEXT, PromptLike, as_bytes, as_tensor, check_ids
from .protocol import StatefulModel


@torch.no_grad()
def score(
    model: StatefulModel, ids: PromptLike, *, chunk_size: int | None = None, return_log_probs: bool = False
) -> float | tuple[float, Tensor]:
    """Bits per id that `model` needs to predict `ids`. See `Generative.score`."""
    read = as_bytes('ids', ids) if isinstance(ids, TEXT) else as_tensor(ids)
    single = isinstance(read, Tensor) and read.ndim == 1
    rows = read[None] if isinstance(read, Tensor) and single else read
    # values are checked chunk by chunk, because a long text of bytes takes eight times its memory as int64
    check_ids('ids', rows[:, :2] if isinstance(rows, Tensor) and rows.ndim == 2 else rows, model.num_tokens)
    assert isinstance(rows, Tensor)
    if rows.shape[1] < 2:
        raise ValueError(f'ids must have at least 2 tokens to predict one from another, got {rows.shape[1]}')
    chunk_size = check_int('chunk_size', model.seq_len if chunk_size is None else chunk_size)

    device = model.token_emb.weight.device
    total, count, state = 0.0, 0, None
    log_probs: list[Tensor] = []
    for begin in range(0, rows.shape[1] - 1, chunk_size):
        window = check_ids('ids', rows[:, begin : begin + chunk_size + 1], model.num_tokens).to(device)
        logits, state = model(window[:, :-1], state=state, return_state=True)
        targets = window[:, 1:]
        picked = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        picked = picked.gather(-1, targets[..., None])[..., 0]
        counted = targets != model.ignore_index
        # summed on the CPU: not every device supports float64
        total -= (picked * counted).cpu().double().sum().item()
        count += int(counted.sum())
        if return_log_probs:
            log_probs.append(picked)

    if not count:
        raise ValueError(f'ids must hold more than ignore_index = {model.ignore_index}, got no other id to predict')
    bits = total / count / math.log(2)
    if not return_log_probs:
        return bits
    joined = torch.cat(log_probs, dim=1)
    return bits, joined[0] if single else joined
