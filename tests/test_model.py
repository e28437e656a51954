"""The model as a whole: against a plain GPT, against losses written out, and what its call promises."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQ_LEN, build, configs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import FeedForward, shift_tokens
from simple_hierarchical_transformer.mixers import Attention

SMALL: dict[str, Any] = dict(num_tokens=11, dim=8, depth=2, seq_len=SEQ_LEN, dim_head=4, heads=2)
THREE: dict[str, Any] = dict(SMALL, hierarchies=(1, 2, 8), hierarchical_stride=(1, 1, 4), window_sizes=(4, None, 3))


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


@given(config=configs(), n=st.integers(2, 40))
def test_every_parameter_takes_part_in_the_loss(config: dict[str, Any], n: int) -> None:
    """Also where a level is too short for its rollouts: DistributedDataParallel waits for each gradient."""
    model = build(config)
    loss, _ = model(torch.randint(0, 11, (2, n)), return_loss=True)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@given(config=configs(), n=st.integers(2, SEQ_LEN), seed=st.integers(0, 9))
def test_losses_equal_the_definitions_written_out(config: dict[str, Any], n: int, seed: int) -> None:
    """Token by token, step by step, with no tensor operation over the sequence."""
    model = build(config, seed)
    ids = torch.randint(0, 11, (2, n + 1))
    ids[torch.rand(ids.shape) < 0.2] = 0
    ignored = config['ignore_index']

    with torch.no_grad():
        loss, parts = model(ids, return_loss=True)
        read, targets = ids[:, :-1], ids[:, 1:]
        logits, latents = model(read, return_logits_and_embeds=True)
        embeds, *_ = model.embed(read, None)
        compressed = model(read, return_hierarchical_token_embeds=True)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)

    ce = mean(
        [-logits[b, i].log_softmax(-1)[targets[b, i]] for b in range(2) for i in range(n) if targets[b, i] != ignored]
    )

    recon = torch.zeros((), dtype=torch.float64)
    others = torch.zeros((), dtype=torch.float64)
    next_latent = torch.zeros((), dtype=torch.float64)
    for index, level in enumerate(model.levels):
        c, s, x = level.compression, level.stride, latents[index]
        m = x.shape[1]

        if c > 1 and config['recon_loss_weight'] > 0:
            seen = []
            for b in range(2):
                for j in range(m):
                    given_back = model.compressors[index].to_recon(x[b, j]).view(c, -1).log_softmax(-1)
                    for k in range(c):
                        position = j * s - (c - 1) + k
                        if position >= 0 and read[b, position] != config['recon_ignore_index']:
                            seen.append(-given_back[k, read[b, position]])
            recon = recon + mean(seen)

        if f'ponder/{c}x' in parts.named:
            # what it is has a test of its own
            others = others + 0.01 * parts.named[f'ponder/{c}x']

        if level.prophet_loss_weight > 0 and (c > 1 or index not in model.predict_from):
            foreseen = []
            for b in range(2):
                for j in range(m):
                    said = model.to_prophet[str(index)](x[b, j]).view(c, -1).log_softmax(-1)
                    for k in range(c):
                        position = j * s + 1 + k
                        if position <= n and ids[b, position] != ignored:
                            foreseen.append(-said[k, ids[b, position]])
            torch.testing.assert_close(parts.named[f'prophet/{c}x'], mean(foreseen))
            others = others + level.prophet_loss_weight * mean(foreseen)

        if level.quantized_loss_weight > 0:
            quantizer, named = model.quantizers[str(index)], []
            of = compressed[index] if config['quantize_from'] == 'compressed' else x
            for b in range(2):
                for j in range(m - 1):
                    said = model.to_quantized[str(index)](x[b, j]).view(-1, 5).log_softmax(-1)
                    if read[b, (j + 1) * s] == ignored:
                        continue
                    vector = of[b, j + 1]
                    vector = (vector - vector.mean()) / (vector.var(correction=0) + 1e-5).sqrt()
                    for k, (projection, codebook) in enumerate(
                        zip(quantizer.projection, quantizer.codebook, strict=True)
                    ):
                        near = [F.cosine_similarity(vector @ projection, code, dim=0) for code in codebook]
                        named.append(-said[k, torch.stack(near).argmax()])
            torch.testing.assert_close(parts.named[f'quantized/{c}x'], mean(named))
            others = others + level.quantized_loss_weight * mean(named)

        if level.next_latent_loss_weight > 0:
            dynamics, summarize = model.latent_dynamics[str(index)], model.chunk_summarizers[str(index)]
            steps: list[list[Tensor]] = [[] for _ in range(config['num_rollouts'])]
            for b in range(2):
                for j in range(m - config['num_rollouts']):
                    h, before = x[b, j], torch.zeros((), dtype=torch.float64)
                    for r in range(config['num_rollouts']):
                        t = j + r + 1
                        chunk = embeds[b, max(t * s - (c - 1), 0) : t * s + 1]
                        h = dynamics(h, summarize.proj(chunk.mean(0)))
                        mse = (h - x[b, t]).square().mean()
                        cosine = (h @ x[b, t]) / (h.norm() * x[b, t].norm())
                        element = {
                            'mse': mse,
                            'smooth_l1': F.smooth_l1_loss(h, x[b, t]),
                            'mse_and_cosine_sim': 0.1 * mse + 0.9 * (1 - cosine),
                        }[config['next_latent_loss_type']]
                        weight = torch.exp(-before) if config['dynamic_rollout_loss_weight'] else 1.0
                        if read[b, t * s] != ignored:
                            steps[r].append(weight * element / config['num_rollouts'])
                        before = before + element
            level_loss = sum(mean(step) for step in steps)
            torch.testing.assert_close(parts.next_latent_per_hierarchy[index], level_loss)
            next_latent = next_latent + level.next_latent_loss_weight * level_loss

    torch.testing.assert_close(parts.ce, ce)
    torch.testing.assert_close(parts.recon, recon)
    torch.testing.assert_close(parts.next_latent, next_latent)
    if 'autoencoder' in parts.named:
        others = others + 0.1 * parts.named['autoencoder']
    torch.testing.assert_close(loss, ce + next_latent + config['recon_loss_weight'] * recon + others)
    weighted = sum(model.loss_weights[name] * part for name, part in parts.named.items())
    torch.testing.assert_close(loss, weighted)


def test_parts_unpack_as_the_published_four() -> None:
    loss, (ce, next_latent, recon, per_hierarchy) = HierarchicalTransformer(**THREE)(
        torch.randint(0, 11, (2, 33)), return_loss=True
    )
    assert loss.ndim == ce.ndim == next_latent.ndim == recon.ndim == 0
    assert len(per_hierarchy) == 3


def test_rollout_weights_are_normalised() -> None:
    ids = torch.randint(1, 11, (2, 33))
    config = dict(SMALL, num_rollouts=2, dynamic_rollout_loss_weight=False)
    torch.manual_seed(0)
    losses = []
    for weights in ((1, 0), (0, 1), (1, 3), (10, 30)):
        model = build(dict(config, rollout_weights=weights))
        losses.append(model(ids, return_loss=True)[1].next_latent_per_hierarchy[0])
    first, second, mixed, scaled = losses
    assert not torch.equal(first, second)
    torch.testing.assert_close(mixed, 0.25 * first + 0.75 * second)
    torch.testing.assert_close(mixed, scaled)


def test_labels_are_the_targets_and_no_id_is_dropped() -> None:
    model, ids = build(THREE), torch.randint(1, 11, (2, 34))
    shifted = model(ids, return_loss=True)
    given = model(ids[:, :-1], return_loss=True, labels=ids[:, 1:])
    for x, y in zip((shifted[0], *shifted[1][:3]), (given[0], *given[1][:3]), strict=True):
        assert torch.equal(x, y)


def test_labels_may_be_ignored_and_all_of_them_too() -> None:
    model = build(dict(THREE, ignore_index=-100))
    ids = torch.randint(0, 11, (1, 20))
    labels = torch.randint(0, 11, (1, 20))
    labels[:, 5:] = -100
    _, parts = model(ids, return_loss=True, labels=labels)
    expected = F.cross_entropy(model(ids)[0, :5], labels[0, :5])
    torch.testing.assert_close(parts.ce, expected)

    loss, parts = model(ids, return_loss=True, labels=torch.full_like(labels, -100))
    assert parts.ce == 0
    assert loss.isfinite()


def test_callable_latent_loss_is_the_named_one() -> None:
    ids = torch.randint(1, 11, (2, 20))
    named = build(dict(THREE, next_latent_loss_type='mse'))(ids, return_loss=True)[0]
    own = build(dict(THREE, next_latent_loss_type=lambda pred, target: (pred - target) ** 2))(ids, return_loss=True)[0]
    torch.testing.assert_close(named, own)


def test_chunk_summarizers_are_trained_and_fed_with_embeddings() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, embeds: Tensor) -> Tensor:
            return self.proj(embeds[:, ::4])

    summarizer = Last()
    model = HierarchicalTransformer(**THREE, chunk_summarizers=(None, None, summarizer))
    nn.init.normal_(model.latent_dynamics['2'].net[-1].weight)
    model(torch.randint(1, 11, (2, 40)), return_loss=True)[0].backward()
    assert summarizer.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('detach', [True, False])
def test_detach_summaries_decides_over_gradients_to_embeddings(detach: bool) -> None:
    config = dict(SMALL, hierarchies=(1, 4), recon_loss_weight=0.0, next_latent_loss_weight=(0.0, 1.0))
    model = build(dict(config, detach_summaries=detach))
    ids = torch.randint(1, 11, (2, 21))

    # with the latents themselves out of the way, summaries are the one way from this loss to the embeddings
    embeds = model.token_emb(ids)
    latents = torch.randn(2, 21, 8, dtype=torch.float64)
    loss = model.next_latent_loss(1, latents, embeds, ids != 0, 0, None)
    loss.backward()
    assert (model.token_emb.weight.grad is None) == detach


def test_predicting_level_decides_over_the_width_of_the_head() -> None:
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


def test_window_beyond_the_level_is_full_attention() -> None:
    ids = torch.randint(0, 11, (2, SEQ_LEN))
    with pytest.warns(UserWarning, match=r'window_sizes: 13 exceeds the 12 tokens that hierarchy 4 has'):
        wide = build(dict(SMALL, hierarchies=(1, 4), window_sizes=(4, 13)))
    full = build(dict(SMALL, hierarchies=(1, 4), window_sizes=(4, None)))
    assert torch.equal(wide(ids), full(ids))

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exact = HierarchicalTransformer(**SMALL, hierarchies=(1, 4), window_sizes=(4, 12))
    assert exact.levels[1].window == 12


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


def test_bfloat16_model_stays_bfloat16_and_near() -> None:
    model, ids = HierarchicalTransformer(**THREE), torch.randint(0, 11, (2, 40))
    half = copy.deepcopy(model).bfloat16()
    logits = half(ids)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids), rtol=0.1, atol=0.1)


def test_model_survives_deepcopy_and_device_moves() -> None:
    model, ids = HierarchicalTransformer(**THREE), torch.randint(0, 11, (2, 12))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
    model.to('meta')


def test_learns_a_sequence_by_heart() -> None:
    """A copy task over a distance that the fine level's window cannot reach, only the coarse levels'."""
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
