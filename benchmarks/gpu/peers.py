"""A plain transformer in a few lines of PyTorch, for comparison. It uses nothing of this library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and feed-forward: `(batch, seq, dim)` to `(batch, seq, dim)`."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.up = nn.Linear(dim, ff_mult * dim, bias=False)
        self.down = nn.Linear(ff_mult * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.to_out(out.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.ff_norm(x))).square())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings over halves: x `(..., seq, dim_head)`, cos and sin `(seq, dim_head / 2)`. Su et al. 2021."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class PlainTransformer(nn.Module):
    """Causal transformer with full attention by SDPA.

    Maps ids `(batch, seq)` to logits `(batch, seq, num_tokens)`, or to `(loss, None)` with `return_loss`.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, heads: int, seq_len: int, dim_head: int = 64, ff_mult: int = 4
    ) -> None:
        super().__init__()
        # these names match the library's, because the optimizer groups weights by name
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(Block(dim, heads, dim_head, ff_mult) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        turns = torch.outer(torch.arange(seq_len), 10000 ** -(torch.arange(0, dim_head, 2) / dim_head))
        self.register_buffer('cos', turns.cos().bfloat16(), persistent=False)
        self.register_buffer('sin', turns.sin().bfloat16(), persistent=False)

    def forward(self, ids: Tensor, return_loss: bool = False) -> Tensor | tuple[Tensor, None]:
        x = self.token_emb(ids[:, :-1] if return_loss else ids)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.to_logits(self.norm(x))
        if not return_loss:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()), None

    def step_flops(self, length: int) -> float:
        """Operations of a forward and backward pass on one sequence, counted as in `training.cost.step_flops`."""
        weights = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and 'token_emb' not in name)
        # attention scores and weighted sums, each over half of the pairs
        attention = sum(4 * length * length / 2 * layer.to_out.in_features for layer in self.layers)
        return 3 * (2 * weights * length + attention)
