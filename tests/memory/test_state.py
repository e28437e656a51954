"""States: their size and dtype, copies and rows, gradients, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import STRIDED, THREE, build, in_chunks
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer


def test_a_state_has_the_documented_size() -> None:
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

        # the original state reads other ids, and its copies do not change
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

    # the loss of the second chunk trains the embeddings of the first only if the state is not detached
    ids = torch.cat((torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)), dim=1)
    for detach in (False, True):
        _, state = model(ids[:, :9], return_state=True)
        out, _ = model(ids[:, 9:], state=state.detach() if detach else state, return_state=True)
        (grad,) = torch.autograd.grad(out.sum(), model.token_emb.weight)
        assert bool(grad[0].any()) != detach


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


def test_a_state_with_gradients_is_not_overwritten() -> None:
    model, ids = build(THREE), torch.randint(0, 11, (2, 30))
    first, state = model(ids[:, :9], return_state=True)
    with torch.no_grad():
        _, after = model(ids[:, 9:20], state=state, return_state=True)
    assert not any(tensor.requires_grad for tensor in after.tensors())
    second, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second), dim=1), model(ids), rtol=0, atol=1e-10)
    loss, _, _ = model(ids[:, 20:], state=after, return_loss=True, return_state=True)
    loss.backward()


def test_a_state_of_another_dtype_shares_no_memory() -> None:
    """A conversion leaves ids as integers, and must copy them."""
    model, ids = build(dict(THREE, recall=(2,), ngrams=(2,))), torch.randint(0, 11, (2, 20))
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
        half = state.to(torch.float32)
        held = half.ids.clone()
        model(ids[:, 9:], state=state, return_state=True)
        assert torch.equal(half.ids, held)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize(
    'config',
    [THREE, STRIDED, dict(THREE, mixer=('attention', 'hyena', 's4d'), window_sizes=4, recall=(2,), ngrams=(2,))],
    ids=['three', 'strided', 'mixers'],
)
def test_a_state_made_in_inference_mode_works_outside_of_it(config: dict[str, Any], grad: bool) -> None:
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

    # a state made outside of inference mode works within it
    with torch.no_grad():
        _, state = model(ids[:, :9], return_state=True)
    with torch.inference_mode():
        out, _ = model(ids[:, 9:], state=state, return_state=True)
    torch.testing.assert_close(out, whole[:, 9:], rtol=0, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize('merging', [{}, dict(merge='attention', merge_into='all', merge_window=1)], ids=str)
def test_a_state_does_not_depend_on_the_losses(merging: dict[str, Any]) -> None:
    config = {**THREE, **merging}
    off, on = (build(dict(config, recon_loss_weight=w, next_latent_loss_weight=w)) for w in (0.0, 0.2))
    off.load_state_dict(on.state_dict())
    ids = torch.randint(0, 11, (2, 20))
    _, state = on(ids[:, :9], return_state=True)
    torch.testing.assert_close(off(ids[:, 9:], state=state, return_state=True)[0], on(ids)[:, 9:])


def test_a_state_of_another_model_is_refused() -> None:
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
