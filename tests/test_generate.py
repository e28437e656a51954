"""Sampling, and the generation loop."""

from __future__ import annotations

import re
from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.generation.loop import Sampler


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


def test_greedy_goes_on_with_the_likeliest_id() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    ids = prompt
    for _ in range(10):
        ids = torch.cat((ids, net(ids)[:, -1].argmax(-1, keepdim=True)), dim=-1)
    assert torch.equal(net.generate(prompt, 10, temperature=0), ids[:, 3:])


def test_same_seed_same_ids() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(net.generate(prompt, 20, filter_thres=0.0))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_builds_no_graph_and_takes_any_integers() -> None:
    net = model().train()
    out = net.generate(torch.zeros(1, 1, dtype=torch.uint8), 2)
    assert net.training
    assert out.dtype == torch.int64
    assert not out.requires_grad
    assert net.generate(torch.zeros(1, 1, dtype=torch.long), 0).shape == (1, 0)


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
        # any of the three takes the place of filter_thres
        (dict(top_k=5, filter_thres=1.0), 5),
    ],
    ids=str,
)
def test_filters_keep_the_likeliest(settings: dict[str, Any], kept: int) -> None:
    logits = torch.tensor([0.1, 0.5, 0.04, 0.25, 0.11]).log()
    likeliest = logits.topk(kept).indices.tolist()
    drawn = Sampler(**settings)(logits.expand(20_000, -1))
    assert set(drawn.tolist()) == set(likeliest)


def test_own_generator_gives_the_same_ids_again() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))

    def draw(seed: int) -> torch.Tensor:
        return net.generate(prompt, 20, filter_thres=0.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize('window_sizes', [(2, None), (3, 4), (0, 2)])
@pytest.mark.parametrize('stride', [1, 2, 4])
def test_greedy_is_the_same_with_and_without_cache(window_sizes: tuple[int | None, ...], stride: int) -> None:
    """300 steps, far beyond seq_len."""
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
    cached = net.generate(prompt, 300, temperature=0)
    assert torch.equal(cached, net.generate(prompt, 300, temperature=0, use_cache=False))
    assert len(cached.unique()) > 1


def test_stream_yields_what_generate_returns() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    ids = list(net.stream(prompt, 9, temperature=0))
    assert torch.equal(torch.stack(ids, dim=1), net.generate(prompt, 9, temperature=0))


@pytest.mark.parametrize('use_cache', [True, False])
def test_prompts_of_unequal_length_get_what_each_gets_alone(use_cache: bool) -> None:
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
    # ids that come late, so that rows end at different steps
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


def test_a_conversation_goes_on_with_the_state() -> None:
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


@pytest.mark.parametrize('count', [0, 1, 5])
def test_a_stream_tells_its_state(count: int) -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 7))
    stream = net.stream(prompt, 9, temperature=0)
    for _ in range(count):
        next(stream)
    state = stream.state
    assert state.position == 7 + count
    assert list(stream) == []
    whole = net.generate(prompt, 9, temperature=0)
    expected, _ = net(torch.cat((prompt, whole[:, : count + 1]), dim=1), return_state=True)
    with torch.no_grad():
        logits, _ = net(whole[:, count : count + 1], state=state, return_state=True)
    torch.testing.assert_close(logits[:, -1], expected[:, -1])


def test_stream_refuses_unknown_settings() -> None:
    for name in ('return_state', 'top_q'):
        with pytest.raises(ValueError, match=f'stream takes the settings of generate but return_state, got {name}'):
            model().stream(torch.ones(1, 3, dtype=torch.long), 4, **{name: True})


# what may be given


INTS: dict[str, Callable[[list[int]], Any]] = {
    'list': list,
    'tuple': tuple,
    'set': set,
    'generator': iter,
    'tensor': torch.tensor,
    'short tensor': lambda ids: torch.tensor(ids, dtype=torch.int16),
    'array': np.array,
    'bytes of an array': lambda ids: np.array(ids, dtype=np.uint8),
    'array backwards': lambda ids: np.array(ids)[::-1],
    'list of numpy integers': lambda ids: [np.int64(i) for i in ids],
    'list of tensors': lambda ids: [torch.tensor(i) for i in ids],
    'sequence of another kind': UserList,
}


