"""Attention among tokens that a hash puts into the same bucket."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import MOST_IN_TURN, check_int
from ..memory import keep
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from ..ops.tracing import first_of, stable_sort
from ..ops.window_attention import MIN_BLOCK, block_distances, with_previous
from .base import MixerState
from .rotary import Rotary

# the score of a token with itself, low enough to matter only where the token has no other key
SELF_SCORE = -1e5
# chunks of at most this many tokens run faster step by step than by sorting the whole state
FEW = 16


class LSHAttention(nn.Module):
    """Attention with shared queries and keys, over the last tokens of the same bucket, for several hashes.

    A hash is the nearest of `buckets` directions: random ones and their opposites. Similar vectors mostly share a
    bucket. Keys are queries scaled to length one. A token attends to itself only if it has no other key. Rounds are
    weighted by the denominators of their softmax, so a pair that shares a bucket in several rounds counts in each.
    Kitaev et al. 2020, arXiv 2001.04451, section 2. The rotary embeddings are an addition.

    The paper cuts the sorted tokens into chunks, and the chunk of a token depends on later tokens. Here a token attends
    to the last `entries` tokens of its bucket, including itself. These do not depend on later tokens. The computation
    is windowed attention over the sorted sequence. Later tokens change the order of sums, so rounding makes earlier
    positions depend on them.

    `(batch, seq, dim)` to `(batch, seq, dim)`. Time and memory are `O(rounds * seq * entries)`, plus a sort. The state
    has the last entries of each bucket, newest last: keys and values, each `(batch, rounds, heads, buckets,
    entries - 1, dim_head)`, and their number, `(batch, rounds, heads, buckets)`.

    Args:
        dim: width of the tokens.
        dim_head: width of a head, even.
        heads: number of heads.
        rounds: number of hashes.
        buckets: number of buckets of a hash, even.
        entries: number of tokens of its bucket that a token attends to.

    Raises:
        ValueError: a value is not allowed.
    """

    # the inputs of a step depend on its position
    static_step = False

    rotations: Tensor

    def __init__(
        self, *, dim: int, dim_head: int = 64, heads: int = 8, rounds: int = 2, buckets: int = 16, entries: int = 64
    ) -> None:
        super().__init__()
        if check_int('buckets', buckets, 2) % 2:
            raise ValueError(f'buckets must be even (directions and their opposites), got {buckets}')
        if dim_head % 2:
            raise ValueError(f'dim_head must be even (rotary embeddings turn pairs of channels), got {dim_head}')
        self.heads, self.dim_head = heads, dim_head
        self.rounds, self.buckets = check_int('rounds', rounds, maximum=MOST_IN_TURN), buckets
        self.before = check_int('entries', entries) - 1
        self.norm = RMSNorm(dim)
        self.rotary_emb = Rotary(dim_head, pairs='interleaved')
        self.to_qk = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        # saved with the weights: with other directions, tokens would fall into other buckets
        self.register_buffer('rotations', torch.randn(rounds, heads, dim_head, buckets // 2))

    def initial_state(self, batch: int, like: Tensor) -> MixerState:
        shape = (batch, self.rounds, self.heads, self.buckets)
        kept = (*shape, self.before, self.dim_head)
        return like.new_zeros(kept), like.new_zeros(kept), like.new_zeros(shape, dtype=torch.int64)

    def forward(self, x: Tensor, state: MixerState | None = None, start: int = 0) -> tuple[Tensor, MixerState | None]:
        batch, n, _ = x.shape
        # (batch, heads, seq, dim_head)
        qk, v = (
            chain(x, self.norm, proj).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.to_qk, self.to_v)
        )
        bucket = self.hash(qk)
        # scores depend on distances: queries, and keys of length one, are rotated by their positions
        exact = torch.promote_types(qk.dtype, torch.float32)
        both = self.rotary_emb(torch.stack((qk, F.normalize(qk.to(exact), dim=-1).to(qk.dtype))), start)
        q, k = both[0] * self.dim_head**-0.5, both[1]

        def rows(t: Tensor) -> Tensor:
            """Repeat for each round: `(batch, heads, seq, dim_head)` to `(batch * rounds * heads, seq, dim_head)`."""
            return t[:, None].expand(-1, self.rounds, -1, -1, -1).flatten(0, 2)

        q, k, v, bucket = rows(q), rows(k), rows(v), bucket.flatten(0, 2)
        if state is None:
            out, total, _ = self.attend(q, k, v, bucket)
        elif n <= FEW:
            outs, totals = [], []
            for i in range(n):
                each = slice(i, i + 1)
                out, total, state = self.step(q[:, each], k[:, each], v[:, each], bucket[:, each], state)
                outs.append(out)
                totals.append(total)
            out, total = torch.cat(outs, dim=1), torch.cat(totals, dim=1)
        else:
            out, total, state = self.attend_with_state(q, k, v, bucket, state)
        # the weight of a round is its share of the softmax denominators
        out, total = (t.unflatten(0, (batch, self.rounds, self.heads)) for t in (out, total))
        share = total.softmax(dim=1).to(out.dtype)
        out = (out * share[..., None]).sum(dim=1)
        return chain(out.transpose(1, 2).flatten(2), self.to_out), state

    def products(self, n: float) -> float:
        """Operations of a pass over `n` tokens, without products with weights: hashes, scores and weighted sums."""
        hashes = 2 * n * self.heads * self.dim_head * self.buckets / 2
        return self.rounds * (hashes + 4 * n * min(self.before + 1, n / 2) * self.heads * self.dim_head)

    @torch.no_grad()
    def hash(self, qk: Tensor) -> Tensor:
        """The bucket in each round: `(batch, heads, seq, dim_head)` to `(batch, rounds, heads, seq)`."""
        projected = torch.einsum('bhnd,rhdk->brhnk', qk.to(self.rotations.dtype), self.rotations)
        return torch.cat((projected, -projected), dim=-1).argmax(dim=-1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Attention over the last entries of each token's bucket, as a window over tokens sorted by bucket.

        q, k, v: `(rows, seq, dim_head)`; bucket: `(rows, seq)`. Returns the outputs, the logarithms of the softmax
        denominators `(rows, seq)`, and the sorted keys, values and buckets with the indices of the sort.
        """
        # a stable sort keeps the tokens of a bucket in order of time
        sorted_bucket, order = stable_sort(bucket)
        q, k, v = (t.gather(1, order[..., None].expand_as(t)) for t in (q, k, v))
        n = q.shape[1]

        # blocks are no smaller than the window: all keys of a query lie in its block and the previous one
        if isinstance(n, torch.SymInt):
            # an exported length has no value yet, and an exporter would specialize the graph to a single block
            block = max(self.before, MIN_BLOCK)
            blocks = n // block + 2
        else:
            block = max(self.before, min(MIN_BLOCK, n))
            blocks = -(-n // block)
        tail = blocks * block - n
        query_bucket = F.pad(sorted_bucket, (0, tail), value=-1).unflatten(1, (blocks, block))

        def key_blocks(t: Tensor, fill: float = 0.0) -> Tensor:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (block, tail), value=fill)
            return with_previous(t.unflatten(1, (blocks + 1, block)))

        queries = F.pad(q, (0, 0, 0, tail)).unflatten(1, (blocks, block))
        scores = (queries @ key_blocks(k).mT).to(torch.promote_types(q.dtype, torch.float32))
        distance = block_distances(block, q.device)
        is_self = distance == 0
        band = (distance >= 0) & (distance <= self.before)
        same_bucket = query_bucket[..., None] == key_blocks(sorted_bucket, -2)[:, :, None]
        scores = scores.masked_fill(is_self, SELF_SCORE).masked_fill(~(band & (same_bucket | is_self)), -torch.inf)
        total = scores.logsumexp(dim=-1)
        out = (scores - total[..., None]).exp().to(v.dtype) @ key_blocks(v)

        # restore the order of time
        back = order.argsort(dim=-1)
        out, total = first_of(out.flatten(1, 2), n), first_of(total.flatten(1, 2), n)
        return out.gather(1, back[..., None].expand_as(out)), total.gather(1, back), (k, v, sorted_bucket, order)

    def attend_with_state(
        self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, state: MixerState
    ) -> tuple[Tensor, Tensor, MixerState]:
        """`attend` for a chunk. The entries of the state come before its tokens. Also returns the new state."""
        keys, values, counts = (t.flatten(0, 2) for t in state)
        rows, _, dim = q.shape
        slots = self.buckets * self.before
        # empty slots belong to an extra bucket
        empty = torch.arange(self.before, device=q.device) < self.before - counts[..., None]
        slot_bucket = torch.arange(self.buckets, device=q.device)[:, None].expand_as(empty)
        slot_bucket = slot_bucket.masked_fill(empty, self.buckets).flatten(1)
        all_k = torch.cat((keys.flatten(1, 2).to(k.dtype), k), dim=1)
        all_v = torch.cat((values.flatten(1, 2).to(v.dtype), v), dim=1)
        q = torch.cat((q.new_zeros(rows, slots, dim), q), dim=1)
        all_bucket = torch.cat((slot_bucket, bucket), dim=1)
        out, total, (sorted_k, sorted_v, sorted_bucket, _) = self.attend(q, all_k, all_v, all_bucket)

        # the new state has the last entries of each bucket
        buckets = torch.arange(self.buckets, device=q.device).expand(rows, -1).contiguous()
        ends = torch.searchsorted(sorted_bucket, buckets, right=True)
        sizes = ends - torch.searchsorted(sorted_bucket, buckets)
        index = (ends[..., None] - self.before + torch.arange(self.before, device=q.device)).clamp(min=0).flatten(1)
        new_counts = sizes.clamp(max=self.before)
        is_filled = (torch.arange(self.before, device=q.device) >= self.before - new_counts[..., None])[..., None]

        def last(t: Tensor) -> Tensor:
            t = t.gather(1, index[..., None].expand(-1, -1, dim)).unflatten(1, (self.buckets, self.before))
            return t.masked_fill(~is_filled, 0)

        after = (last(sorted_k), last(sorted_v), new_counts)
        state = tuple(keep(old, new.view_as(old)) for old, new in zip(state, after, strict=True))
        return out[:, slots:], total[:, slots:], state

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, state: MixerState
    ) -> tuple[Tensor, Tensor, MixerState]:
        """`attend_with_state` for one token, which reads only the entries of its bucket."""
        flat = tuple(t.flatten(0, 2) for t in state)
        index = torch.arange(len(q), device=q.device), bucket[:, 0]
        keys, values, count = (t[index] for t in flat)
        keys, values = torch.cat((keys.to(k.dtype), k), dim=1), torch.cat((values.to(v.dtype), v), dim=1)
        scores = (q @ keys.mT)[:, 0].to(torch.promote_types(q.dtype, torch.float32))
        slot = torch.arange(self.before + 1, device=q.device)
        scores = scores.masked_fill(slot < self.before - count[:, None], -torch.inf)
        scores = scores.masked_fill(slot == self.before, SELF_SCORE)
        total = scores.logsumexp(dim=-1, keepdim=True)
        out = (scores - total).exp().to(v.dtype)[:, None] @ values

        write = Tensor.index_put if torch.is_grad_enabled() else Tensor.index_put_
        after = (keys[:, 1:], values[:, 1:], (count + 1).clamp(max=self.before))
        state = tuple(
            write(old, index, new.to(old.dtype)).view_as(whole)
            for old, new, whole in zip(flat, after, state, strict=True)
        )
        return out, total, state
