"""Attention among tokens that a hash puts into the same bucket."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import MOST_IN_TURN, check_int
from ..memory import keep
from ..ops.export import first_of, stable_sort
from ..ops.linear import chain
from ..ops.norm import RMSNorm
from .rotary import Rotary

# a block of fewer queries than this spends its time on overhead
MIN_BLOCK = 64
# the score of a token with itself, which it attends to only where it has nobody else
ALONE = -1e5
# tokens of a chunk that go one by one faster than a sort of all that is kept
FEW = 16


class LSHAttention(nn.Module):
    """Attention with shared queries and keys, over the last tokens of the same bucket, for several hashes.

    A hash is the nearest of `buckets` directions, half of them random and half their opposites; near vectors mostly
    share one. Keys are queries of length one, and a token attends to itself only where it has nobody else. Rounds are
    weighed by the sums that their softmaxes divide by, so that a pair that meets in several rounds counts in each.
    Kitaev et al. 2020, arXiv 2001.04451, section 2; rotary embeddings are added here.

    There, sorted tokens are cut into chunks, and which chunk a token falls into hangs on tokens after it. Here a token
    attends to the last `entries` of its bucket, itself among them, which hang on nothing that comes: the windowed
    kernel on the sorted sequence. Sums are formed in another order when other tokens come between, so that earlier
    positions hear of later ones by rounding.

    `(batch, seq, dim)` to `(batch, seq, dim)`, time and memory `O(rounds * seq * entries)`, and a sort. Its state are
    the last entries of each bucket, newest last: keys and values, each `(batch, rounds, heads, buckets, entries - 1,
    dim_head)`, and how many there are, `(batch, rounds, heads, buckets)`.

    Args:
        dim: width of the tokens.
        dim_head: width of a head, even.
        heads: number of heads.
        rounds: number of hashes.
        buckets: of a hash, even.
        entries: of its bucket that a token attends to.
    """

    # what a step reads depends on its position
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
        # saved with the weights: other directions would be other buckets
        self.register_buffer('rotations', torch.randn(rounds, heads, dim_head, buckets // 2))

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        shape = (batch, self.rounds, self.heads, self.buckets)
        kept = (*shape, self.before, self.dim_head)
        return like.new_zeros(kept), like.new_zeros(kept), like.new_zeros(shape, dtype=torch.int64)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, start: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        batch, n, _ = x.shape
        # (batch, heads, seq, dim_head)
        qk, v = (
            chain(x, self.norm, to).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_qk, self.to_v)
        )
        bucket = self.hash(qk)
        # scores see distances: queries, and keys of length one, turn by their positions
        exact = torch.promote_types(qk.dtype, torch.float32)
        both = self.rotary_emb(torch.stack((qk, F.normalize(qk.to(exact), dim=-1).to(qk.dtype))), start)
        q, k = both[0] * self.dim_head**-0.5, both[1]

        def rows(t: Tensor) -> Tensor:
            """For each round, `(batch * rounds * heads, seq, dim_head)`."""
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
        # of each round, as much as it has of all that was divided by
        out, total = (t.unflatten(0, (batch, self.rounds, self.heads)) for t in (out, total))
        share = total.softmax(dim=1).to(out.dtype)
        out = (out * share[..., None]).sum(dim=1)
        return chain(out.transpose(1, 2).flatten(2), self.to_out), state

    def products(self, n: float) -> float:
        """Operations of a pass over n tokens, products with weights aside: hashes, scores and sums."""
        hashed = 2 * n * self.heads * self.dim_head * self.buckets / 2
        return self.rounds * (hashed + 4 * n * min(self.before + 1, n / 2) * self.heads * self.dim_head)

    @torch.no_grad()
    def hash(self, qk: Tensor) -> Tensor:
        """`(batch, heads, seq, dim_head)` to the bucket in each round, `(batch, rounds, heads, seq)`."""
        along = torch.einsum('bhnd,rhdk->brhnk', qk.to(self.rotations.dtype), self.rotations)
        return torch.cat((along, -along), dim=-1).argmax(dim=-1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Each token over the last entries of its bucket, by a window over the tokens sorted by bucket.

        q, k, v: `(rows, seq, dim_head)`; bucket: `(rows, seq)`. Returns the outputs, the logarithms of what they were
        divided by, `(rows, seq)`, and keys, values and buckets in their order, with the order.
        """
        # stable, so that within a bucket tokens stay in the order of time
        in_order, order = stable_sort(bucket)
        q, k, v = (t.gather(1, order[..., None].expand_as(t)) for t in (q, k, v))
        n = q.shape[1]

        # blocks no smaller than the window: each finds all its keys in itself and in the one before
        if isinstance(n, torch.SymInt):
            # an exported length is no number yet, and one block a size of its own
            block = max(self.before, MIN_BLOCK)
            blocks = n // block + 2
        else:
            block = max(self.before, min(MIN_BLOCK, n))
            blocks = -(-n // block)
        tail = blocks * block - n
        places = F.pad(in_order, (0, tail), value=-1).unflatten(1, (blocks, block))

        def with_before(t: Tensor, fill: float = 0.0) -> Tensor:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (block, tail), value=fill).unflatten(1, (blocks + 1, block))
            return torch.cat((t[:, :-1], t[:, 1:]), dim=2)

        queries = F.pad(q, (0, 0, 0, tail)).unflatten(1, (blocks, block))
        scores = (queries @ with_before(k).mT).to(torch.promote_types(q.dtype, torch.float32))
        i = torch.arange(block, device=q.device)[:, None]
        distance = i + block - torch.arange(2 * block, device=q.device)
        band = (distance >= 0) & (distance <= self.before)
        alike = places[..., None] == with_before(in_order, -2)[:, :, None]
        scores = scores.masked_fill(distance == 0, ALONE).masked_fill(~(band & (alike | (distance == 0))), -torch.inf)
        total = scores.logsumexp(dim=-1)
        out = (scores - total[..., None]).exp().to(v.dtype) @ with_before(v)

        # back to the order of time
        back = order.argsort(dim=-1)
        out, total = first_of(out.flatten(1, 2), n), first_of(total.flatten(1, 2), n)
        return out.gather(1, back[..., None].expand_as(out)), total.gather(1, back), (k, v, in_order, order)

    def attend_with_state(
        self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """A chunk, whose tokens sort in behind the entries that are kept."""
        keys, values, counts = (t.flatten(0, 2) for t in state)
        rows, _, dim = q.shape
        held = self.buckets * self.before
        # entries that are none yet stand in a bucket of their own
        empty = torch.arange(self.before, device=q.device) < self.before - counts[..., None]
        kept = torch.arange(self.buckets, device=q.device)[:, None].expand_as(empty)
        kept = kept.masked_fill(empty, self.buckets).flatten(1)
        all_k = torch.cat((keys.flatten(1, 2).to(k.dtype), k), dim=1)
        all_v = torch.cat((values.flatten(1, 2).to(v.dtype), v), dim=1)
        q = torch.cat((q.new_zeros(rows, held, dim), q), dim=1)
        out, total, (sorted_k, sorted_v, in_order, _) = self.attend(q, all_k, all_v, torch.cat((kept, bucket), dim=1))

        # the last of each bucket
        each = torch.arange(self.buckets, device=q.device).expand(rows, -1).contiguous()
        ends = torch.searchsorted(in_order, each, right=True)
        sizes = ends - torch.searchsorted(in_order, each)
        at = (ends[..., None] - self.before + torch.arange(self.before, device=q.device)).clamp(min=0).flatten(1)
        new_counts = sizes.clamp(max=self.before)
        there = (torch.arange(self.before, device=q.device) >= self.before - new_counts[..., None])[..., None]

        def last(t: Tensor) -> Tensor:
            t = t.gather(1, at[..., None].expand(-1, -1, dim)).unflatten(1, (self.buckets, self.before))
            return t.masked_fill(~there, 0)

        after = (last(sorted_k), last(sorted_v), new_counts)
        state = tuple(keep(old, new.view_as(old)) for old, new in zip(state, after, strict=True))  # type: ignore[misc]
        return out[:, held:], total[:, held:], state

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One token, over the entries of its bucket alone."""
        flat = tuple(t.flatten(0, 2) for t in state)
        row, mine = torch.arange(len(q), device=q.device), bucket[:, 0]
        keys, values, count = (t[row, mine] for t in flat)
        keys, values = torch.cat((keys.to(k.dtype), k), dim=1), torch.cat((values.to(v.dtype), v), dim=1)
        scores = (q @ keys.mT)[:, 0].to(torch.promote_types(q.dtype, torch.float32))
        place = torch.arange(self.before + 1, device=q.device)
        scores = scores.masked_fill(place < self.before - count[:, None], -torch.inf)
        scores = scores.masked_fill(place == self.before, ALONE)
        total = scores.logsumexp(dim=-1, keepdim=True)
        out = (scores - total).exp().to(v.dtype)[:, None] @ values

        put = Tensor.index_put if torch.is_grad_enabled() else Tensor.index_put_
        fresh = (keys[:, 1:], values[:, 1:], (count + 1).clamp(max=self.before))
        state = tuple(
            put(old, (row, mine), new.to(old.dtype)).view_as(whole)
            for old, new, whole in zip(flat, fresh, state, strict=True)
        )
        return out, total, state