@pytest.mark.parametrize('kind', INTS.values(), ids=INTS)
@pytest.mark.parametrize('count', [0, 1, 2])
def test_stop_ids_are_ints_of_any_kind(kind: Callable[[list[int]], Any], count: int) -> None:
    net, prompt = model(), torch.ones(1, 3, dtype=torch.long)
    settings: dict[str, Any] = dict(filter_thres=0.0, seq_len=60)

    def draw(**stops: Any) -> list[int]:
        return net.generate(prompt, **settings, **stops, generator=torch.Generator().manual_seed(0))[0].tolist()

    free = draw()
    late = sorted(set(free), key=free.index)[-count:] if count else []
    end = min(map(free.index, late), default=59)
    assert draw(stop_ids=kind(late)) == free[: end + 1]
    pieces = net.stream(prompt, **settings, stop_ids=kind(late), generator=torch.Generator().manual_seed(0))
    assert torch.cat(list(pieces)).tolist() == free[: end + 1]


@pytest.mark.parametrize('kind', [int, np.int64, np.uint8, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_one_int_may_be_of_any_kind(kind: Callable[[int], Any]) -> None:
    net, prompt = model(), torch.ones(2, 3, dtype=torch.long)
    free = net.generate(prompt, 20, temperature=0)
    last = free[0, -1].item()
    stopped = net.generate(prompt, kind(20), temperature=0, stop_ids=kind(last))
    assert stopped[0].tolist() == free[0, : free[0].tolist().index(last) + 1].tolist()
    assert net.generate(prompt, max_new_tokens=kind(5), top_k=kind(1)).shape == (2, 5)
    assert net.score(prompt, chunk_size=kind(1)) == pytest.approx(net.score(prompt))
    _, state = net(prompt, return_state=True)
    assert state.select(kind(1)).batch_size == 1
    assert net.initial_state(kind(3)).batch_size == 3


def test_prompts_rows_and_ids_are_sequences_of_any_kind() -> None:
    net, ids = model(), torch.randint(0, 11, (2, 5))
    expected, score = net.generate(ids, 6, temperature=0), net.score(ids)
    _, state = net(ids, return_state=True)
    for each in (
        ids.tolist(),
        ids.numpy(),
        ids.numpy().astype(np.uint16),
        list(ids),
        list(ids.numpy()),
        [*map(UserList, ids.tolist())],
    ):
        assert torch.equal(net.generate(each, 6, temperature=0), expected)
    for each in (ids.tolist(), ids.numpy(), UserList(ids.tolist())):
        assert net.score(each) == score
    assert net.score(ids[0].tolist()) == net.score(ids[0])
    unequal = [ids[0, :2].tolist(), ids[1].numpy()]
    assert torch.equal(net.generate(unequal, 6, temperature=0)[1], expected[1])
    for rows in (
        [1, 0],
        (1, 0),
        np.array([0, 1])[::-1],
        np.array([1, 0], dtype=np.int16),
        torch.tensor([1, 0]).to(torch.uint8),
    ):
        assert torch.equal(state.select(rows).blocks[0][0].ff_shift, state.select([1, 0]).blocks[0][0].ff_shift)


# text


class Written(HierarchicalTransformer):
    """A model of bytes that goes on with a text, whatever it reads."""

    def __init__(self, text: bytes | list[int], num_tokens: int = 256) -> None:
        super().__init__(num_tokens=num_tokens, dim=8, depth=1, seq_len=24, dim_head=4, heads=1, window_sizes=2)
        self.text = list(text)

    def forward(self, ids: torch.Tensor, state: Any = None, return_state: bool = False, **_: Any) -> Any:
        logits, after = super().forward(ids, state=state, return_state=True)
        at = [min(max(i - 2, 0), len(self.text) - 1) for i in range(after.position - ids.shape[1], after.position)]
        logits = F.one_hot(torch.tensor([[self.text[i] for i in at]] * len(ids)), self.num_tokens).float()
        return logits, after


STORY = 'Ein Bär — fand\n\nden Weg. Ende. Und weiter'


@pytest.mark.parametrize('prompt', ['abc', b'abc', bytearray(b'abc'), ['abc', 'xyz'], (b'abc', b'xyz')], ids=repr)
def test_text_in_text_out(prompt: Any) -> None:
    net, count = Written(STORY.encode()), len(STORY.encode())
    many = isinstance(prompt, (list, tuple))
    is_str = isinstance(prompt[0] if many else prompt, str)
    expected = STORY if is_str else STORY.encode()
    new, state = net.generate(prompt, count, temperature=0, return_state=True)
    assert new == ([expected] * 2 if many else expected)
    assert state.position == 3 + count
    pieces = list(net.stream(prompt, count, temperature=0))
    if many:
        assert [expected[:0].join(row) for row in zip(*pieces, strict=True)] == new
        assert all(any(piece) for piece in pieces)
    else:
        assert expected[:0].join(pieces) == new
        assert all(pieces)
    ids = torch.tensor([list(b'abc')])
    assert bytes(net.generate(ids, count, temperature=0)[0].tolist()) == STORY.encode()


def test_a_character_comes_whole_or_is_said_to_be_cut() -> None:
    net = Written('añ€'.encode())
    assert list(net.stream('abc', 6, temperature=0)) == ['a', 'ñ', '€']
    assert list(net.stream('abc', 5, temperature=0)) == ['a', 'ñ', '\ufffd']
    assert net.generate('abc', 5, temperature=0) == 'añ\ufffd'
    assert list(net.stream(b'abc', 3, temperature=0)) == [b'a', b'\xc3', b'\xb1']
    assert list(net.stream('abc', 0)) == []
    assert net.generate('abc', 0) == ''


@pytest.mark.parametrize(
    ('stop', 'end'),
    [
        ('\n\n', '\n\n'),
        (['nothing', b'Weg'], 'Weg'),
        (('Ende.', 'd'), 'd'),
        ('—', '—'),
        (['Ende', 'Ende. U'], 'Ende'),
        ('nothing', STORY),
        # what the prompt ends with does not count
        ('abcE', STORY),
        ([], STORY),
    ],
)
def test_stop_strings_end_a_text(stop: Any, end: str) -> None:
    net, count = Written(STORY.encode()), len(STORY.encode())
    expected = STORY[: STORY.index(end) + len(end)]
    assert net.generate('abc', count, temperature=0, stop=stop) == expected
    assert ''.join(net.stream('abc', count, temperature=0, stop=stop)) == expected
    ids = net.generate(torch.tensor([list(b'abc')]), count, temperature=0, stop=stop)
    assert bytes(ids[0].tolist()).decode() == expected


def test_stop_strings_end_each_row_by_itself() -> None:
    net = HierarchicalTransformer(num_tokens=256, dim=8, depth=1, seq_len=24, dim_head=4, heads=1, window_sizes=2)
    prompts = [b'abc', b'xyzxyz', b'1']

    def draw(**settings: Any) -> Any:
        return net.generate(prompts, 30, generator=torch.Generator().manual_seed(0), **settings)

    free = draw()
    stops = [free[0][4:6], free[1][9:10]]
    ends = [min([text.index(stop) + len(stop) for stop in stops if stop in text], default=30) for text in free]
    assert len(set(ends)) > 1
    assert draw(stop=stops) == [text[:end] for text, end in zip(free, ends, strict=True)]
    ids = net.generate(
        [torch.tensor(list(text)) for text in prompts], 30, generator=torch.Generator().manual_seed(0), stop=stops
    )
    for row, text, end in zip(ids.tolist(), free, ends, strict=True):
        assert bytes(row) == text[:end] + text[end - 1 : end] * (max(ends) - end)


def test_a_text_ends_where_no_byte_follows() -> None:
    for num_tokens in (257, 258):
        net = Written([*b'The end', 256, *b'and on'], num_tokens)
        assert net.generate('abc', 14, temperature=0) == 'The end'
        assert ''.join(net.stream('abc', 14, temperature=0)) == 'The end'
        ids = torch.tensor([list(b'abc')])
        assert net.generate(ids, 14, temperature=0)[0].tolist() == [*b'The end', 256, *b'and on']
        assert net.generate(ids, 14, temperature=0, stop_ids=256)[0].tolist() == [*b'The end', 256]


# penalties


def test_repetition_penalty_is_that_of_ctrl() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.5], [2.0, -1.0, 1.5, 0.5]])
    seen = torch.tensor([[True, True, False, False], [False, False, False, True]])
    sampler = Sampler(repetition_penalty=2.0, filter_thres=0.0)
    drawn = torch.stack([sampler(logits, seen) for _ in range(20_000)])
    for row, expected in enumerate(([1.0, -2.0, 1.5, 0.5], [2.0, -1.0, 1.5, 0.25])):
        shares = torch.bincount(drawn[:, row], minlength=4) / len(drawn)
        torch.testing.assert_close(shares, torch.tensor(expected).softmax(-1), rtol=0, atol=0.02)
    assert Sampler(repetition_penalty=2.0, temperature=0)(logits, seen).tolist() == [2, 0]


