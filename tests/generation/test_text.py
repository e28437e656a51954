"""Generation from text to text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from simple_hierarchical_transformer import HierarchicalTransformer


class Scripted(HierarchicalTransformer):
    """A model of bytes that continues with a given text, whatever it reads."""

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
def test_output_has_the_type_of_the_prompt(prompt: Any) -> None:
    net, count = Scripted(STORY.encode()), len(STORY.encode())
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


def test_characters_are_yielded_whole_or_replaced_if_cut() -> None:
    net = Scripted('añ€'.encode())
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
        # the end of the prompt does not count
        ('abcE', STORY),
        ([], STORY),
    ],
)
def test_stop_strings_end_a_text(stop: Any, end: str) -> None:
    net, count = Scripted(STORY.encode()), len(STORY.encode())
    expected = STORY[: STORY.index(end) + len(end)]
    assert net.generate('abc', count, temperature=0, stop=stop) == expected
    assert ''.join(net.stream('abc', count, temperature=0, stop=stop)) == expected
    ids = net.generate(torch.tensor([list(b'abc')]), count, temperature=0, stop=stop)
    assert bytes(ids[0].tolist()).decode() == expected


def test_each_row_ends_at_its_own_stop_string() -> None:
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


def test_text_ends_at_an_id_above_255() -> None:
    for num_tokens in (257, 258):
        net = Scripted([*b'The end', 256, *b'and on'], num_tokens)
        assert net.generate('abc', 14, temperature=0) == 'The end'
        assert ''.join(net.stream('abc', 14, temperature=0)) == 'The end'
        ids = torch.tensor([list(b'abc')])
        assert net.generate(ids, 14, temperature=0)[0].tolist() == [*b'The end', 256, *b'and on']
        assert net.generate(ids, 14, temperature=0, stop_ids=256)[0].tolist() == [*b'The end', 256]
