"""`score` against the cross entropy of one pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.configs import THREE, build

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.mark.parametrize('chunk_size', [None, 1, 7, 1000])
def test_score_is_the_cross_entropy_in_bits(chunk_size: int | None) -> None:
    model, ids = build(dict(THREE, num_tokens=256, ignore_index=-1)), torch.randint(0, 256, (40,))
    logits = model(ids[None, :-1])[0]
    nats = F.cross_entropy(logits, ids[1:])
    bits, log_probs = model.score(ids, chunk_size=chunk_size, return_log_probs=True)
    assert bits == pytest.approx(nats.item() / torch.tensor(2.0).log().item(), rel=1e-6)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    assert model.score(bytes(ids.tolist()), chunk_size=chunk_size) == bits
    assert model.score(ids.expand(3, -1), chunk_size=chunk_size) == pytest.approx(bits)


def test_score_beyond_seq_len_uses_all_of_the_state() -> None:
    model, ids = build(THREE), torch.randint(1, 11, (1, 500))
    with torch.no_grad():
        logits, _ = model(ids[:, :-1], return_state=True)
    expected = F.cross_entropy(logits[0], ids[0, 1:]).item() / torch.tensor(2.0).log().item()
    assert model.score(ids) == pytest.approx(expected, rel=1e-6)


def test_score_skips_ignored_ids() -> None:
    model, ids = build(THREE), torch.randint(1, 11, (30,))
    ids[10:20] = 0
    bits, log_probs = model.score(ids, return_log_probs=True)
    kept = log_probs[ids[1:] != 0]
    assert bits == pytest.approx(-kept.mean().item() / torch.tensor(2.0).log().item())


def test_score_refuses() -> None:
    model = HierarchicalTransformer(**THREE)
    for ids, arguments, message in (
        (b'', {}, 'ids must hold at least one token'),
        (torch.zeros(1, dtype=torch.long), {}, 'ids must have at least 2 tokens'),
        (torch.zeros(5, dtype=torch.long), {}, 'ids must hold more than ignore_index = 0'),
        (b'text', {}, r'ids must be in \[0, 11\), got values from 101 to 116'),
        (torch.ones(5, dtype=torch.long), dict(chunk_size=0), 'chunk_size must be an integer of at least 1, got 0'),
    ):
        with pytest.raises(ValueError, match=message):
            model.score(ids, **arguments)