@torch.no_grad()
def test_repetition_penalty_counts_the_prompt_and_what_came() -> None:
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


# what goes wrong


@pytest.mark.parametrize('settings', [dict(temperature=0), {}, dict(top_k=2), dict(top_p=0.5), dict(temperature=1e-40)])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_logits_that_are_not_finite_are_one_clear_error(settings: dict[str, Any], bad: float) -> None:
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


def test_ids_that_are_ruled_out_may_have_no_logit() -> None:
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 3] = 0.0
    for settings in (dict(temperature=0), {}, dict(top_p=0.9)):
        assert Sampler(**settings)(logits).tolist() == [3, 3]
    with pytest.raises(ValueError, match='the largest of row 0 is -inf'):
        Sampler()(torch.full((2, 5), -torch.inf))


@pytest.mark.parametrize('where', ['model', 'sampler'])
@pytest.mark.parametrize('count', [0, 3])
def test_a_stream_that_was_interrupted_has_no_wrong_state(
    monkeypatch: pytest.MonkeyPatch, where: str, count: int
) -> None:
    net, prompt = model().double(), torch.randint(0, 11, (2, 7))
    whole = net.generate(prompt, 9, temperature=0)
    stream = net.stream(prompt, 9, temperature=0)
    for _ in range(count):
        next(stream)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = net.norms[0].register_forward_hook(interrupt) if where == 'model' else None
    if where == 'sampler':
        monkeypatch.setattr(Sampler, '__call__', interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    if hook is not None:
        hook.remove()
    if where == 'model' and count:
        with pytest.raises(ValueError, match='was consumed by a chunk that came after it, or that failed halfway'):
            _ = stream.state
        return
    # a prompt that failed to be read is read again; an id whose successor was not drawn has been read
    state = stream.state
    assert state.position == 7 + count
    goes_on = net.generate(whole[:, count : count + 1], 8 - count, temperature=0, state=state)
    assert torch.equal(goes_on, whole[:, count + 1 :])


def test_a_stream_may_begin_and_go_on_in_different_modes() -> None:
    net, prompt = model(), torch.randint(0, 11, (2, 3))
    settings: dict[str, Any] = dict(temperature=0, stop_ids=[99 % 11], repetition_penalty=1.1)
    whole = net.generate(prompt, 9, **settings)
    for first, second in ((torch.inference_mode, torch.enable_grad), (torch.no_grad, torch.inference_mode)):
        with first():
            stream = net.stream(prompt, 9, **settings)
            new = [next(stream)]
        with second():
            new += list(stream)
            state = stream.state
    assert torch.equal(torch.stack(new, dim=1), whole)
    assert state.position == 3 + whole.shape[1]


@pytest.mark.parametrize(
    ('prompt', 'settings', 'message'),
    [
        ('', {}, 'prompt must hold at least one token'),
        (['a', b'a'], {}, 'prompt must hold rows of one kind, got bytes and str'),
        (['a', [1]], {}, 'prompt must hold rows of one kind, got list and str'),
        ('\ud900', {}, 'prompt must be text that UTF-8 can encode'),
        ([1, 2], {}, 'prompt must have shape (batch, seq), got (2,)'),
        ([[1, 2], [1, 2.5]], {}, 'prompt must be a tensor of integers, got torch.float32'),
        ([[1, 2], [1, 999]], {}, 'prompt must be in [0, 256), got values from 1 to 999'),
        (3, {}, 'prompt must be a tensor of integers, got int'),
        ('a', dict(stop=''), "stop must be strings or bytes that are not empty, got ''"),
        ('a', dict(stop=[b'a', 3]), 'stop must be strings or bytes that are not empty, got 3'),
        ('a', dict(stop=3), 'stop must be a str, bytes, or several of them, got 3'),
        ('a', dict(stop_ids='a'), "stop_ids must be integers in [0, 256), got 'a'"),
        ('a', dict(stop_ids=[True]), 'stop_ids must be in [0, 256), got True'),
        ('a', dict(stop_ids=torch.tensor([1.0])), 'stop_ids must be in [0, 256), got 1.0'),
        ('a', dict(stop_ids=[[1]]), 'stop_ids must be in [0, 256), got [1]'),
        ('a', dict(stop_ids=256), 'stop_ids must be in [0, 256), got 256'),
        ('a', dict(repetition_penalty=0), 'repetition_penalty must be above 0, got 0'),
        ('a', dict(repetition_penalty=-1.0), 'repetition_penalty must be a finite number of at least 0, got -1.0'),
        ('a', dict(seq_len=None), 'seq_len or max_new_tokens must be given, and not both, got None and None'),
        ('a', dict(max_new_tokens=3), 'seq_len or max_new_tokens must be given, and not both, got 2 and 3'),
        ('a', dict(seq_len=None, max_new_tokens=-3), 'max_new_tokens must be an integer of at least 0, got -3'),
    ],
    ids=repr,
)  # fmt: skip
def test_refuses_what_it_cannot_take(prompt: Any, settings: dict[str, Any], message: str) -> None:
    net = HierarchicalTransformer(num_tokens=256, dim=8, depth=1, dim_head=4, heads=1, window_sizes=2)
    for draw in (net.generate, net.stream):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(prompt, **{'seq_len': 2, **settings})


def test_text_is_for_models_of_bytes() -> None:
    for prompt, settings, name in (('a', {}, 'prompt'), (torch.ones(1, 2).long(), dict(stop='a'), 'stop')):
        message = f'{name} can be text only where num_tokens is 256, 257 or 258, and it is 11'
        with pytest.raises(ValueError, match=message):
            model().generate(prompt, 2, **settings)


@pytest.mark.parametrize('wrong', [dict(generator=3), dict(use_cache='no')], ids=str)
def test_a_setting_of_the_wrong_kind_is_named(wrong: dict[str, Any]) -> None:
    model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, seq_len=16, heads=2, dim_head=4)
    (name,) = wrong
    with pytest.raises(ValueError, match=f'{name} must be'):
        model.generate(torch.ones(1, 2, dtype=torch.long), 2, **wrong)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_sampler_draws_what_multinomial_draws(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 11).to(dtype)
    for seed in range(20):
        drawn = Sampler(top_k=7, temperature=0.8, generator=torch.Generator().manual_seed(seed))(logits)
        values, ids = logits.float().topk(7, dim=-1)
        probs = ((values - values[:, :1]).double() / 0.8).softmax(dim=-1)
        index = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, ids.gather(-1, index)[:, 0])
