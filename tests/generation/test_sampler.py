"""Sampling of ids from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import model

from simple_hierarchical_transformer.generation.sampler import Sampler


@pytest.mark.parametrize(
    ('vocabulary', 'filter_thres', 'kept'),
    [(256, 0.9, 26), (30, 0.9, 3), (10, 0.7, 3), (10, 0.0, 10), (10, 1.0, 1), (11, 0.9, 2), (3, 0.9, 1)],
)
def test_only_the_most_likely_share_is_drawn(vocabulary: int, filter_thres: float, kept: int) -> None:
    logits = torch.randn(vocabulary)
    drawn = Sampler(temperature=5.0, filter_thres=filter_thres)(logits.expand(4000, -1))
    assert set(drawn.tolist()) == set(logits.topk(kept).indices.tolist())


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.randn(5)
    drawn = Sampler(temperature=0.7, filter_thres=0.0)(logits.expand(100_000, -1))
    frequencies = torch.bincount(drawn, minlength=5) / 100_000
    torch.testing.assert_close(frequencies, (logits / 0.7).softmax(-1), rtol=0, atol=0.01)


@pytest.mark.parametrize('temperature', [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.randn(50, 11)
    assert torch.equal(Sampler(temperature=temperature)(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    ('settings', 'kept'),
    [
        (dict(top_k=3), 3),
        (dict(top_k=99), 5),
        (dict(top_p=0.6), 2),
        (dict(top_p=0.5), 1),
        (dict(top_p=0.51), 2),
        (dict(top_p=1.0), 5),
        (dict(min_p=0.3), 2),
        (dict(min_p=0.1), 4),
        (dict(min_p=0.0), 5),
        (dict(top_k=4, min_p=0.1, top_p=0.89), 3),
        # any of the three replaces filter_thres
        (dict(top_k=5, filter_thres=1.0), 5),
    ],
    ids=str,
)
def test_filters_keep_the_most_likely_ids(settings: dict[str, Any], kept: int) -> None:
    logits = torch.tensor([0.1, 0.5, 0.04, 0.25, 0.11]).log()
    most_likely = logits.topk(kept).indices.tolist()
    drawn = Sampler(**settings)(logits.expand(20_000, -1))
    assert set(drawn.tolist()) == set(most_likely)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_sampler_draws_what_multinomial_draws(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 11).to(dtype)
    for seed in range(20):
        drawn = Sampler(top_k=7, temperature=0.8, generator=torch.Generator().manual_seed(seed))(logits)
        values, ids = logits.float().topk(7, dim=-1)
        probs = ((values - values[:, :1]).double() / 0.8).softmax(dim=-1)
        index = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, ids.gather(-1, index)[:, 0])


def test_repetition_penalty_is_that_of_ctrl() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.5], [2.0, -1.0, 1.5, 0.5]])
    seen = torch.tensor([[True, True, False, False], [False, False, False, True]])
    sampler = Sampler(repetition_penalty=2.0, filter_thres=0.0)
    drawn = torch.stack([sampler(logits, seen) for _ in range(20_000)])
    for row, expected in enumerate(([1.0, -2.0, 1.5, 0.5], [2.0, -1.0, 1.5, 0.25])):
        shares = torch.bincount(drawn[:, row], minlength=4) / len(drawn)
        torch.testing.assert_close(shares, torch.tensor(expected).softmax(-1), rtol=0, atol=0.02)
    assert Sampler(repetition_penalty=2.0, temperature=0)(logits, seen).tolist() == [2, 0]


def test_excluded_ids_may_have_a_logit_of_minus_infinity() -> None:
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 3] = 0.0
    for settings in (dict(temperature=0), {}, dict(top_p=0.9)):
        assert Sampler(**settings)(logits).tolist() == [3, 3]
    with pytest.raises(ValueError, match='the largest of row 0 is -inf'):
        Sampler()(torch.full((2, 5), -torch.inf))


@pytest.mark.parametrize('settings', [dict(temperature=0), {}, dict(top_k=2), dict(top_p=0.5), dict(temperature=1e-40)])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_logits_that_are_not_finite_raise_one_clear_error(settings: dict[str, Any], bad: float) -> None:
    logits = torch.zeros(3, 11)
    logits[1, 4] = bad
    message = f'logits must be finite to draw an id from, and the largest of row 1 is {bad}'
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)(logits)

    net, prompt = model(), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        net.to_logits.weight[4] = bad
    for draw in (net.generate, lambda *args, **kwargs: list(net.stream(*args, **kwargs))):
        with pytest.raises(ValueError, match='logits must be finite to draw an id from'):
            draw(prompt, 3, **settings)
