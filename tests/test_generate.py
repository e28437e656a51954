"""Sampling, and the generation loop."""

from __future__ import annotations

import pytest
import torch

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.generate import sample


def model() -> HierarchicalTransformer:
    return HierarchicalTransformer(
        num_tokens=11, dim=8, depth=1, seq_len=24, dim_head=4, heads=2, hierarchies=(1, 4), window_sizes=(2, None)
    )


@pytest.mark.parametrize(
    ('vocabulary', 'filter_thres', 'kept'),
    [(256, 0.9, 26), (30, 0.9, 3), (10, 0.7, 3), (10, 0.0, 10), (10, 1.0, 1), (11, 0.9, 2), (3, 0.9, 1)],
)
def test_only_the_likeliest_share_is_drawn(vocabulary: int, filter_thres: float, kept: int) -> None:
    logits = torch.randn(vocabulary)
    drawn = sample(logits.expand(4000, -1), temperature=5.0, filter_thres=filter_thres)
    assert set(drawn.tolist()) == set(logits.topk(kept).indices.tolist())


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.randn(5)
    drawn = sample(logits.expand(100_000, -1), temperature=0.7, filter_thres=0.0)
    frequencies = torch.bincount(drawn, minlength=5) / 100_000
    torch.testing.assert_close(frequencies, (logits / 0.7).softmax(-1), rtol=0, atol=0.01)


def test_greedy_goes_on_with_the_likeliest_id() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    ids = prompt
    for _ in range(10):
        ids = torch.cat((ids, net(ids)[:, -1].argmax(-1, keepdim=True)), dim=-1)
    assert torch.equal(net.generate(prompt, 10, temperature=0), ids[:, 3:])


def test_more_ids_than_seq_len_read_the_last_ones() -> None:
    net, prompt = model(), torch.randint(0, 11, (1, 40))
    new = net.generate(prompt, 8, temperature=0)
    assert new.shape == (1, 8)
    assert torch.equal(new[:, 0], net(prompt[:, -24:])[:, -1].argmax(-1))


def test_same_seed_same_ids() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(net.generate(prompt, 20, filter_thres=0.0))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_leaves_the_model_as_it_was_and_builds_no_graph() -> None:
    net = model().train()
    out = net.generate(torch.zeros(1, 1, dtype=torch.uint8), 2)
    assert net.training
    assert out.dtype == torch.int64
    assert net.generate(torch.zeros(1, 1, dtype=torch.long), 0).shape == (1, 0)
