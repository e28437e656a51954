"""Tables that are updated by rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import SEQ_LEN
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import optim

SMALL: dict[str, Any] = dict(
    num_tokens=11, dim=8, depth=2, seq_len=SEQ_LEN, dim_head=4, heads=2, ignore_index=-1, recon_ignore_index=-1
)


@pytest.mark.parametrize('sparse', [False, True])
def test_only_rows_that_were_read_move_and_by_the_formula(sparse: bool) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3, sparse=sparse)
    expected, squares = table.weight.detach().clone(), torch.zeros(6)
    optimizer = optim.MixedOptimizer([dict(params=[table.weight], rule='rows')], lr=0.1, betas=(0.9, 0.8))
    for ids in ([1, 4, 1], [4], [0, 1]):
        target = torch.randn(len(ids), 3)
        (table(torch.tensor(ids)) * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for row in set(ids):
            gradient = sum(each for each, i in zip(target, ids, strict=True) if i == row)
            squares[row] = 0.8 * squares[row] + 0.2 * gradient.square().mean()
            expected[row] -= 0.1 * gradient / squares[row].sqrt()
    torch.testing.assert_close(table.weight.detach(), expected)


def test_sparse_gradients_train_as_dense_ones_do() -> None:
    def trained(sparse: bool) -> tuple[dict[str, Tensor], bool]:
        torch.manual_seed(0)
        model = HierarchicalTransformer(**SMALL, ngrams=(2, 3), ngram_rows=32, hierarchies=(1, 4)).double()
        optimizer = optim.build_optimizer(model, 'muon', lr=1e-2, table_lr=3e-2, weight_decay=0.1, sparse=sparse)
        for step in range(4):
            ids = torch.randint(0, 11, (2, 20), generator=torch.Generator().manual_seed(step))
            # ids before ignored targets are read, with a gradient of zero
            labels = ids.masked_fill(torch.arange(20) > 12, -1)
            model(ids, return_loss=True, labels=labels)[0].backward()
            assert model.ngram_emb is not None
            grad = model.ngram_emb.weight.grad
            assert grad is not None
            was_sparse = grad.is_sparse
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict(), was_sparse

    (a, first), (b, second) = trained(True), trained(False)
    assert first
    assert not second
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name])


def test_tables_have_a_learning_rate_of_their_own() -> None:
    model = HierarchicalTransformer(**SMALL, ngrams=(2,), ngram_rows=32)
    optimizer = optim.build_optimizer(model, 'muon', lr=1e-2, table_lr=5e-2, weight_decay=0.1)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: (g['lr'], g['scale'], g['rule']) for g in optimizer.param_groups for p in g['params']}
    assert rates.keys() == set(names.values())
    for name, (lr, scale, rule) in rates.items():
        table = name in ('token_emb.weight', 'to_logits.weight', 'ngram_emb.weight')
        assert (lr, scale) == ((5e-2, 5.0) if table else (1e-2, 1.0))
        assert (rule == 'rows') == (name == 'ngram_emb.weight')


def test_tables_train_with_any_optimizer() -> None:
    model = HierarchicalTransformer(**SMALL, ngrams=(2,), ngram_rows=32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(0, 11, (2, 20)), return_loss=True)[0].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_unknown_rules_and_rows_of_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="rule must be one of adamw, muon, rows, got 'sgd'"):
        optim.MixedOptimizer([dict(params=[nn.Parameter(torch.zeros(2, 2))], rule='sgd')], lr=1.0)
    with pytest.raises(ValueError, match=r'rows is for tables, got parameters of shape \(3,\)'):
        optim.MixedOptimizer([dict(params=[nn.Parameter(torch.zeros(3))], rule='rows')], lr=1.0)
