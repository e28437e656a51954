"""Roles of weights: in wrapped models, of adapters, and in modules from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.roles import walk


def roles_by_name(model: nn.Module) -> dict[str, str]:
    names = {p: name for name, p in model.named_parameters()}
    found: dict[str, str] = {}
    for visit in walk(model):
        for weight in visit.weights:
            found.setdefault(names[weight.parameter], weight.role)
    assert set(found) == set(names.values())
    return found


MIXED: dict[str, Any] = dict(
    num_tokens=11, dim=8, depth=1, seq_len=16, dim_head=4, heads=2, hierarchies=(1, 2), ngrams=(2,), ngram_rows=16,
    recall=(2,), mixer='hyena',
)  # fmt: skip


def compile_whole(model: Any) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def compile_parts(model: Any) -> nn.Module:
    model.token_emb, model.ngram_emb = torch.compile(model.token_emb), torch.compile(model.ngram_emb)
    model.layers[0][0].attn = torch.compile(model.layers[0][0].attn)
    return model


def subclass_parts(model: nn.Module) -> nn.Module:
    """As FSDP2 does."""
    for module in model.modules():
        module.__class__ = type(f'FSDP{type(module).__name__}', (type(module),), {})
    return model


@pytest.mark.parametrize('wrap', [compile_whole, compile_parts, subclass_parts])
def test_wrappers_change_no_role_and_no_cost(wrap: Any) -> None:
    model = HierarchicalTransformer(**MIXED)
    roles, operations = roles_by_name(model), cost.step_flops(model, 16)
    assert len(set(roles.values())) == 6
    wrapped = wrap(model)
    assert {key.replace('_orig_mod.', ''): role for key, role in roles_by_name(wrapped).items()} == roles
    assert cost.step_flops(wrapped, 16) == operations


def test_adapters_have_the_role_of_what_they_adapt() -> None:
    config = peft.LoraConfig(r=2, target_modules=['token_emb', 'to_in', 'to_filters', 'to_logits'])
    roles = roles_by_name(peft.get_peft_model(HierarchicalTransformer(**MIXED), config))  # type: ignore[arg-type]
    for part, role in (('token_emb', 'lookup'), ('to_in', 'matrix'), ('to_filters', 'kernel'), ('to_logits', 'head')):
        found = [each for key, each in roles.items() if f'{part}.lora_' in key]
        assert found
        assert set(found) == {role}


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrized_weights_keep_their_role() -> None:
    model: Any = HierarchicalTransformer(**MIXED)
    for module, name in (
        (model.token_emb, 'weight'), (model.recall_emb, 'weight'), (model.layers[0][0].attn.short_conv, 'kernel'),
    ):  # fmt: skip
        parametrize.register_parametrization(module, name, Twice())
    found = {key: role for key, role in roles_by_name(model).items() if 'parametrizations' in key}
    assert list(found.values()) == ['lookup', 'lookup', 'kernel']


class Foreign(nn.Module):
    """A module without declarations, around one with some."""

    roles = 'of another kind'

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.in_proj_bias = nn.Parameter(torch.zeros(3, 4))
        self.gain = nn.Parameter(torch.zeros(4))
        self.inner = Declared()


class Declared(nn.Module):
    roles: ClassVar[dict[str, str]] = dict(table='lookup', inner='kernel', own='head')

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 4))
        self.inner = nn.Sequential(nn.Linear(4, 4), Closer())
        self.own = nn.Linear(4, 3)

    def token_counts(self, n: float) -> Iterator[tuple[nn.Module, float]]:
        yield self.own, n / 2

    def operations(self, n: float) -> float:
        return 100 * n


class Closer(nn.Module):
    roles: ClassVar[dict[str, str]] = dict(weight='matrix')

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 6))


def test_the_closest_declaration_wins_and_without_one_shapes_tell() -> None:
    assert roles_by_name(Foreign()) == {
        'weight': 'matrix',
        'in_proj_bias': 'vector',
        'gain': 'vector',
        'inner.table': 'lookup',
        'inner.inner.0.weight': 'kernel',
        'inner.inner.0.bias': 'kernel',
        'inner.inner.1.weight': 'matrix',
        'inner.own.weight': 'head',
        'inner.own.bias': 'vector',
    }
    assert cost.step_flops(Foreign(), 8) == 3 * (2 * 8 * (12 + 30) + 2 * 4 * 12 + 800)


def test_a_role_that_does_not_exist_is_refused() -> None:
    class Wrong(nn.Module):
        roles: ClassVar[dict[str, str]] = dict(weight='tabel')

    with pytest.raises(ValueError, match=r"Wrong.roles\['weight'\] must be one of matrix, vector, .*, got 'tabel'"):
        list(walk(Wrong()))
