"""The generation loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import model

from simple_hierarchical_transformer import HierarchicalTransformer


def test_temperature_zero_takes_the_most_likely_id() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    ids = prompt
    for _ in range(10):
        ids = torch.cat((ids, net(ids)[:, -1].argmax(-1, keepdim=True)), dim=-1)
    assert torch.equal(net.generate(prompt, 10, temperature=0), ids[:, 3:])


def test_the_same_seed_draws_the_same_ids() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(net.generate(prompt, 20, filter_thres=0.0))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_builds_no_graph_and_accepts_any_integers() -> None:
    net = model().train()
    out = net.generate(torch.zeros(1, 1, dtype=torch.uint8), 2)
    assert net.training
    assert out.dtype == torch.int64
    assert not out.requires_grad
    assert net.generate(torch.zeros(1, 1, dtype=torch.long), 0).shape == (1, 0)


def test_a_generator_of_the_caller_draws_the_same_ids_again() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))

    def draw(seed: int) -> torch.Tensor:
        return net.generate(prompt, 20, filter_thres=0.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize('window_sizes', [(2, None), (3, 4), (0, 2)])
@pytest.mark.parametrize('stride', [1, 2, 4])
def test_ids_are_the_same_with_and_without_a_cache(window_sizes: tuple[int | None, ...], stride: int) -> None:
    """For 60 steps, beyond twice seq_len."""
    net = HierarchicalTransformer(
        num_tokens=11,
        dim=8,
        depth=2,
        seq_len=24,
        dim_head=4,
        heads=2,
        hierarchies=(1, 4),
        hierarchical_stride=(1, stride),
        window_sizes=window_sizes,
    ).double()
    prompt = torch.randint(0, 11, (2, 5))
    cached = net.generate(prompt, 60, temperature=0)
    assert torch.equal(cached, net.generate(prompt, 60, temperature=0, use_cache=False))
    assert len(cached.unique()) > 1


@pytest.mark.parametrize('use_cache', [True, False])
def test_prompts_of_unequal_length_get_the_ids_each_gets_alone(use_cache: bool) -> None:
    net = model().double()
    prompts = [torch.randint(0, 11, (n,)) for n in (4, 1, 9, 30)]
    together = net.generate(prompts, 12, temperature=0, use_cache=use_cache)
    alone = [net.generate(prompt[None], 12, temperature=0)[0] for prompt in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_stop_ids_end_rows() -> None:
    net = model()
    prompts = [torch.randint(0, 11, (n,)) for n in (3, 5)]

    def draw(rows: list[torch.Tensor], **settings: Any) -> torch.Tensor:
        return net.generate(rows, 40, filter_thres=0.0, generator=torch.Generator().manual_seed(0), **settings)

    free = draw(prompts)
    # ids that first appear late, so that rows end at different steps
    stop = sorted(range(11), key=lambda id: -min(row.tolist().index(id) if id in row else 99 for row in free))[:2]
    ends = [next((i for i, id in enumerate(row.tolist()) if id in stop), 39) for row in free]
    assert ends[0] != ends[1]
    assert min(ends) > 0

    ended = draw(prompts, stop_ids=stop)
    assert ended.shape == (2, max(ends) + 1)
    for row, whole, end in zip(ended, free, ends, strict=True):
        assert torch.equal(row[: end + 1], whole[: end + 1])
        assert (row[end:] == whole[end]).all()

    alone = draw(prompts[:1])[0].tolist()
    settings = dict(filter_thres=0.0, generator=torch.Generator().manual_seed(0), stop_ids=alone[3:4])
    streamed = list(net.stream(prompts[0][None], 40, **settings))
    assert len(streamed) == alone.index(alone[3]) + 1


def test_a_conversation_continues_from_the_state() -> None:
    net = model().double()
    first, second = torch.randint(0, 11, (2, 7)), torch.randint(0, 11, (2, 3))
    answer, state = net.generate(first, 5, temperature=0, return_state=True)
    assert state.position == 12
    more = net.generate(second, 6, temperature=0, state=state)
    whole = torch.cat((first, answer, second), dim=1)
    assert torch.equal(more, net.generate(whole, 6, temperature=0))

    none, state = net.generate(first, 0, return_state=True)
    assert none.shape == (2, 0)
    assert state.position == 7


@torch.no_grad()
def test_repetition_penalty_counts_the_prompt_and_the_output() -> None:
    net, prompts = model().double(), [torch.randint(0, 11, (n,)) for n in (3, 5)]
    new = net.generate(prompts, 9, temperature=0, repetition_penalty=1.5)
    plain = net.generate(prompts, 9, temperature=0)
    assert not torch.equal(new, plain)
    assert torch.equal(net.generate(prompts, 9, temperature=0, repetition_penalty=1), plain)
    for prompt, row in zip(prompts, new, strict=True):
        ids = prompt
        for _ in range(9):
            logits = net(ids[None])[0, -1]
            for seen in ids.unique():
                logits[seen] = logits[seen] / 1.5 if logits[seen] > 0 else logits[seen] * 1.5
            ids = torch.cat((ids, logits.argmax()[None]))
        assert torch.equal(row, ids[len(prompt) :])
