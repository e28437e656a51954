"""One state mechanism: chunks of any lengths give what one pass gives, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQ_LEN, Golden, build, configs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer import memory as state_module
from simple_hierarchical_transformer.block import phase_groups
from simple_hierarchical_transformer.memory import State, room_for
from simple_hierarchical_transformer.mixers import Attention
from simple_hierarchical_transformer.mixers.rotary import BLOCK, Rotary

SMALL: dict[str, Any] = dict(num_tokens=11, dim=8, depth=2, seq_len=SEQ_LEN, dim_head=4, heads=2)
THREE: dict[str, Any] = dict(SMALL, hierarchies=(1, 2, 8), hierarchical_stride=(1, 1, 4), window_sizes=(4, None, 3))
STRIDED: dict[str, Any] = dict(SMALL, hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=(4, None))

SPLITS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def in_chunks(model: HierarchicalTransformer, ids: Tensor, splits: list[int]) -> tuple[Tensor, State]:
    outs, state, at, turn = [], None, 0, 0
    while at < ids.shape[1]:
        chunk = ids[:, at : at + splits[turn % len(splits)]]
        out, state = model(chunk, state=state, return_state=True)
        outs.append(out)
        at, turn = at + chunk.shape[1], turn + 1
        assert state.position == at
    return torch.cat(outs, dim=1), state


@given(config=configs(), n=st.integers(1, SEQ_LEN), splits=SPLITS, grad=st.booleans())
@example(config=THREE, n=SEQ_LEN, splits=[1], grad=False)
@example(config=STRIDED, n=SEQ_LEN, splits=[3, 1, 7], grad=True)
def test_chunks_equal_one_pass(config: dict[str, Any], n: int, splits: list[int], grad: bool) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, n))
    with torch.set_grad_enabled(grad):
        chunked, _ = in_chunks(model, ids, splits)
        torch.testing.assert_close(chunked, model(ids), rtol=0, atol=1e-10)


@given(config=configs(), n=st.integers(SEQ_LEN, 5 * SEQ_LEN), splits=SPLITS)
def test_chunks_equal_one_pass_beyond_seq_len(config: dict[str, Any], n: int, splits: list[int]) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, n))
    with torch.no_grad():
        chunked, state = in_chunks(model, ids, splits)
        whole, again = model(ids, return_state=True)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)
    assert state.nbytes == again.nbytes


def test_windowed_levels_beyond_seq_len_equal_a_longer_model() -> None:
    """What no state was ever used for: the same weights, with a seq_len that holds all."""
    config = dict(THREE, window_sizes=(4, 3, 2))
    ids = torch.randint(0, 11, (2, 150))
    with torch.no_grad():
        chunked, _ = in_chunks(build(config), ids, [7, 1, 20])
        longer = build(dict(config, seq_len=150))(ids)
    torch.testing.assert_close(chunked, longer, rtol=0, atol=1e-10)


@pytest.mark.parametrize('chunk', [1, 7, 64, 200])
def test_full_attention_with_a_state_reaches_back_that_far(chunk: int) -> None:
    """Against a softmax under a band mask, with rotary embeddings of the library whose conventions they keep."""
    n, reach = 200, 32
    attn = Attention(dim=12, dim_head=8, heads=2, length=reach).double()
    x = torch.randn(2, n, 12, dtype=torch.float64)

    q, k, v = (t.view(2, n, 2, 8).transpose(1, 2) for t in attn.to_qkv(attn.norm(x)).chunk(3, dim=-1))
    q, k = RotaryEmbedding(8, use_xpos=True).double().rotate_queries_and_keys(q, k)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = (q @ k.mT / 8**0.5).masked_fill((distance < 0) | (distance > reach), -torch.inf)
    expected = attn.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    cache = attn.initial_state(2, x)
    outs = []
    with torch.no_grad():
        for at in range(0, n, chunk):
            out, cache = attn(x[:, at : at + chunk], cache, at)
            outs.append(out)
    # that library keeps the base of xPos in float32
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize('step', [1, 100])
def test_xpos_moves_on_with_the_text(step: int) -> None:
    """Across many blocks of positions the cached keys mean what they meant, and no factor leaves its range."""
    window = 50
    model = HierarchicalTransformer(num_tokens=11, dim=8, depth=1, seq_len=window, dim_head=4, heads=2).double()
    ids = torch.randint(0, 11, (1, 60))
    with torch.no_grad():
        _, state = model(ids, return_state=True)
        near, _ = in_chunks(model, ids, [60])

        # the same text around the end of a far block: only distances count
        far_state = model.initial_state(1)
        for position in (BLOCK - 30, 1_000_000 // BLOCK * BLOCK - 30):
            far_state = type(state)(**{**vars(model.initial_state(1)), 'position': position})
            outs = []
            for at in range(0, 60, step):
                out, far_state = model(ids[:, at : at + step], state=far_state, return_state=True)
                outs.append(out)
            far = torch.cat(outs, dim=1)
            assert far.isfinite().all()
            # zeros in the cache stand for tokens before, which attention at position 0 would not see
            torch.testing.assert_close(far[:, -5:], near[:, -5:], rtol=0, atol=1e-6)


@pytest.mark.parametrize('splits', [[BLOCK - 40, 100], [BLOCK - 1, 1, 1, 90], [BLOCK + 110], [700]])
@pytest.mark.parametrize('grad', [False, True])
def test_chunks_equal_one_pass_across_blocks_of_xpos(splits: list[int], grad: bool) -> None:
    model = build(dict(SMALL, depth=1, dim=4, seq_len=3000))
    ids = torch.randint(0, 11, (1, BLOCK + 110))
    with torch.set_grad_enabled(grad):
        chunked, _ = in_chunks(model, ids, splits)
        torch.testing.assert_close(chunked, model(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize(('dtype', 'n'), [(torch.float16, 7000), (torch.float32, 40_000)])
def test_a_long_chunk_stays_finite(dtype: torch.dtype, n: int) -> None:
    attn = Attention(dim=16, dim_head=16, heads=1, length=64).to(dtype)
    x = torch.randn(1, n, 16, dtype=dtype)
    cache = attn.initial_state(1, x)
    with torch.no_grad():
        whole, _ = attn(x, tuple(t.clone() for t in cache))
        _, cache = attn(x[:, :-50], cache)
        last, _ = attn(x[:, -50:], cache, n - 50)
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:, -50:], last, rtol=2e-2, atol=2e-3)


def test_rotary_stays_right_in_relation_at_a_million_positions() -> None:
    qk = torch.randn(2, 1, 1, 20, 64)
    rotary = Rotary(64, pairs='interleaved', xpos=True)
    near_q, near_k = rotary(qk)
    far_q, far_k = rotary.relative_to_block(qk, 1_000_000)
    torch.testing.assert_close(far_q @ far_k.mT, near_q @ near_k.mT, rtol=1e-4, atol=1e-4)


def test_golden_numbers_in_chunks(golden: Golden) -> None:
    model, ids = golden.model(), golden.tensors['ids']
    with torch.no_grad():
        for splits in ([1], [5, 1, 16]):
            logits, _ = in_chunks(model, ids, splits)
            published = golden.tensors['logits'].double()
            assert (logits - published).norm() <= 1e-5 * published.norm()


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 2, 4, 8]))
def test_phase_groups_cover_each_token_once(start: int, length: int, phases: int) -> None:
    seen = []
    groups = list(phase_groups(start, length, phases))
    assert len(groups) <= 3
    for group in groups:
        for i in range(group.width):
            for r in range(group.rounds):
                token = group.token + i + r * phases
                assert (start + token) % phases == group.phase + i
                assert (start + token) // phases == group.start + r
                seen.append(token)
    assert sorted(seen) == list(range(length))


# what a state is


def test_state_size_is_as_promised() -> None:
    model = HierarchicalTransformer(
        num_tokens=11,
        dim=(8, 16, 4),
        depth=3,
        seq_len=100,
        dim_head=4,
        heads=(1, 2, 3),
        hierarchies=(1, 4, 8),
        hierarchical_stride=(1, 2, 8),
        window_sizes=(5, None, 0),
    )
    _, state = model(torch.zeros(7, 3, dtype=torch.long), return_state=True)

    floats = 3 * 16 + 7 * 16  # embeddings before the compressors
    floats += 3 * (2 * 4 + 2 * 6 * 1 * 4)  # window of 5 and the token at hand, two shifts
    floats += 3 * 2 * (2 * 8 + 2 * 26 * 2 * 4)  # two phases, ceil(100 / 4) and the token at hand
    floats += 3 * 2  # no attention: one shift
    floats += 3 * (16 + 4)  # last tokens of the strided levels, for each merge
    assert state.nbytes == 7 * floats * 4
    assert state.batch_size == 7
    assert state.dtype == torch.float32


def test_memory_is_bounded_and_written_in_place() -> None:
    model = build(THREE)
    with torch.no_grad():
        _, state = model(torch.zeros(1, 3, dtype=torch.long), return_state=True)
        size, held = state.nbytes, state.blocks[0][1].mixer[0].data_ptr()
        for n in (1, 40, 1, 200):
            _, state = model(torch.zeros(1, n, dtype=torch.long), state=state, return_state=True)
        assert state.nbytes == size
        assert state.blocks[0][1].mixer[0].data_ptr() == held


@pytest.mark.parametrize('config', [THREE, STRIDED])
def test_clone_branches_and_select_reorders(config: dict[str, Any]) -> None:
    model, ids = build(config), torch.randint(0, 11, (3, 30))
    with torch.no_grad():
        whole, _ = model(ids, return_state=True)
        _, state = model(ids[:, :13], return_state=True)
        branch, other = state.clone(), state.select([2, 0, 0, 1])

        # the first goes another way, and takes nothing with it
        model(torch.randint(0, 11, (3, 9)), state=state, return_state=True)
        torch.testing.assert_close(model(ids[:, 13:], state=branch, return_state=True)[0], whole[:, 13:])
        order = torch.tensor([2, 0, 0, 1])
        torch.testing.assert_close(model(ids[order, 13:], state=other, return_state=True)[0], whole[order, 13:])
        assert other.batch_size == 4


@pytest.mark.parametrize('config', [THREE, STRIDED])
def test_gradients_flow_through_a_state_until_detached(config: dict[str, Any]) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, 40))

    def grads(loss: Tensor) -> list[Tensor]:
        kept = [
            p for name, p in model.named_parameters() if not name.startswith(('latent', 'chunk', 'compressors.1.to'))
        ]
        return [g for g in torch.autograd.grad(loss, kept, allow_unused=True) if g is not None]

    weights = torch.randn(2, 40, 11, dtype=torch.float64)
    whole = grads((model(ids) * weights).sum())
    first, state = model(ids[:, :17], return_state=True)
    kept = state.blocks[0][0].mixer[0].clone()
    second, _ = model(ids[:, 17:], state=state, return_state=True)
    chunked = grads((torch.cat((first, second), dim=1) * weights).sum())
    assert torch.equal(state.blocks[0][0].mixer[0], kept)
    for x, y in zip(whole, chunked, strict=True):
        torch.testing.assert_close(x, y)

    # the second chunk's loss alone trains the first chunk's embeddings only where the state is not detached
    ids = torch.cat((torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)), dim=1)
    for detach in (False, True):
        _, state = model(ids[:, :9], return_state=True)
        out, _ = model(ids[:, 9:], state=state.detach() if detach else state, return_state=True)
        (grad,) = torch.autograd.grad(out.sum(), model.token_emb.weight)
        assert bool(grad[0].any()) != detach


@pytest.mark.parametrize('config', [THREE, STRIDED, dict(STRIDED, hierarchies=(1, 8), hierarchical_stride=(1, 8))])
@pytest.mark.parametrize('split', [1, 3, 16])
def test_losses_of_a_segment(config: dict[str, Any], split: int) -> None:
    """Cross entropy with all that came before; auxiliary losses of the segment alone."""
    config = dict(config, ignore_index=-1)
    model, ids = build(config), torch.randint(0, 11, (2, 33))
    _, whole = model(ids, return_loss=True)
    total, state = 0.0, None
    for at in range(0, 32, split):
        segment = ids[:, at : min(at + split, 32) + 1]
        loss, parts, state = model(segment, state=state, return_loss=True, return_state=True)
        assert loss.isfinite()
        total = total + parts.ce * (segment.shape[1] - 1)
        if at == 0:
            alone, _ = model(segment, return_loss=True)
            torch.testing.assert_close(loss, alone)
        loss.backward()
        state = state.detach()
    torch.testing.assert_close(total / 32, whole.ce)
    assert state.position == 32


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_state_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model, ids = HierarchicalTransformer(**THREE).to(dtype), torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        chunked, state = in_chunks(model, ids, [1, 9])
        torch.testing.assert_close(chunked.float(), model(ids).float(), rtol=0.1, atol=0.1)
    assert state.dtype == dtype
    seen = []
    state.map(lambda t: seen.append(t.dtype) or t, lambda t: seen.append(t.dtype) or t)
    assert set(seen) == {dtype}
    assert state.to(torch.float64).dtype == torch.float64


def test_embeddings_in_chunks() -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        for name in ('return_hierarchical_embeds', 'return_hierarchical_token_embeds'):
            whole = model(ids, **{name: True})
            first, state = model(ids[:, :13], return_state=True, **{name: True})
            second, _ = model(ids[:, 13:], return_state=True, state=state, **{name: True})
            for x, y, z in zip(whole, first, second, strict=True):
                torch.testing.assert_close(torch.cat((y, z), dim=1), x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('grad', [False, True])
def test_autocast_reads_with_a_state(dtype: torch.dtype, grad: bool) -> None:
    model, ids = HierarchicalTransformer(**THREE), torch.randint(0, 11, (2, 30))
    exact = model(ids)
    with torch.autocast('cpu', dtype=dtype), torch.set_grad_enabled(grad):
        chunked, state = in_chunks(model, ids, [9, 1, 4])
        assert model.score(ids) > 0
        assert model.generate(ids, 3).shape == (2, 3)
    torch.testing.assert_close(chunked.float(), exact, rtol=0.1, atol=0.1)
    assert {tensor.dtype for tensor in state.tensors()} == {torch.float32}


@given(config=configs(), first=st.integers(1, 20), rows=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_any_state_can_be_cloned_selected_and_refuses_to_be_read_twice(
    config: dict[str, Any], first: int, rows: list[int]
) -> None:
    model, ids = build(config), torch.randint(0, 11, (3, 30))
    with torch.no_grad():
        whole, _ = model(ids, return_state=True)
        _, state = model(ids[:, :first], return_state=True)
        kept, chosen, alias = state.clone(), state.select(rows), state.detach()
        assert chosen.nbytes * 3 == state.nbytes * len(rows)
        _, after = model(ids[:, first:], state=state, return_state=True)
        assert after.nbytes == state.nbytes
        for consumed in (state, alias):
            with pytest.raises(ValueError, match=f'state at position {first} was consumed'):
                model(ids[:, first:], state=consumed, return_state=True)
        for other, order in ((kept, [0, 1, 2]), (chosen, rows)):
            out, _ = model(ids[order, first:], state=other, return_state=True)
            torch.testing.assert_close(out, whole[order, first:], rtol=0, atol=1e-10)


def test_a_state_of_a_graph_is_not_written_over() -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 30))
    first, state = model(ids[:, :9], return_state=True)
    with torch.no_grad():
        _, after = model(ids[:, 9:20], state=state, return_state=True)
    assert not any(tensor.requires_grad for tensor in after.tensors())
    second, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second), dim=1), model(ids), rtol=0, atol=1e-10)
    loss, _, _ = model(ids[:, 20:], state=after, return_loss=True, return_state=True)
    loss.backward()


# how much a state holds


GROWS: dict[str, dict[str, Any]] = {
    'three': THREE,
    'strided': STRIDED,
    'recall': dict(STRIDED, recall=(2, 3), word_recall=(1,), num_tokens=256),
    'hyena': dict(THREE, mixer=('attention', 'hyena', 'hyena'), window_sizes=(30, None, None)),
    'reversible': dict(THREE, reversible=True),
    'patterns': dict(STRIDED, window_sizes=None, mixer_kwargs=dict(pattern='fixed', pattern_mode='union', stride=4)),
    'hourglass': dict(STRIDED, arrangement='hourglass'),
}


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('splits', [[1], [3, 1, 1, 9, 1], [40, 1, 1]])
@pytest.mark.parametrize('config', GROWS.values(), ids=GROWS)
def test_a_state_that_grows_gives_what_one_pass_gives(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], splits: list[int], grad: bool
) -> None:
    model, ids = build(dict(config, depth=1)), torch.randint(0, 11, (2, 3 * SEQ_LEN))
    with torch.set_grad_enabled(grad):
        whole, full = model(ids, return_state=True)
        monkeypatch.setattr(state_module, 'ROOM', 2)
        begun = model.initial_state(2)
        assert begun.nbytes < full.nbytes
        chunked, state = in_chunks(model, ids, splits)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-8)
    assert state.nbytes == full.nbytes


@given(config=configs(), n=st.integers(1, 3 * SEQ_LEN), splits=SPLITS, room=st.integers(1, 20))
@settings(max_examples=20)
def test_any_state_may_grow(config: dict[str, Any], n: int, splits: list[int], room: int) -> None:
    model, ids = build(config), torch.randint(0, 11, (1, n))
    with torch.no_grad():
        whole, _ = model(ids, return_state=True)
        with mock.patch.object(state_module, 'ROOM', room):
            chunked, state = in_chunks(model, ids, splits)
            assert state.nbytes == model(ids, return_state=True)[1].nbytes
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    'config',
    [
        {},
        dict(hierarchies=(1, 4), window_sizes=('auto', None)),
        dict(recall=(2, 3), window_sizes=0),
        dict(mixer_kwargs=dict(pattern='strided', stride=8)),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_held_follows_what_was_read(config: dict[str, Any]) -> None:
    model = HierarchicalTransformer(**{**SMALL, 'depth': 1, 'seq_len': 10**9, **config})
    ids = torch.randint(0, 11, (1, 3000))
    _, state = model(ids[:, :1], return_state=True)
    first = state.nbytes
    assert first < 1_000_000
    for at in range(1, 3000, 500):
        _, state = model(ids[:, at : at + 500], state=state, return_state=True)
    # no more than twice what was read, beyond what there is room for at first
    assert first < state.nbytes <= 8 * first
    assert model.generate(ids[:, :5], 3).shape == (1, 3)


@pytest.mark.parametrize(('tokens', 'limit'), [(0, 5), (0, 10**9), (1024, 2049), (1026, 2049), (10**9, 10**9)])
def test_room_is_at_most_twice_what_is_needed(tokens: int, limit: int) -> None:
    room = room_for(tokens, limit)
    assert min(tokens, limit) <= room <= limit
    assert room < 2 * max(tokens, state_module.ROOM) + 1


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=64)
def test_a_compiled_step_may_grow_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, 'ROOM', 4)
    model, graphs = build(dict(SMALL, depth=1, window_sizes=None, seq_len=64)), 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.randint(0, 11, (2, 90))
    _, state = model(ids[:, :3], return_state=True)
    outs = []
    for at in range(3, 90):
        out, state = compiled(ids[:, at : at + 1], state=state, return_state=True)
        outs.append(out)
    whole, _ = model(ids, return_state=True)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole[:, 3:], rtol=0, atol=1e-10)
    assert graphs <= 8


# what reads a state may not be read again, whatever came in between

DERIVED: dict[str, Callable[[State], State]] = {
    'itself': lambda state: state,
    'clone': State.clone,
    'detach': State.detach,
    'select': lambda state: state.select([1, 0]),
    'to another dtype': lambda state: state.to(torch.float32).to(torch.float64),
    'to where it is': lambda state: state.to(torch.float64),
    'deepcopy': deepcopy,
}


@pytest.mark.parametrize('derive', DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize('recall', [(), (2,)])
def test_nothing_derived_from_a_consumed_state_is_accepted(
    derive: Callable[[State], State], recall: tuple[int, ...]
) -> None:
    model, ids = build(dict(THREE, recall=recall)), torch.randint(0, 11, (2, 20))
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        model(ids[:, 9:], state=state, return_state=True)
        assert state.consumed
        with pytest.raises(ValueError, match='state at position 9 was consumed'):
            model(ids[:, 9:], state=derive(state), return_state=True)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize('derive', DERIVED.values(), ids=DERIVED)
def test_a_state_that_a_failed_step_may_have_written_is_refused(derive: Callable[[State], State]) -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 20))

    def interrupt(*_: Any) -> None:
        raise Interrupted

    def fail(state: State) -> None:
        hook = model.hierarchical_merges[1].register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            model(ids[:, 9:], state=state, return_state=True)
        hook.remove()

    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        fail(state)
        with pytest.raises(ValueError, match='state at position 9 was consumed'):
            model(ids[:, 9:], state=derive(state), return_state=True)

    # with gradients nothing is written
    _, state = model(ids[:, :9], return_state=True)
    fail(state)
    out, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(out, model(ids)[:, 9:], rtol=0, atol=1e-10)


def test_a_state_of_another_dtype_shares_no_memory() -> None:
    """Ids are whole numbers in every dtype, so a conversion leaves them as they are."""
    model, ids = build(dict(THREE, recall=(2,), ngrams=(2,))), torch.randint(0, 11, (2, 20))
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        half = state.to(torch.float32)
        held = half.ids.clone()
        model(ids[:, 9:], state=state, return_state=True)
        assert torch.equal(half.ids, held)


def test_compiled_steps_consume_their_state() -> None:
    model, ids = build(dict(THREE, depth=1)), torch.randint(0, 11, (2, 20))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        _, after = compiled(ids[:, 9:10], state=state, return_state=True)
        assert state.consumed
        assert not after.consumed
        with pytest.raises(ValueError, match='state at position 9 was consumed'):
            model(ids[:, 9:], state=state, return_state=True)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize(
    'config',
    [THREE, STRIDED, dict(THREE, mixer=('attention', 'hyena', 's4d'), window_sizes=4, recall=(2,), ngrams=(2,))],
    ids=['three', 'strided', 'mixers'],
)
def test_a_state_of_inference_mode_is_read_outside_of_it(config: dict[str, Any], grad: bool) -> None:
    model, ids = build(config), torch.randint(0, 11, (2, 20))
    whole = model(ids)
    with torch.inference_mode():
        _, state = model(ids[:, :9], return_state=True)
        _, state = model(ids[:, 9:10], state=state, return_state=True)
    with torch.set_grad_enabled(grad):
        outs = []
        for chunk in ids[:, 10:].split([1, 1, 8], dim=1):
            out, state = model(chunk, state=state, return_state=True)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole[:, 10:], rtol=0, atol=1e-8)
    if grad:
        outs[-1].sum().backward()

    # and the other way round
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
    with torch.inference_mode():
        out, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(out, whole[:, 9:], rtol=0, atol=1e-8)


class Last(torch.nn.Module):
    """A summarizer from outside: the embedding that a level token ends with."""

    def forward(self, embeds: Tensor) -> Tensor:
        return embeds[:, ::4]


def test_summarizers_from_outside_meet_their_tokens_in_any_chunk() -> None:
    model = build(dict(STRIDED, chunk_summarizers=(None, Last()), detach_summaries=False, ignore_index=-1))
    ids, seen = torch.randint(0, 11, (1, 24)), []
    model.chunk_summarizers['1'].register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = model.token_emb(ids)[:, ::4]
    state = None
    for at in range(0, 24, 3):
        _, _, state = model(
            ids[:, at : at + 3], labels=ids[:, at : at + 3], return_loss=True, return_state=True, state=state
        )
    torch.testing.assert_close(torch.cat(seen, dim=1), expected)


# score


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


def test_score_of_a_text_longer_than_seq_len_sees_all_that_the_state_holds() -> None:
    model, ids = build(THREE), torch.randint(1, 11, (1, 500))
    with torch.no_grad():
        logits, _ = model(ids[:, :-1], return_state=True)
    expected = F.cross_entropy(logits[0], ids[0, 1:]).item() / torch.tensor(2.0).log().item()
    assert model.score(ids) == pytest.approx(expected, rel=1e-6)


def test_score_leaves_ignored_ids_out() -> None:
    model, ids = build(THREE), torch.randint(1, 11, (30,))
    ids[10:20] = 0
    bits, log_probs = model.score(ids, return_log_probs=True)
    kept = log_probs[ids[1:] != 0]
    assert bits == pytest.approx(-kept.mean().item() / torch.tensor(2.0).log().item())


# bad input


def test_a_foreign_state_is_refused() -> None:
    model, ids = build(THREE), torch.zeros(2, 3, dtype=torch.long)
    _, state = model(ids, return_state=True)
    cases = [
        (model.float(), ids, dict(state=state), 'state must have dtype torch.float32, got torch.float64'),
        (build(STRIDED), ids, dict(state=state), 'state is of another model'),
        (build(dict(THREE, depth=1)), ids, dict(state=state), 'state is of another model'),
        (build(dict(THREE, predict_use_all_hierarchy=True)), ids, dict(state=state), 'state is of another model'),
        (build(dict(THREE, merge_into='all')), ids, dict(state=state), 'state is of another model'),
        (build(THREE), ids[:1], dict(state=state), 'state must have batch size 1, got 2'),
        (build(THREE), ids[:, :0], dict(state=state), 'ids must hold at least one token'),
        (build(THREE), ids, dict(state='none'), 'state must be what return_state gave, got str'),
    ]
    for net, chunk, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            net(chunk, return_state=True, **arguments)

    net = build(THREE)
    with pytest.raises(ValueError, match='state is consumed: return_state = True hands it back'):
        net(ids, state=state)
    with pytest.raises(ValueError, match=r'rows must be in \[0, 2\), got \[2\]'):
        state.select([2])
    with pytest.raises(ValueError, match='rows must be a list of at least one row number'):
        state.select([])
    with pytest.raises(ValueError, match='use_cache = False reads from position 0, so it takes no state'):
        net.generate(ids, 2, use_cache=False, state=state)
    with pytest.raises(ValueError, match='state must have batch size 1, got 2'):
        net.generate(ids[:1], 2, state=state)


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


@torch.no_grad()
@pytest.mark.parametrize('merging', [{}, dict(merge='attention', merge_into='all', merge_window=1)], ids=str)
def test_a_state_hangs_on_no_loss(merging: dict[str, Any]) -> None:
    config = {**THREE, **merging}
    off, on = (build(dict(config, recon_loss_weight=w, next_latent_loss_weight=w)) for w in (0.0, 0.2))
    off.load_state_dict(on.state_dict())
    ids = torch.randint(0, 11, (2, 20))
    _, state = on(ids[:, :9], return_state=True)
    torch.testing.assert_close(off(ids[:, 9:], state=state, return_state=True)[0], on(ids)[:, 9:])


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=32)
@pytest.mark.parametrize(
    'option',
    [dict(depth=1), dict(depth=1, merge='attention', merge_window=1, compressor='attention')],
    ids=['plain', 'attention'],
)
def test_compiled_steps_need_a_graph_for_each_phase_and_no_more(option: dict[str, Any]) -> None:
    model, graphs = build({**THREE, **option}), 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.randint(0, 11, (2, 32))
    _, state = model(ids[:, :3], return_state=True)
    outs, after = [], {}
    for at in range(3, ids.shape[1]):
        out, state = compiled(ids[:, at : at + 1], state=state, return_state=True)
        outs.append(out)
        after[at] = graphs
    # eight positions apart every level stands in the same phase; the first graph takes its position for a constant
    assert 1 < after[19] == graphs <= 9
    whole, _ = model(ids, return_state=True)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole[:, 3:], rtol=0, atol=1e-10)
