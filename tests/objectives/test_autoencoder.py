"""The autoencoder against its definition, computed token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.configs import UNEVEN, build
from torch import Tensor


@given(n=st.integers(1, 24), strides=st.sampled_from([(1, 2, 2), (1, 2, 8), (1, 1, 4), (1, 2, 1)]))
def test_autoencoder_equals_its_definition(n: int, strides: tuple[int, ...]) -> None:
    config = dict(UNEVEN, dim=6, hierarchies=(1, 2, 8), hierarchical_stride=strides, autoencoder=True)
    config |= dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model, ids = build(config), torch.randint(0, 11, (2, n))
    encode = {2: model.autoencoder.encoders['1'].proj.weight, 8: model.autoencoder.encoders['2'].proj.weight}
    embeds = model.token_emb(ids)

    def at(c: int, position: int) -> Tensor:
        """The feature map of compression c at a position."""
        if position < 0:
            return torch.zeros(2, 6, dtype=torch.float64)
        if c == 1:
            return embeds[:, position]
        finer, taps = (1, 2) if c == 2 else (2, 4)
        weight = encode[c].unflatten(1, (6, taps))
        return F.silu(sum(at(finer, position - (taps - 1 - k) * finer) @ weight[:, :, k].T for k in range(taps)))

    tokens = model(ids, return_hierarchical_token_embeds=True)
    for x, level, norm in zip(tokens, model.levels, model.post_token_emb_norms, strict=True):
        assert x.shape[1] == level.length(n)
        for j in range(x.shape[1]):
            torch.testing.assert_close(x[:, j], norm(at(level.compression, j * level.stride)))

    # every eighth token of the coarsest map reconstructs the eight ids of its window
    _, parts = model(ids, labels=ids, return_loss=True)
    coarse, fine = model.autoencoder.decoders['2'], model.autoencoder.decoders['1']
    missed = []
    for end in range(0, n, 8):
        x = F.silu(coarse(at(8, end))).chunk(4, dim=-1)
        x = [part for each in x for part in F.silu(fine(each)).chunk(2, dim=-1)]
        for k, part in enumerate(x):
            if end - 7 + k >= 0:
                said = model.autoencoder.to_ids(part).log_softmax(-1)
                missed.append(-said.gather(1, ids[:, end - 7 + k, None])[:, 0])
    torch.testing.assert_close(parts.named['autoencoder'], torch.cat(missed).mean())
