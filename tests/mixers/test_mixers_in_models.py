"""Mixers in a model: from outside, mixed, grouped heads, and refused arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import SEQ_LEN, build, loss_of_a_copy
from support.mixers import BASE, CASES, DIM, HEADS, LENGTH, in_model, make
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import (
    Attention,
)


class Average(nn.Module):
    """A custom mixer: the mean of all tokens so far."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(dim)
        self.to_out = nn.Linear(dim, dim)

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return (like.new_zeros(batch, self.norm.normalized_shape[0]),)

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None, start: int) -> tuple[Tensor, Any]:
        total = self.norm(x).cumsum(dim=1) + (0 if state is None else state[0][:, None])
        count = torch.arange(start + 1, start + x.shape[1] + 1)[:, None]
        if state is not None:
            state = (total[:, -1],) if torch.is_grad_enabled() else (state[0].copy_(total[:, -1]),)
        return self.scale * self.to_out(total / count), state


def test_custom_mixer() -> None:
    config = dict(BASE, mixer=('attention', Average, Average), mixer_kwargs=(None, dict(scale=0.5), None))
    model, ids = build(config), torch.randint(0, 11, (2, SEQ_LEN))
    assert [model.layers[1][i].attn.scale for i in (1, 2)] == [0.5, 1.0]
    whole = model(ids)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state, outs = None, []
            for chunk in ids.split([5, 1, 1, 20, 21], dim=1):
                out, state = model(chunk, state=state, return_state=True)
                outs.append(out)
            torch.testing.assert_close(torch.cat(outs, dim=1), whole)


def test_three_mixers_learn_save_load_and_generate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HierarchicalTransformer(
        num_tokens=8, dim=24, depth=2, seq_len=24, dim_head=12, heads=2, window_sizes=(1, None, None),
        hierarchies=(1, 2, 4), hierarchical_stride=(1, 2, 4), mixer=('attention', 'gateloop', 's4d'),
        mixer_kwargs=(None, dict(state_heads=12), dict(state_dim=16)), recon_loss_weight=0.0,
        next_latent_loss_weight=0.0,
    )  # fmt: skip
    assert loss_of_a_copy(model, steps=150) < 0.5

    model.save_pretrained(tmp_path)
    again = HierarchicalTransformer.from_pretrained(tmp_path)
    prompt = torch.randint(1, 8, (2, 9))
    new = again.generate(prompt, 30, temperature=0)
    assert torch.equal(new, model.generate(prompt, 30, temperature=0))
    assert torch.equal(new[:, :15], model.generate(prompt, 15, temperature=0, use_cache=False))


def test_fewer_key_heads_make_a_smaller_state() -> None:
    whole, grouped = (build(dict(BASE, mixer_kwargs=kwargs)).initial_state(1) for kwargs in (None, dict(kv_heads=1)))
    sizes = [
        sum(t.nbytes for layer in state.blocks for block in layer for t in block.mixer) for state in (whole, grouped)
    ]
    assert sizes[0] == 4 * sizes[1]


def test_grouped_queries_equal_heads_with_equal_keys() -> None:
    grouped = make(CASES['grouped queries'])
    plain = Attention(dim=DIM, **HEADS, length=LENGTH).double()
    q, k, v = grouped.to_qkv.weight.unflatten(0, (8, 4)).split((4, 2, 2))
    weights = {name: weight for name, weight in grouped.state_dict().items() if name != 'to_qkv.weight'}
    plain.load_state_dict({**weights, 'to_qkv.weight': torch.cat((q, k, k, v, v)).flatten(0, 1)})
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    torch.testing.assert_close(grouped(x)[0], plain(x)[0])


def test_counts_of_a_state_stay_integers_in_another_dtype() -> None:
    model = build(in_model(CASES['lsh']))
    _, state = model(torch.randint(0, 11, (2, 20)), return_state=True)
    moved = state.to(torch.float32)
    kinds = {t.dtype for t in moved.tensors()}
    assert kinds == {torch.float32, torch.int64}
    assert state.to(torch.float64) is state


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(mixer='mamba'), 'mixer must be one of attention, lsh, gateloop, simple-gateloop, s4d, h3, hyena, or a'),
        (dict(mixer=nn.Identity()), 'or a class of modules, got Identity() for hierarchy 1'),
        (dict(mixer=('attention', 's4d')), 'mixer must be one value or one for each of the 3 hierarchies'),
        (dict(mixer=('attention', ['s4d'], 's4d')), "or a class of modules, got ['s4d'] for hierarchy 8"),
        (dict(mixer_kwargs=dict(bogus=2), window_sizes=0), "stride, summary for mixer Attention, got 'bogus'"),
        (dict(mixer_kwargs=3), 'mixer_kwargs must be a dict or None, got 3 for hierarchy 1'),
        (dict(mixer='s4d', mixer_kwargs=dict(order=2)), 'of hierarchy 1 must be of state_dim, init, fft for mixer S4D'),
        (dict(mixer='hyena', mixer_kwargs=dict(length=2)), "short, filter_dim, fft for mixer Hyena, got 'length'"),
        (dict(mixer='simple-gateloop', mixer_kwargs=dict(a=1)), "must be of none for mixer SimpleGateLoop, got 'a'"),
        (dict(mixer_kwargs=dict(kv_heads=3)), 'kv_heads must divide the 4 heads, got 3'),
        (dict(mixer_kwargs=dict(kv_heads=0)), 'kv_heads must be an integer of at least 1, got 0'),
        (dict(mixer_kwargs=dict(pattern='dense')), "pattern must be one of strided, fixed, got 'dense'"),
        (dict(mixer_kwargs=dict(stride=4)), 'pattern_mode, stride and summary are for a pattern, and pattern is'),
        (dict(mixer_kwargs=dict(pattern='strided', stride=0)), 'stride must be an integer of at least 1, got 0'),
        (dict(mixer_kwargs=dict(pattern='strided', summary=1)), "summary is for pattern = 'fixed', got 1 for"),
        (dict(mixer_kwargs=dict(pattern='fixed', stride=4, summary=5)), 'summary must be at most the stride of 4'),
        (dict(mixer_kwargs=dict(pattern='fixed', pattern_mode='both')), 'pattern_mode must be one of interleave'),
        (
            dict(mixer_kwargs=dict(pattern='fixed', pattern_mode='heads', kv_heads=1)),
            "pattern_mode = 'heads' needs two heads or more (kv_heads), got 1",
        ),
        (
            dict(mixer_kwargs=dict(pattern='fixed'), window_sizes=3),
            'pattern is for full attention, and window_sizes is 3',
        ),
        (dict(mixer='lsh', mixer_kwargs=dict(buckets=3)), 'buckets must be even (directions and their opposites)'),
        (dict(mixer='lsh', dim_head=3), 'dim_head must be even (rotary embeddings turn pairs of channels), got 3'),
        (dict(mixer='gateloop', mixer_kwargs=dict(state_heads=5)), 'state_heads must divide dim 8, got 5'),
        (dict(mixer='s4d', mixer_kwargs=dict(state_dim=5)), 'state_dim must be even (complex numbers come in pairs)'),
        (dict(mixer='s4d', mixer_kwargs=dict(init='legs')), "init must be one of lin, inv, got 'legs'"),
        (dict(mixer='h3', mixer_kwargs=dict(fft='learned')), "fft must be one of torch, monarch, got 'learned'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)  # fmt: skip
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HierarchicalTransformer(**{**BASE, **arguments})
