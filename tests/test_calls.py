"""Calls of the model: what they refuse, and what users change on a built model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.configs import build
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.objectives.quantized import RandomProjectionQuantizer
from simple_hierarchical_transformer.read import Read

TINY: dict[str, Any] = dict(num_tokens=11, dim=8, depth=2, seq_len=32, dim_head=4, heads=2, hierarchies=(1, 4))


def ids(batch: int = 2, n: int = 12) -> torch.Tensor:
    return torch.randint(1, 11, (batch, n))


def test_a_state_is_refused_once_reversible_is_switched() -> None:
    model = build(TINY)
    _, state = model(ids(), return_state=True)
    model.reversible = True
    with pytest.raises(ValueError, match='state is of another model'):
        model(ids(), state=state, return_state=True)


def test_reversible_does_nothing_to_an_hourglass() -> None:
    model = build(dict(TINY, arrangement='hourglass'))
    read = ids()
    before = model(read)
    model.reversible = True
    assert torch.equal(model(read), before)


def test_a_quantizer_of_another_number_of_codebooks_is_refused() -> None:
    model = build(dict(TINY, quantized_loss_weight=(0.0, 0.1)))
    model.quantizers['1'] = RandomProjectionQuantizer(8, codebooks=4, size=1024, dim_code=16).double()
    with pytest.raises(ValueError, match=r'quantizers of hierarchy 4 must return 1 ids .* got 4'):
        model(ids(), return_loss=True)


def test_a_chunk_without_tokens_of_a_quantized_level_has_a_loss() -> None:
    model = build(dict(TINY, hierarchical_stride=(1, 4), quantized_loss_weight=(0.0, 0.1), quantizer_codebooks=2))
    _, state = model(ids(n=5), return_state=True)
    loss, parts, state = model(ids(n=3), labels=ids(n=3), return_loss=True, state=state, return_state=True)
    assert loss.isfinite()
    assert parts.named['quantized/4x'] == 0


def test_an_empty_sequential_is_a_summarizer() -> None:
    summarizer = nn.Sequential()
    model = build(dict(TINY, hierarchies=1, chunk_summarizers=(summarizer,)))
    assert isinstance(model.chunk_summarizers['0'], nn.Sequential)
    model(ids(), return_loss=True)[0].backward()


@pytest.mark.parametrize('flag', ['return_loss', 'return_hierarchical_embeds', 'return_hierarchical_token_embeds'])
def test_logits_to_keep_is_refused_where_no_logits_are_returned(flag: str) -> None:
    with pytest.raises(ValueError, match=f'logits_to_keep is for logits, got 2 with {flag} = True'):
        build(TINY)(ids(), logits_to_keep=2, **{flag: True})


def test_logits_to_keep_returns_the_last_logits() -> None:
    model, read = build(TINY), ids()
    assert torch.equal(model(read, logits_to_keep=3), model(read)[:, -3:])


@pytest.mark.parametrize(
    ('readings', 'message'),
    [
        (-1, 'readings must be a finite number of at least 0, got -1'),
        ('x', "readings must be a finite number of at least 0, got 'x'"),
        (torch.ones(3), r'readings must be a number or a tensor of shape \(2,\), got \(3,\)'),
        (torch.tensor([1.0, float('nan')]), 'readings must be at least 0'),
    ],
    ids=str,
)
def test_readings_are_checked(readings: Any, message: str) -> None:
    model = build(dict(TINY, ngrams=(2,), ngram_rows=16, ngram_dropout=0.5))
    with pytest.raises(ValueError, match=message):
        model(ids(), return_loss=True, readings=readings)


def test_inspect_is_a_call_that_returns_all_of_a_pass() -> None:
    model, read, seen = build(dict(TINY, merge='linear')), ids(), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    found = model.inspect(read)
    assert isinstance(found, Read)
    assert seen == [1]
    assert torch.equal(model.to_logits(found.features), model(read))
    assert len(found.contributions) == 2
    assert found.state is None
    assert model.inspect(read, return_state=True).state.position == read.shape[1]


def test_a_forward_that_is_wrapped_and_takes_less_still_generates() -> None:
    model = build(TINY)
    expected = model.generate(ids(1, 4), 6, temperature=0)

    @functools.wraps(model.forward)
    def forward(ids: Any, state: Any = None, return_state: bool = False) -> Any:
        return HierarchicalTransformer.forward(model, ids, state=state, return_state=return_state)

    model.forward = forward
    torch.manual_seed(0)
    assert model.generate(ids(1, 4), 6, temperature=0).shape == expected.shape


@pytest.mark.slow
@pytest.mark.parametrize('option', [dict(ngrams=(2, 3), ngram_rows=16), dict(recall=(2,))], ids=str)
def test_export_takes_any_batch_with_tables(option: dict[str, Any]) -> None:
    model = build(dict(TINY, hierarchies=1, **option)).eval()
    batch = torch.export.Dim('batch', min=2, max=8)
    program = torch.export.export(model, (ids(2, 12),), dynamic_shapes=dict(ids={0: batch}), strict=False)
    read = ids(5, 12)
    torch.testing.assert_close(program.module()(read), model(read))
