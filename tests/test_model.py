"""The model as a whole: against a plain GPT, and what a call promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.configs import SMALL, THREE, build, loss_of_a_copy
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import FeedForward, shift_tokens
from simple_hierarchical_transformer.mixers import Attention
from simple_hierarchical_transformer.training import optim


@pytest.mark.parametrize('window', [None, 6])
def test_one_hierarchy_is_a_plain_gpt(window: int | None) -> None:
    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.norm_in = nn.LayerNorm(8)
            self.attns = nn.ModuleList(Attention(dim=8, dim_head=4, heads=2, window=window) for _ in range(2))
            self.ffs = nn.ModuleList(FeedForward(8, 4) for _ in range(2))
            self.norm_out = nn.LayerNorm(8)
            self.to_logits = nn.Linear(8, 11, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm_in(self.embed(ids))
            for attn, ff in zip(self.attns, self.ffs, strict=True):
                x = x + attn(shift_tokens(x)[0])[0]
                x = x + ff(shift_tokens(x)[0])
            return self.to_logits(self.norm_out(x))

    model, gpt = HierarchicalTransformer(**SMALL, hierarchies=1, window_sizes=window), GPT()
    gpt.embed, gpt.norm_in, gpt.norm_out = model.token_emb, model.post_token_emb_norms[0], model.norms[0]
    gpt.to_logits = model.to_logits
    for layer in range(2):
        gpt.attns[layer], gpt.ffs[layer] = model.layers[layer][0].attn, model.layers[layer][0].ff

    ids = torch.randint(0, 11, (2, 37))
    assert torch.equal(model(ids), gpt(ids))


def test_the_predicting_level_sets_the_width_of_the_head() -> None:
    config = dict(SMALL, dim=(4, 8, 6), hierarchies=(4, 1, 2))
    ids = torch.randint(0, 11, (1, 9))
    for chosen, width in ((None, 8), (4, 4), (1, 8), (2, 6)):
        model = HierarchicalTransformer(**config, predict_hierarchy=chosen)
        assert model.to_logits.in_features == width
        assert model(ids).shape == (1, 9, 11)
    model = HierarchicalTransformer(**config, hierarchical_stride=(4, 1, 2), predict_use_all_hierarchy=True)
    assert model.to_logits.in_features == 18
    assert model(ids).shape == (1, 9, 11)


def test_use_flash_attn_changes_no_number() -> None:
    ids = torch.randint(0, 11, (2, 30))
    assert torch.equal(build(dict(THREE, use_flash_attn=True))(ids), build(THREE)(ids))


@pytest.mark.parametrize('n', [1, 2, 3, 7, 47, 48])
def test_any_length_up_to_seq_len(n: int) -> None:
    model, ids = build(THREE), torch.randint(0, 11, (3, n))
    assert model(ids).shape == (3, n, 11)
    assert [x.shape[1] for x in model(ids, return_hierarchical_embeds=True)] == [n, n, -(-n // 4)]
    labelled = model(ids, return_loss=True, labels=ids)[0]
    assert labelled.isfinite()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 12))
    assert torch.equal(model(ids.to(dtype)), model(ids))
    assert torch.equal(model(ids.to(dtype), return_loss=True)[0], model(ids, return_loss=True)[0])


def test_a_bfloat16_model_returns_bfloat16_near_float32() -> None:
    model, ids = HierarchicalTransformer(**THREE), torch.randint(0, 11, (2, 40))
    half = copy.deepcopy(model).bfloat16()
    logits = half(ids)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids), rtol=0.1, atol=0.1)


def test_model_survives_deepcopy_and_device_moves() -> None:
    model, ids = HierarchicalTransformer(**THREE), torch.randint(0, 11, (2, 12))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
    model.to('meta')


@pytest.mark.slow
def test_learns_to_repeat_a_sequence() -> None:
    """A copy task over a distance that only the coarse level can reach."""
    model = HierarchicalTransformer(
        num_tokens=16, dim=32, depth=2, seq_len=64, dim_head=16, heads=2, hierarchies=(1, 4), window_sizes=(2, None)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = torch.randint(1, 16, (16, 32))
    ids = torch.cat((first, first), dim=1)
    for _ in range(150):
        loss, parts = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parts.ce < 0.5 < torch.tensor(15.0).log()
    assert torch.equal(model.generate(ids[:, :40], 24, temperature=0), ids[:, 40:])


@pytest.mark.slow
@pytest.mark.parametrize(
    'option',
    [
        dict(merge='attention', merge_window=3, merge_into='all'),
        dict(arrangement='hourglass', depth=3),
        dict(autoencoder=True),
    ],
    ids=str,
)
def test_coarse_levels_reach_beyond_the_fine_window(option: dict[str, Any]) -> None:
    """The last id repeats the first: a copy over a distance that only coarse levels reach."""
    torch.manual_seed(0)
    small = dict(num_tokens=8, dim=24, depth=2, seq_len=24, dim_head=12, heads=2, window_sizes=(1, None))
    levels = dict(hierarchies=(1, 4), hierarchical_stride=(1, 4), recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model = HierarchicalTransformer(**{**option, **small, **levels})
    assert loss_of_a_copy(model, steps=100) < 0.5 < torch.tensor(7.0).log()


def test_embeddings_in_chunks() -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        for name in ('return_hierarchical_embeds', 'return_hierarchical_token_embeds'):
            whole = model(ids, **{name: True})
            first, state = model(ids[:, :13], return_state=True, **{name: True})
            second, _ = model(ids[:, 13:], return_state=True, state=state, **{name: True})
            for x, y, z in zip(whole, first, second, strict=True):
                torch.testing.assert_close(torch.cat((y, z), dim=1), x)


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(merge='attention', merge_into='all'),
        dict(merge='linear', arrangement='hourglass', depth=(1, 3)),
        dict(mixer='s4d', mixer_kwargs=dict(), dim=8),
    ],
    ids=['concat', 'attention', 'linear', 's4d'],
)
def test_a_model_of_zero_init_starts_as_its_embeddings_and_learns(settings: dict[str, Any]) -> None:
    config = dict(SMALL, hierarchies=(1, 4), zero_init=True, ignore_index=-1, recon_ignore_index=-1)
    model = HierarchicalTransformer(**{**config, **settings})
    ids = torch.randint(0, 11, (4, 24))
    with torch.no_grad():
        embeds = model(ids, return_hierarchical_embeds=True)[0]
        assert not model(ids).any()
        # the finest level's tokens pass through unchanged
        tokens = model.norms[0](model(ids, return_hierarchical_token_embeds=True)[0])
    torch.testing.assert_close(embeds, tokens)
    optimizer = optim.build_optimizer(model, 'adamw', lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(25):
        loss = model(ids, return_loss=True)[0]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # all weights have left zero
    assert losses[-1] < losses[0] - 0.5
    assert all(p.abs().sum() > 0 for p in model.parameters())
