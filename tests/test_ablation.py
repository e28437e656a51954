"""`ablate` makes merges and predictions ignore levels."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.configs import UNEVEN, build
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.mark.parametrize(
    'option', [dict(merge_into='all'), dict(merge='attention'), dict(arrangement='hourglass')], ids=str
)
def test_an_ablated_level_does_not_affect_the_outputs(option: dict[str, Any]) -> None:
    config = {**UNEVEN, **option}
    model, ids = build(config), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8) as silent:
        assert silent is model
        without = model(ids)
        with model.ablate(4):
            alone = model(ids)
        assert torch.equal(model(ids), without)
    assert torch.equal(model(ids), plain)
    assert len({tuple(x.flatten().tolist()) for x in (plain, without, alone)}) == 3

    # the outputs do not depend on the weights of the ablated level
    with torch.no_grad():
        for part, level in model.by_level():
            if level == 1:
                for parameter in part.parameters():
                    parameter.mul_(2)
    assert not torch.equal(model(ids), plain)
    with model.ablate(8):
        torch.testing.assert_close(model(ids), without)


class Columns(nn.Module):
    """Keeps some columns of the input of a module and zeroes the rest."""

    def __init__(self, columns: Tensor, module: nn.Module) -> None:
        super().__init__()
        self.columns, self.module = columns, module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * self.columns)


def test_ablation_zeroes_the_columns_of_the_level() -> None:
    config = dict(UNEVEN, predict_use_all_hierarchy=True, merge_into='all')
    model, ids = build(config), torch.randint(0, 11, (2, 20))
    with model.ablate(8):
        silent = model(ids)
        state, chunks = None, []
        for chunk in ids.split([3, 6, 11], dim=1):
            out, state = model(chunk, return_state=True, state=state)
            chunks.append(out)
        torch.testing.assert_close(torch.cat(chunks, dim=1), silent)
    with torch.no_grad():
        model.to_logits.weight[:, 8:20] = 0
    columns = (torch.arange(28) < 8) | (torch.arange(28) >= 20)
    for merge in model.hierarchical_merges:
        merge.net[0] = Columns(columns, merge.net[0])
    torch.testing.assert_close(model(ids), silent)


@pytest.mark.slow
def test_a_compiled_model_respects_ablation() -> None:
    model, ids = build(UNEVEN), torch.randint(0, 11, (2, 20))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager')
    for _ in range(2):
        torch.testing.assert_close(compiled(ids), model(ids))
        with model.ablate(8):
            torch.testing.assert_close(compiled(ids), model(ids))


def test_ablation_affects_its_own_thread_only() -> None:
    model, ids = build(UNEVEN), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8):
        silent = model(ids)

    with ThreadPoolExecutor(1) as pool:
        other = model.ablate(8)
        with model.ablate(4):
            assert torch.equal(pool.submit(model, ids).result(), plain)
            # the other thread enters its ablation within this one and leaves it later
            pool.submit(other.__enter__).result()
            assert torch.equal(pool.submit(model, ids).result(), silent)
        assert torch.equal(model(ids), plain)
        pool.submit(other.__exit__, None, None, None).result()
        assert torch.equal(pool.submit(model, ids).result(), plain)
    assert torch.equal(model(ids), plain)
    assert not model.silent


def test_ablations_end_in_any_order() -> None:
    model, ids = build(UNEVEN), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8):
        silent = model(ids)
    first, second, again = model.ablate(4), model.ablate(8), model.ablate(8)
    for each in (first, second, again):
        each.__enter__()
    for each in (first, second):
        each.__exit__(None, None, None)
        # of two equal ablations, one is still active
        assert torch.equal(model(ids), silent)
    again.__exit__(None, None, None)
    assert torch.equal(model(ids), plain)


def test_a_copy_made_during_an_ablation_uses_all_levels() -> None:
    model, ids = build(UNEVEN), torch.randint(0, 11, (2, 20))
    plain = model(ids)
    with model.ablate(8):
        copies = [deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(copy(ids), plain) for copy in copies)


def test_a_replica_of_another_thread_keeps_the_ablation() -> None:
    """The replica is made as nn.DataParallel makes it."""
    model, ids = build(UNEVEN), torch.randint(0, 11, (2, 20))
    with model.ablate(8), ThreadPoolExecutor(1) as pool:
        silent, replica = model(ids), model._replicate_for_data_parallel()
        replica._parameters, replica._modules = model._parameters, model._modules
        assert torch.equal(pool.submit(replica, ids).result(), silent)


def test_ablating_a_level_of_an_hourglass_ablates_those_inside() -> None:
    model = build(dict(UNEVEN, arrangement='hourglass', predict_use_all_hierarchy=True))
    ids = torch.randint(0, 11, (2, 20))
    with model.ablate(4):
        without = model(ids)
    with model.ablate(4, 8):
        assert torch.equal(model(ids), without)
    with pytest.raises(ValueError, match='ablate must leave a level to predict'), model.ablate(1):
        pass


def test_ablation_refuses_bad_hierarchies() -> None:
    model = HierarchicalTransformer(**UNEVEN)
    for hierarchies, message in (
        ((2,), r'ablate takes one or more of hierarchies \[1, 8, 4\], got \(2,\)'),
        ((), 'got '),
        ((1,), 'ablate must leave a level to predict'),
    ):
        with pytest.raises(ValueError, match=message), model.ablate(*hierarchies):
            pass
    assert not model.silent
