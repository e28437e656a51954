"""Contracts of placed levels on texts: causal, nothing dropped, chunked as whole, rows at different places."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import SMALL, build
from support.placed import read_in_chunks, tokens_by_row
from torch import Tensor

from simple_hierarchical_transformer.mixers import MIXERS

BASE: dict[str, Any] = dict(
    SMALL, num_tokens=256, seq_len=64, arrangement='hourglass', hierarchies=(1, 4), depth=(2, 1),
    window_sizes=(6, None), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip
THREE: dict[str, Any] = dict(BASE, hierarchies=(1, 4, 16), depth=(2, 2, 1), window_sizes=(6, 5, None))
KINDS: dict[str, dict[str, Any]] = {
    'words': dict(BASE, boundaries=(None, 'words'), upsample='offset', downsample='attention'),
    'learned': dict(BASE, boundaries=(None, 'learned'), upsample='smooth', merge='skip'),
    'learned at boundaries': dict(BASE, boundaries=(None, 'learned'), upsample='boundary', downsample='attention'),
    'surprise': dict(BASE, boundaries=(None, 'surprise'), upsample='repeat', merge='attention', merge_window=2),
    'rise': dict(BASE, boundaries=(None, 'rise'), upsample='boundary'),
    'sentences of words': dict(THREE, boundaries=(None, 'words', 'sentences'), upsample='offset', merge='linear'),
    'learned in learned': dict(THREE, boundaries=(None, 'learned', 'learned'), upsample='smooth', merge='skip'),
    'every in surprise': dict(THREE, boundaries=(None, 'surprise', 'every'), downsample='attention'),
    'learned after a stride': dict(
        THREE, hierarchical_stride=(1, 2, 1), boundaries=(None, None, 'learned'), predict_use_all_hierarchy=True,
        upsample=('repeat', 'repeat', 'smooth'),
    ),
}  # fmt: skip
SOFT = [name for name in KINDS if 'learned' in name]
every_kind = pytest.mark.parametrize('kind', KINDS)

TEXTS = [
    b'The king sees. A fox hears us; 3.5 times!  And then\n\n he left, ',
    b' . , ! ? - ; : ( ) \n \t . , ! ? - ; : ( ) \n \t . , ! ? - ; : (',
    b' ' * 64,
    b'a' * 64,
    'ไม่มีช่องว่างระหว่างคำ東京は夜'.encode()[:64],
    bytes(range(192, 256)),
    b'abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghi. x',
]


def ids_of(*texts: bytes, length: int = 64) -> Tensor:
    """Each text in a row, again and again up to the length."""
    return torch.tensor([list((text * length)[:length]) for text in texts])


@every_kind
def test_no_gradient_reaches_an_earlier_logit(kind: str) -> None:
    """d logit_i / d embedding_j = 0 for j > i, where a backward pass goes through routers and smoothing too."""
    model, ids = build(KINDS[kind]), ids_of(*TEXTS[:2])[:, :24]
    embeds: list[Tensor] = []
    model.token_emb.register_forward_hook(lambda _, args, out: embeds.append(out.requires_grad_()) or out)
    logits = model(ids)
    reached = []
    for i in range(24):
        (grad,) = torch.autograd.grad(logits[:, i].square().sum(), embeds[0], retain_graph=True)
        assert not grad[:, i + 1 :].any()
        assert grad[:, i].any(dim=-1).all()
        reached.append(grad[:, : i + 1].any(dim=-1).sum().item())
    # a coarse level without a window passes on early tokens
    assert reached[-1] > 20


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('kind', SOFT)
def test_soft_boundaries_ignore_later_bytes(kind: str, grad: bool) -> None:
    model, ids = build(KINDS[kind]), ids_of(*TEXTS[:3])
    with torch.set_grad_enabled(grad):
        before = model(ids)
        for at in (1, 2, 17, 40, 63):
            for byte in (0, 32, 97, 255):
                changed = ids.clone()
                changed[:, at:] = byte
                torch.testing.assert_close(model(changed)[:, :at], before[:, :at], rtol=0, atol=1e-12)


@every_kind
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    """Rows of all boundaries, of none and of some, in one batch: nothing is dropped, and padding changes nothing."""
    model, ids = build(KINDS[kind]), ids_of(*TEXTS)
    with torch.no_grad():
        read = model.inspect(ids)
        together = tokens_by_row(read)
        for r in range(len(ids)):
            alone = model.inspect(ids[r : r + 1])
            torch.testing.assert_close(alone.features[0], read.features[r], rtol=0, atol=1e-12)
            for level, mine in zip(together, tokens_by_row(alone), strict=True):
                torch.testing.assert_close(level[r], mine[0], rtol=0, atol=1e-12)
        for pieces in read.pieces.values():
            assert torch.equal(pieces.lengths, pieces.boundary.sum(1))
            assert pieces.boundary[:, 0].all()


def test_the_number_of_tokens_is_that_of_boundaries() -> None:
    model = build({**KINDS['words'], 'max_piece': 512})
    with torch.no_grad():
        pieces = model.inspect(ids_of(*TEXTS)).pieces[1]
    # all letters, all spaces, and letters and spaces in turn
    assert pieces.lengths[3] == pieces.lengths[2] == 1
    with torch.no_grad():
        assert model.inspect(ids_of(b'a ')).pieces[1].lengths.item() == 1 + 32


@every_kind
@settings(max_examples=5)
@given(
    rows=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    grad=st.booleans(),
)
def test_chunks_of_texts_equal_one_pass(kind: str, rows: list[bytes], sizes: list[int], grad: bool) -> None:
    model, ids = build(KINDS[kind]), ids_of(*rows)
    sizes = sizes * 64
    cut, total = [], 0
    for size in sizes:
        cut.append(min(size, 64 - total))
        total += cut[-1]
        if total == 64:
            break
    with torch.set_grad_enabled(grad):
        read = model.inspect(ids)
        logits, levels = read_in_chunks(model, ids, cut)
    torch.testing.assert_close(logits, model.to_logits(read.features), rtol=0, atol=1e-10)
    torch.testing.assert_close(levels, tokens_by_row(read), rtol=0, atol=1e-10)


@pytest.mark.parametrize('mixer', [*MIXERS])
def test_every_mixer_reads_rows_at_different_places(mixer: str) -> None:
    model = build(dict(KINDS['learned in learned'], mixer=mixer, window_sizes=None, depth=1))
    ids = ids_of(*TEXTS[:5])[:, :50]
    with torch.no_grad():
        whole = model(ids)
        for sizes in ([1] * 7 + [20, 23], [11, 39]):
            chunked, _ = read_in_chunks(model, ids, sizes)
            torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)
        changed = ids.clone()
        changed[:, 30:] = 46
        torch.testing.assert_close(model(changed)[:, :30], whole[:, :30], rtol=0, atol=1e-12)
        alone = model(ids[3:4])
        torch.testing.assert_close(whole[3:4], alone, rtol=0, atol=1e-10)


@every_kind
def test_gradients_flow_through_chunks(kind: str) -> None:
    config = dict(KINDS[kind], recon_loss_weight=0.0, next_latent_loss_weight=0.0)
    model, ids = build(config), ids_of(*TEXTS[:4])[:, :40]
    weights = [p for p in model.parameters() if p.requires_grad]
    target = torch.randn(4, 40, 256, dtype=torch.float64)
    whole = torch.autograd.grad((model(ids) * target).sum(), weights, allow_unused=True)
    logits, _ = read_in_chunks(model, ids, [3, 1, 16, 20])
    chunked = torch.autograd.grad((logits * target).sum(), weights, allow_unused=True)
    for x, y in zip(chunked, whole, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@every_kind
def test_states_are_copied_selected_and_moved(kind: str) -> None:
    model, ids = build(KINDS[kind]), ids_of(*TEXTS[:4])
    with torch.no_grad():
        whole, _ = model(ids, return_state=True)
        _, state = model(ids[:, :21], return_state=True)
        copies = {
            'clone': state.clone(),
            'deepcopy': copy.deepcopy(state),
            'pickle': pickle.loads(pickle.dumps(state)),
            'to': state.to(torch.float32).to(torch.float64),
            'detach': state.clone().detach(),
        }
        chosen = state.select([3, 0, 0])
        assert chosen.nbytes * 4 == state.nbytes * 3
        assert state.nbytes == sum(t.nbytes for t in state.tensors())
        integers = {t.dtype for t in state.to(torch.float32).tensors()}
        assert integers == {torch.float32, torch.int64, torch.bool}
        # reading on changes no copy
        model(torch.flip(ids[:, 21:], [1]), state=state, return_state=True)
        for name, each in copies.items():
            out, after = model(ids[:, 21:], state=each, return_state=True)
            atol = 1e-4 if name == 'to' else 1e-10
            if name != 'to' or 'surprise' not in kind:
                torch.testing.assert_close(out, whole[:, 21:], rtol=0, atol=atol)
            assert after.position == 64
        out, _ = model(ids[[3, 0, 0], 21:], state=chosen, return_state=True)
        torch.testing.assert_close(out, whole[[3, 0, 0], 21:], rtol=0, atol=1e-10)
        for level in copies['clone'].placed:
            assert level is None or level.count.shape == (4,)


@every_kind
def test_memory_of_an_endless_stream_is_bounded(kind: str) -> None:
    """With windows at all levels, a state stops growing."""
    model = build(dict(KINDS[kind], window_sizes=5))
    ids, sizes = ids_of(TEXTS[0], TEXTS[1], TEXTS[3], length=256), []
    with torch.no_grad():
        state = None
        for chunk in ids.split(32, dim=1):
            _, state = model(chunk, state=state, return_state=True)
            sizes.append(state.nbytes)
    assert len(set(sizes[2:])) == 1


@every_kind
def test_greedy_texts_are_those_without_a_state(kind: str) -> None:
    """Prompts of unequal lengths, whose rows meet boundaries at different steps."""
    model = build(KINDS[kind]).eval()
    prompts = [b'The king ', b'a', b' . , ', b'abcdefghijklmnopqrstuvw']
    cached = model.generate(prompts, 30, temperature=0)
    assert cached == model.generate(prompts, 30, temperature=0, use_cache=False)
    for prompt, text in zip(prompts, cached, strict=True):
        assert model.generate(prompt, 30, temperature=0) == text


@pytest.mark.parametrize('kind', ['words', 'learned', 'every in surprise'])
def test_a_prompt_in_parts_goes_on_from_a_state(kind: str) -> None:
    model, ids = build(KINDS[kind]).eval(), ids_of(*TEXTS[:3])
    new, state = model.generate(ids[:, :20], 8, temperature=0, return_state=True)
    read = torch.cat((ids[:, :20], new, ids[:, 30:35]), dim=1)
    more = model.generate(read[:, state.position :], 8, temperature=0, state=state)
    assert torch.equal(more, model.generate(read, 8, temperature=0, use_cache=False))


@pytest.mark.parametrize('kind', ['words', 'learned', 'surprise', 'sentences of words'])
def test_scores_in_chunks_are_those_of_one_pass(kind: str) -> None:
    model, ids = build(KINDS[kind]).eval(), ids_of(*TEXTS[:3])
    assert model.score(ids, chunk_size=7) == pytest.approx(model.score(ids), abs=1e-10)


def test_ten_thousand_equal_bytes() -> None:
    for kind in ('words', 'learned', 'surprise', 'learned in learned'):
        model = build(dict(KINDS[kind], window_sizes=8))
        for byte in (32, 97):
            ids = torch.full((1, 10_000), byte)
            with torch.no_grad():
                logits, state = model(ids, return_state=True)
            assert logits.isfinite().all()
            assert state.position == 10_000


@every_kind
def test_ablations_and_contributions_cover_placed_levels(kind: str) -> None:
    model, ids = build(KINDS[kind]).eval(), ids_of(*TEXTS[:3])
    with torch.no_grad():
        logits, contributions = model(ids, return_contributions=True)
        torch.testing.assert_close(logits, model(ids))
        assert len(contributions) == len(model.levels) - 1
        for each in contributions:
            for c, norms in each.norms.items() if hasattr(each, 'norms') else ():
                assert norms.shape[-1] == 2, c
        with model.ablate(model.levels[-1].compression):
            ablated = model(ids)
            chunked, _ = read_in_chunks(model, ids, [10, 1, 53])
        assert not torch.equal(ablated, logits)
        torch.testing.assert_close(chunked, ablated, rtol=0, atol=1e-10)
        assert model(ids, ablate_hierarchical_merge=True).isfinite().all()
