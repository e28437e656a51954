"""The next-latent loss: rollouts, summarizers, and the kinds of distance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.configs import SMALL, STRIDED, THREE, build
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.objectives.next_latent import ChunkSummarizer

POWERS = st.sampled_from([1, 2, 4, 8])


@given(c=POWERS, s=POWERS, n=st.integers(1, 30))
def test_chunk_summary_is_the_mean_over_the_compressor_window(c: int, s: int, n: int) -> None:
    s = min(s, c)
    embeds = torch.randn(2, n, 6, dtype=torch.float64)
    summaries = ChunkSummarizer(dim_embed=6, dim=6, compression=c, stride=s)(embeds)
    expected = [embeds[:, max(end - c, 0) : end].mean(1) for end in range(1, n + 1, s)]
    torch.testing.assert_close(summaries, torch.stack(expected, 1))


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
def test_detach_summaries_controls_gradients_to_embeddings(detach: bool) -> None:
    config = dict(SMALL, hierarchies=(1, 4), recon_loss_weight=0.0, next_latent_loss_weight=(0.0, 1.0))
    model = build(dict(config, detach_summaries=detach))
    ids = torch.randint(1, 11, (2, 21))

    # the latents are constants here, so gradients reach the embeddings only through the summaries
    embeds = model.token_emb(ids)
    latents = torch.randn(2, 21, 8, dtype=torch.float64)
    [objective] = (each for each in model.objectives if each.kind == 'next_latent')
    read = replace(model.inspect(ids), embeds=embeds, tokens=[latents, latents])
    loss = objective.loss(model, read, model.make_batch(ids, ids), None)
    loss.backward()
    assert (model.token_emb.weight.grad is None) == detach


class Last(torch.nn.Module):
    """A custom summarizer: the embedding at which a level token ends."""

    def forward(self, embeds: Tensor) -> Tensor:
        return embeds[:, ::4]


def test_custom_summarizers_get_the_same_tokens_in_any_chunk() -> None:
    model = build(dict(STRIDED, chunk_summarizers=(None, Last()), detach_summaries=False, ignore_index=-1))
    ids, seen = torch.randint(0, 11, (1, 24)), []
    model.chunk_summarizers['1'].register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = model.token_emb(ids)[:, ::4]
    state = None
    for at in range(0, 24, 3):
        _, _, state = model(
            ids[:, at : at + 3], labels=ids[:, at : at + 3], return_loss=True, return_state=True, state=state
        )
    torch.testing.assert_close(torch.cat(seen, dim=1), expected)
