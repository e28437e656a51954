"""Bad inputs of forward and generate are refused, with an error that names the argument."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer

GOOD: dict[str, Any] = dict(num_tokens=11, dim=8, depth=1, seq_len=16, dim_head=4, heads=2)


IDS = torch.zeros(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ('ids', 'arguments', 'message'),
    [
        (IDS + 11, {}, 'ids must be in [0, 11), got values from 11 to 11'),
        (IDS - 1, {}, 'ids must be in [0, 11), got values from -1 to -1'),
        (IDS.float(), {}, 'ids must be a tensor of integers, got torch.float32'),
        (IDS.bool(), {}, 'ids must be a tensor of integers, got torch.bool'),
        ([[1, 2]], {}, 'ids must be a tensor of integers, got list'),
        (IDS[0], {}, 'ids must have shape (batch, seq), got (8,)'),
        (IDS[:, :, None], {}, 'ids must have shape (batch, seq), got (2, 8, 1)'),
        (IDS[:, :0], {}, 'ids must hold at least one token, got shape (2, 0)'),
        (IDS[:0], {}, 'ids must hold at least one token, got shape (0, 8)'),
        (IDS.repeat(1, 3), {}, 'ids must have at most seq_len = 16 tokens in a pass, got 24'),
        (IDS[:, :1], dict(return_loss=True), 'ids must have at least 2 tokens to predict one from another, got 1'),
        (IDS, dict(return_quantized_ids=True), 'return_quantized_ids needs a quantized_loss_weight above 0'),
        (IDS, dict(labels=IDS), 'labels are for return_loss = True'),
        (IDS, dict(counts=IDS), 'counts are for return_loss = True'),
        (IDS, dict(return_loss=True, counts=IDS), 'counts must be what count_targets returns, of shape ('),
        (IDS, dict(return_loss=True, counts=3), 'counts must be what count_targets returns, of shape ('),
        (IDS, dict(return_loss=True, labels=IDS[:, 1:]), 'labels must have the shape of ids (2, 8), got (2, 7)'),
        (IDS, dict(return_loss=True, labels=IDS + 11), 'labels must be in [0, 11), got values from 11 to 11'),
        (IDS, dict(return_loss=True, labels=IDS.float()), 'labels must be a tensor of integers, got torch.float32'),
        (
            IDS,
            dict(return_loss=True, return_hierarchical_embeds=True),
            'forward returns one thing, got return_loss, return_hierarchical_embeds',
        ),
    ],
)
def test_forward_refuses(ids: Any, arguments: dict[str, Any], message: str) -> None:
    model = HierarchicalTransformer(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(ids, **arguments)


@pytest.mark.parametrize(
    ('prompt', 'arguments', 'message'),
    [
        (IDS[:, :0], {}, 'prompt must hold at least one token, got shape (2, 0)'),
        (IDS[0], {}, 'prompt must have shape (batch, seq), got (8,)'),
        (IDS + 11, {}, 'prompt must be in [0, 11), got values from 11 to 11'),
        (IDS.float(), {}, 'prompt must be a tensor of integers, got torch.float32'),
        (IDS, dict(temperature=-1.0), 'temperature must be a finite number of at least 0, got -1.0'),
        (IDS, dict(filter_thres='a'), "filter_thres must be a finite number of at least 0, got 'a'"),
        (IDS, dict(filter_thres=None), 'filter_thres must be between 0 and 1, got None'),
        (IDS, dict(top_k=0), 'top_k must be an integer of at least 1, got 0'),
        (IDS, dict(top_p=0.0), 'top_p must be above 0 and at most 1, got 0.0'),
        (IDS, dict(min_p=1.5), 'min_p must be between 0 and at most 1, got 1.5'),
        (IDS, dict(stop_ids=[11]), 'stop_ids must be in [0, 11), got 11'),
        ([], {}, 'prompt must hold at least one row, got an empty list'),
        ([IDS[0], IDS[0, :0]], {}, 'prompt must hold at least one token'),
        (IDS, dict(filter_thres=1.1), 'filter_thres must be between 0 and at most 1, got 1.1'),
        (IDS, dict(seq_len=-1), 'seq_len must be an integer of at least 0, got -1'),
    ],
)
def test_generate_refuses(prompt: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    model = HierarchicalTransformer(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(prompt, **{'seq_len': 2, **arguments})


@pytest.mark.parametrize('loss', [nn.functional.mse_loss, lambda pred, target: (pred - target).mean(-1), lambda *_: 0])
def test_latent_loss_of_the_wrong_shape_is_named(loss: Any) -> None:
    model = HierarchicalTransformer(**GOOD, next_latent_loss_type=loss)
    with pytest.raises(ValueError, match=re.escape('next_latent_loss_type must return a loss per element, (2, 6, 8)')):
        model(IDS, return_loss=True)


def test_summarizer_of_the_wrong_shape_is_named() -> None:
    model = HierarchicalTransformer(**GOOD, hierarchies=(1, 2), chunk_summarizers=(None, nn.Linear(8, 5)))
    with pytest.raises(ValueError, match=re.escape('chunk_summarizers of hierarchy 2 must return shape (2, 7, 8)')):
        model(IDS, return_loss=True)


@pytest.mark.parametrize('arguments', [dict(window_sizes=99), dict(prophet_loss_weight=0.1)], ids=str)
def test_warnings_of_the_constructor_name_its_call(arguments: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=next(iter(arguments))) as warned:
        HierarchicalTransformer(**GOOD, **arguments)
    assert warned[0].filename == __file__
