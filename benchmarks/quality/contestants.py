"""One run of a contestant of the race, in a virtual environment with its package. Reads and prints JSON.

This script imports only PyTorch and the package of the contestant, because the published package has the name of this
one.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# a model without a state scores a stream in windows, of which each scores its last 1 / OVERLAP
OVERLAP = 2


def published(**settings: Any) -> nn.Module:
    from simple_hierarchical_transformer import HierarchicalTransformer

    # the package ignores id 0, which the corpus does not contain
    return HierarchicalTransformer(num_tokens=256, **settings)


def megabyte(**settings: Any) -> nn.Module:
    from MEGABYTE_pytorch import MEGABYTE

    return MEGABYTE(num_tokens=256, **settings)


def hourglass(**settings: Any) -> nn.Module:
    from hourglass_transformer_pytorch import HourglassTransformerLM

    return HourglassTransformerLM(num_tokens=256, **settings)


def x_transformers(*, max_seq_len: int, **settings: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(**settings)
    return TransformerWrapper(num_tokens=256, max_seq_len=max_seq_len, use_abs_pos_emb=False, attn_layers=layers)


BUILDERS: dict[str, Callable[..., nn.Module]] = dict(
    published=published, megabyte=megabyte, hourglass=hourglass, x_transformers=x_transformers
)


def matmul_pace() -> float:
    """GFLOP/s of a matrix product. Shows whether the machine is busy."""
    x = torch.randn(1024, 1024)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(seconds) / 1e9


def check_causal(model: nn.Module, seq_len: int) -> None:
    """Raises ValueError if a later byte changes an earlier prediction."""
    model.eval()
    ids = torch.randint(1, 256, (1, seq_len), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids)
        for place in (seq_len // 2, seq_len // 2 + 1, seq_len // 2 + 2, seq_len // 2 + 3, seq_len - 1):
            changed = ids.clone()
            changed[:, place] = ids[:, place] % 255 + 1
            if not torch.allclose(whole[:, :place], model(changed)[:, :place], atol=1e-4):
                raise ValueError(f'the byte at {place} changes predictions before it')
    model.train()


def learning_rate(progress: float, highest: float, warmup: float = 0.03) -> float:
    """Rises over the share `warmup` of the run, then falls to a tenth along a cosine."""
    if progress < warmup:
        return highest * max(progress / warmup, 0.01)
    return highest * (0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def loss_of(model: nn.Module, ids: Tensor, *, auxiliary: bool) -> Tensor:
    if auxiliary:
        # the published package adds auxiliary losses for its levels
        loss = model(ids, return_loss=True)
        return loss[0] if isinstance(loss, tuple) else loss
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, run: dict[str, Any]) -> dict[str, Any]:
    """Trains with AdamW, warm-up and decay for `run['seconds']` of wall-clock time.

    With `run['clock'] == 'process'` it is the time of this process, on all of its threads.
    """
    clock = time.process_time if run.get('clock') == 'process' else time.monotonic
    seq_len, batch, auxiliary = run['seq_len'], run['batch'], run['builder'] == 'published'
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=run['lr'], betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(run['seed'])
    steps, began = 0, clock()
    while (progress := (clock() - began) / run['seconds']) < 1:
        starts = torch.randint(len(text) - seq_len, (batch,), generator=generator).tolist()
        ids = torch.stack([text[start : start + seq_len + 1] for start in starts]).long()
        loss = loss_of(model, ids, auxiliary=auxiliary)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ValueError(f'the loss was {loss.item()} at step {steps}')
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(progress, run['lr'])
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return dict(steps=steps, bytes=steps * batch * seq_len, train_seconds=clock() - began)


@torch.no_grad()
def windowed_bits(model: nn.Module, text: Tensor, seq_len: int, *, fresh: int | None = None) -> float:
    """Bits per byte in windows. Each window scores its last `fresh` bytes, by default all.

    The first byte of `text` is only context. Each later byte is scored once, except those that fill no window.
    """
    model.eval()
    fresh = fresh or seq_len
    starts = range(0, len(text) - seq_len, fresh)
    nats, count = 0.0, 0
    for first in range(0, len(starts), 4):
        rows = torch.stack([text[start : start + seq_len + 1] for start in starts[first : first + 4]]).long()
        logits = model(rows[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction='none')
        if first == 0:
            # the first window also scores the bytes before its fresh ones
            nats, count = losses[0, :-fresh].double().sum().item(), seq_len - fresh
        nats += losses[:, -fresh:].double().sum().item()
        count += len(rows) * fresh
    return nats / count / math.log(2)


def read_bytes(path: str, span: list[int]) -> Tensor:
    size = span[1] - span[0]
    with open(path, 'rb') as file:
        file.seek(span[0])
        return torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)


def main() -> None:
    run = json.load(sys.stdin)
    torch.set_num_threads(run['threads'])
    torch.manual_seed(run['seed'])
    text = read_bytes(run['data'], run['train'])
    # the byte before a split is the context of its first byte
    held_out = {name: read_bytes(run['data'], [run[name][0] - 1, run[name][1]]) for name in ('valid', 'test')}
    # parts that are scored as streams, each with a byte of context before it
    streams = [read_bytes(run['data'], span) for span in run.get('streams', [])]
    streams = streams or [held_out['test'][: run['streaming_bytes'] + 1]]
    seq_len = run['seq_len']

    # JSON has only lists, and the packages expect tuples
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in run['model'].items()}
    model = BUILDERS[run['builder']](**settings)
    check_causal(model, seq_len)
    before = matmul_pace()
    clock = time.process_time()
    result = train(model, text, run)
    result['busy'] = (time.process_time() - clock) / result['train_seconds']
    result['pace'] = [before, matmul_pace()]
    result |= dict(
        parameters=sum(p.numel() for p in model.parameters()),
        valid_bits=windowed_bits(model, held_out['valid'], seq_len),
        bits=windowed_bits(model, held_out['test'], seq_len),
        streaming_bits=statistics.mean(
            windowed_bits(model, stream, seq_len, fresh=seq_len // OVERLAP) for stream in streams
        ),
        version=metadata.version(run['package']),
        torch=torch.__version__,
    )
    print(json.dumps(result))


if __name__ == '__main__':
    main()
