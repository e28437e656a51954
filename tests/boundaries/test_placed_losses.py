"""Losses of placed levels: definitions, shares of batches, and rows that do not change each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.configs import build
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import RunStarts
from simple_hierarchical_transformer.mixers import MIXERS

LOSSES: dict[str, Any] = dict(
    num_tokens=256, dim=8, depth=(2, 2, 1), seq_len=64, dim_head=4, heads=2, arrangement='hourglass',
    hierarchies=(1, 4, 16), window_sizes=(6, 5, None), ignore_index=-1, recon_ignore_index=-1,
    recon_loss_weight=0.1, prophet_loss_weight=0.2, quantized_loss_weight=0.3, quantizer_codebooks=2,
    quantizer_codebook_size=7, quantizer_dim=3, num_rollouts=2, next_latent_loss_weight=0.25,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    'words': dict(LOSSES, boundaries=(None, 'words', 'sentences')),
    'learned': dict(LOSSES, boundaries=(None, 'learned', 'learned'), upsample='smooth', merge='skip'),
    'surprise': dict(LOSSES, boundaries=(None, 'surprise', 'rise'), quantize_from='output', detach_summaries=False),
}
TEXT = b'The old king sees a fox. It hears us! Who was it, then?\nNobody knows; 12 did.  '


def texts(rows: int, n: int = 50) -> Tensor:
    """Rows of a text, of letters alone, of spaces alone."""
    of = [TEXT, b'a', b' ', b'x, ', TEXT[::-1]]
    return torch.tensor([list((of[r % 5] * n)[:n]) for r in range(rows)])


@pytest.mark.parametrize('kind', CASES)
def test_losses_equal_their_definitions(kind: str) -> None:
    """Sums over tokens, divided by the intended number of tokens: one for each `compression` ids with a label."""
    model, ids = build(CASES[kind]), texts(4)
    # some ids do not count
    ids[0, 9:12] = model.ignore_index = model.recon_ignore_index = 97
    with torch.no_grad():
        _, parts = model(ids, return_loss=True)
        read, labels = ids[:, :-1], ids[:, 1:]
        found = model.inspect(read)
    counted = (labels != 97).sum().item()
    n = read.shape[1]
    for i, level in list(enumerate(model.levels))[1:]:
        c, key, pieces = level.compression, str(i), found.pieces[i]
        recon = prophet = quantized = torch.zeros((), dtype=torch.float64)
        rollouts = [torch.zeros((), dtype=torch.float64)] * 2
        for r in range(4):
            k = int(pieces.lengths[r])
            at = pieces.positions[r, :k].tolist()
            x, begun = found.tokens[i][r, :k], [0, *(p + 1 for p in at)]
            for j, t in enumerate(at):
                said = model.compressors[i].to_recon(x[j]).view(c, 256).log_softmax(-1)
                for back in range(c):
                    if t - back >= 0 and read[r, t - back] != 97:
                        recon = recon - said[c - 1 - back, read[r, t - back]] / c
                said = model.to_prophet[key](x[j]).view(c, 256).log_softmax(-1)
                for ahead in range(c):
                    if t + ahead < n and labels[r, t + ahead] != 97:
                        prophet = prophet - said[ahead, labels[r, t + ahead]] / c
                if j + 1 < k and read[r, at[j + 1]] != 97:
                    of = found.inputs if model.quantize_from == 'compressed' else found.tokens
                    codes = model.quantizers[key](of[i][r, j + 1][None])[0]
                    said = model.to_quantized[key](x[j]).view(2, 7).log_softmax(-1)
                    quantized = quantized - (said[0, codes[0]] + said[1, codes[1]]) / 2
            for j in range(k - 2):
                h, before = x[j], 0.0
                for step in (1, 2):
                    t = j + step
                    chunk = found.embeds[r, begun[t] : at[t] + 1].mean(0)
                    h = model.latent_dynamics[key](h, model.chunk_summarizers[key].proj(chunk))
                    element = 0.1 * F.mse_loss(h, x[t]) + 0.9 * (1 - F.cosine_similarity(h, x[t], dim=0))
                    if read[r, at[t]] != 97:
                        rollouts[step - 1] = rollouts[step - 1] + torch.tensor(-before).exp() * element / 2
                    before += element.item()
        for name, total in (
            ('recon', recon),
            ('prophet', prophet),
            ('quantized', quantized),
            ('next_latent', sum(rollouts)),
        ):
            torch.testing.assert_close(
                parts.named[f'{name}/{c}x'], total * c / counted, msg=lambda s, name=name: f'{name}: {s}'
            )
        share = pieces.lengths.sum().item() / read.numel()
        assert parts.named[f'pieces/{c}x'].item() == pytest.approx(share)


@pytest.mark.parametrize('kind', ['surprise'])
def test_the_head_of_surprise_learns_the_next_id_alone(kind: str) -> None:
    model, ids = build(CASES[kind]), texts(4)
    read, labels = ids[:, :-1], ids[:, 1:]
    found = model.inspect(read)
    _, parts = model(ids, return_loss=True)
    for i, level in list(enumerate(model.levels))[1:]:
        rule, pieces = model.boundaries[str(i)], found.pieces[i]
        total = torch.zeros((), dtype=torch.float64)
        for r in range(4):
            finer = (
                range(read.shape[1])
                if i == 1
                else found.pieces[1].positions[r, : int(found.pieces[1].lengths[r])].tolist()
            )
            for j, t in enumerate(finer):
                said = rule.to_logits(rule.norm(pieces.tokens[r, j])).log_softmax(-1)
                total = total - said[labels[r, t]]
        per_token = 1 if i == 1 else 4
        expected = total * per_token / labels.numel()
        torch.testing.assert_close(parts.named[f'surprise/{level.compression}x'], expected)
        head = {id(p) for p in rule.parameters()}
        grads = torch.autograd.grad(
            parts.named[f'surprise/{level.compression}x'],
            list(model.parameters()),
            allow_unused=True,
            retain_graph=True,
        )
        assert {
            id(p) for p, grad in zip(model.parameters(), grads, strict=True) if grad is not None and grad.any()
        } == head


@pytest.mark.parametrize('chunked', [False, True])
@pytest.mark.parametrize('kind', CASES)
def test_shares_of_a_batch_sum_to_its_loss(kind: str, chunked: bool) -> None:
    """Also where a batch has few pieces and another has many."""
    model, ids = build(dict(CASES[kind], ignore_index=97)), texts(5)
    ids[1, 30:] = 97
    state, position = None, 0
    if chunked:
        with torch.no_grad():
            _, state = model(torch.flip(texts(5)[:, :13], [0]), return_state=True)
        position = 13
    counts = model.count_targets(ids, position=position)

    def loss_of(rows: list[int], **counted: Tensor) -> tuple[Tensor, Any]:
        own = None if state is None else state.select(rows)
        return model(ids[rows], return_loss=True, state=own, return_state=chunked, **counted)[:2]

    whole, parts = loss_of([0, 1, 2, 3, 4])
    shares = [loss_of(rows, counts=counts) for rows in ([1], [2, 3], [0, 4])]
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole, rtol=1e-9, atol=1e-9)
    for name, value in parts.named.items():
        total = sum(each.named[name] for _, each in shares)
        torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-9, msg=lambda s, name=name: f'{name}: {s}')
    weights = list(model.parameters())
    ours = torch.autograd.grad(sum(loss for loss, _ in shares), weights)
    torch.testing.assert_close(ours, torch.autograd.grad(whole, weights), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('kind', CASES)
def test_padding_of_a_row_changes_no_loss_of_another(kind: str) -> None:
    """A row of all boundaries beside it pads a row as far as it goes."""
    model, ids = build(CASES[kind]), texts(5)
    counts = model.count_targets(ids[:1])
    alone = model(ids[:1], return_loss=True, counts=counts)[1].named
    for other in range(1, 5):
        both = model(ids[[0, other]], return_loss=True, counts=counts)[1].named
        second = model(ids[[other]], return_loss=True, counts=counts)[1].named
        for name, value in alone.items():
            torch.testing.assert_close(both[name] - second[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', CASES)
def test_a_batch_without_targets_gives_finite_gradients(kind: str) -> None:
    model = build(dict(CASES[kind], ignore_index=97, recon_ignore_index=97))
    loss, _ = model(torch.full((2, 20), 97), return_loss=True)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    'changes',
    [
        {},
        *({'mixer': name, 'window_sizes': None} for name in MIXERS if name != 'attention'),
        {'mixer_kwargs': {'pattern': 'fixed', 'pattern_mode': 'union'}, 'window_sizes': None},
    ],
    ids=str,
)
@pytest.mark.parametrize('kind', CASES)
def test_chunks_train_every_weight(kind: str, changes: dict[str, Any]) -> None:
    """A chunk in the middle of a word has no token of a placed level. DDP still waits for each gradient."""
    model = build({**CASES[kind], **changes})
    with torch.no_grad():
        _, state = model(torch.tensor([list(b'Thequ')] * 2), return_state=True)
    loss, _, state = model(torch.tensor([list(b'ickbr')] * 2), return_loss=True, state=state, return_state=True)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert state.position == 9


def test_chunks_shorter_than_a_stride_have_no_finer_tokens() -> None:
    model = build(
        dict(
            CASES['words'], hierarchies=(1, 4, 16), hierarchical_stride=(1, 4, 1), boundaries=(None, None, 'sentences')
        )
    )
    ids = texts(3)
    whole, state, outs = model(ids), None, []
    for chunk in ids.split([5, 1, 1, 1, 42], dim=1):
        out, state = model(chunk, state=state, return_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-10)


def test_half_precision_trains() -> None:
    for kind, config in CASES.items():
        model = HierarchicalTransformer(**config)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss, _ = model(texts(3), return_loss=True)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), kind
        half = HierarchicalTransformer(**config).bfloat16()
        half(texts(3), return_loss=True)[0].backward()
        with torch.no_grad():
            _, state = half(texts(3), return_state=True)
        assert state.dtype == torch.bfloat16


def test_rows_without_finer_tokens_add_nothing_to_the_ratio() -> None:
    """A chunk in the middle of a word has no token of the word level, which the router above it would judge."""
    model = build(dict(CASES['words'], boundaries=(None, 'words', 'learned')))
    with torch.no_grad():
        _, state = model(torch.tensor([list(b'Thequ')] * 2), return_state=True)
    letters, words = list(b'ickbr'), list(b'i k r')
    none, both = (
        model(torch.tensor(rows), return_loss=True, state=state.clone(), return_state=True)[1].named['ratio/16x']
        for rows in ([letters, letters], [letters, words])
    )
    alone = model(torch.tensor([words]), return_loss=True, state=state.select(1), return_state=True)[1]
    assert none == 0
    torch.testing.assert_close(both, alone.named['ratio/16x'] / 2)


def test_a_rule_in_place_of_surprise_needs_no_head() -> None:
    model = build(CASES['surprise'])
    model.boundaries['1'] = RunStarts(b' ', 256)
    loss, parts = model(texts(3), return_loss=True)
    loss.backward()
    assert parts.named['surprise/4x'] == 0
    assert parts.named['surprise/16x'] > 0


def test_half_precision_does_not_round_the_share_of_tokens() -> None:
    model = HierarchicalTransformer(**dict(CASES['words'], seq_len=1024)).bfloat16()
    ids = texts(2, 1000)
    pieces = model.inspect(ids[:, :-1]).pieces[1]
    share = model(ids, return_loss=True)[1].named['pieces/4x']
    assert share.item() == pytest.approx(pieces.lengths.sum().item() / (2 * 999), rel=1e-6)
