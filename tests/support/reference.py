"""Slow reference forms that several tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simple_hierarchical_transformer.merges.attention import AttentionMerge


def attended(merge: AttentionMerge, tokens: Sequence[Tensor], strides: Sequence[int], i: int, j: int) -> Tensor:
    """The update that an attention merge adds to token j of level i, computed key by key."""
    to, scores, values = merge.receivers[str(i)], [], []
    query = to.to_q(merge.norms[i](tokens[i][:, j])).unflatten(-1, (to.heads, -1))
    for other, x in enumerate(tokens):
        for back in range(merge.window + 1):
            k = j * strides[i] // strides[other] - back
            if k >= 0:
                kv = to.to_kv[other](merge.norms[other](x[:, k])).unflatten(-1, (2, to.heads, -1))
                key, value = kv.unbind(1)
                scores.append((query * key).sum(-1) / query.shape[-1] ** 0.5 + to.bias[:, other, back])
                values.append(value)
    share = torch.stack(scores).softmax(0)
    return to.to_out((share[..., None] * torch.stack(values)).sum(0).flatten(1))
