"""One run of one contestant of the race, in a virtual environment that has its package: reads JSON, prints JSON.

Stands by itself, on PyTorch and the contestant's package alone: the published package has the name of this one.
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

# of a text in one go where a model has no state: each window brings so many bytes that are scored
OVERLAP = 2


def published(**settings: Any) -> nn.Module:
    from simple_hierarchical_transformer import HierarchicalTransformer

    # id 0 is none of the corpus, so that the package's ignored id leaves out nothing
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
    """GFLOP/s of a product of matrices, to tell a quiet machine from a busy one."""
    x = torch.randn(1024, 1024)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(seconds) / 1e9


def check_causal(model: nn.Module, seq_len: int) -> None:
    """Refuses to score a model that looks ahead: its score would be none."""
    model.eval()
    ids = torch.randint(1, 256, (1, seq_len), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids)
        for place in (seq_len // 2, seq_len // 2 + 1, seq_len // 2 + 2, seq_len // 2 + 3, seq_len - 1):
            changed = ids.clone()
            changed[:, place] = ids[:, place] % 255 + 1
            if not torch.allclose(whole[:, :place], model(changed)[:, :place], atol=1e-4):
                raise ValueError(f'what stands at {place} changes what is predicted before it')
    model.train()


def learning_rate(progress: float, highest: float, warmup: float = 0.03) -> float:
    """Up over `warmup` of the run, then down to a tenth along a cosine."""
    if progress < warmup:
        return highest * max(progress / warmup, 0.01)
    return highest * (0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def loss_of(model: nn.Module, ids: Tensor, *, own: bool) -> Tensor:
    if own:
        # the published package trains its levels by losses of its own
        loss = model(ids, return_loss=True)
        return loss[0] if isinstance(loss, tuple) else loss
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, run: dict[str, Any]) -> dict[str, Any]:
    """AdamW with warm-up and decay, for so many seconds of wall-clock time."""
    seq_len, batch, own = run['seq_len'], run['batch'], run['builder'] == 'published'
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=run['lr'], betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(run['seed'])
    steps, began = 0, time.monotonic()
    while (progress := (time.monotonic() - began) / run['seconds']) < 1:
        starts = torch.randint(len(text) - seq_len, (batch,), generator=generator).tolist()
        ids = torch.stack([text[start : start + seq_len + 1] for start in starts]).long()
        loss = loss_of(model, ids, own=own)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ValueError(f'the loss was {loss.item()} at step {steps}')
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(progress, run['lr'])
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return dict(steps=steps, bytes=steps * batch * seq_len, train_seconds=time.monotonic() - began)


@torch.no_grad()
def windowed_bits(model: nn.Module, text: Tensor, seq_len: int, *, fresh: int | None = None) -> float:
    """Bits per byte in windows, of each of which the last `fresh` bytes are scored: all of them by default.

    `text` begins with a byte that is read and not scored. Every byte after it that fills a window is scored once.
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
            # what comes before the first window's fresh bytes is scored there
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
    # windows begin with the byte before their split
    held_out = {name: read_bytes(run['data'], [run[name][0] - 1, run[name][1]]) for name in ('valid', 'test')}
    seq_len = run['seq_len']

    # JSON knows lists alone, and peers want tuples
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
        streaming_bits=windowed_bits(
            model, held_out['test'][: run['streaming_bytes'] + 1], seq_len, fresh=seq_len // OVERLAP
        ),
        version=metadata.version(run['package']),
        torch=torch.__version__,
    )
    print(json.dumps(result))


if __name__ == '__main__':
    main()
