"""Ragged chunks: a block gives each row what it gives the row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import level
from torch import Tensor, nn

from simple_hierarchical_transformer import memory
from simple_hierarchical_transformer.block import HierarchicalBlock
from simple_hierarchical_transformer.levels import Level
from simple_hierarchical_transformer.memory import BlockState
from simple_hierarchical_transformer.mixers import MIXERS, Attention, attention
from simple_hierarchical_transformer.rows import Rows

DIM, LENGTH = 6, 12


class RunningMean(nn.Module):
    """A user's mixer: the mean of a projection of all tokens so far, times a function of the position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return (like.new_zeros(batch, like.shape[-1]),)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, start: int
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        assert isinstance(start, int)
        position = torch.arange(start + 1, start + 1 + x.shape[1], dtype=x.dtype)[:, None]
        total = self.proj(x).cumsum(dim=1)
        if state is not None:
            total = total + state[0][:, None]
            state = (memory.keep(state[0], total[:, -1]),)
        return total / position * position.cos(), state


# by name: the mixer, its window, its arguments
CASES: dict[str, tuple[str | type[nn.Module], int | None, dict[str, Any]]] = {
    'full': ('attention', None, {}),
    'full, grouped queries, normed': ('attention', None, dict(kv_heads=1, qk_norm=True)),
    'no mixer': ('attention', 0, {}),
    'window of 1': ('attention', 1, {}),
    'window of 3, grouped queries': ('attention', 3, dict(kv_heads=1)),
    'window of 9, normed': ('attention', 9, dict(qk_norm=True)),
    'strided': ('attention', None, dict(pattern='strided', stride=3)),
    'lsh': ('lsh', None, dict(entries=3, buckets=4)),
    'gateloop': ('gateloop', None, {}),
    'simple-gateloop': ('simple-gateloop', None, {}),
    's4d': ('s4d', None, dict(state_dim=4)),
    'h3': ('h3', None, dict(state_dim=4, shift_dim=3)),
    'hyena': ('hyena', None, dict(filter_dim=4)),
    'own': (RunningMean, None, {}),
}
assert {mixer for mixer, _, _ in CASES.values() if isinstance(mixer, str)} == set(MIXERS)
LENGTHS = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4)
# chunks of steps and of longer pieces
RAGGED = [[1, 0, 1], [5, 0, 2], [1, 1, 1], [0, 1, 0], [9, 8, 0], [0, 4, 13], [1, 1, 0], [2, 2, 2]]


def placed(name: str, *, is_placed: bool = True) -> Level:
    mixer, window, options = CASES[name]
    boundaries = 'words' if is_placed else None
    return replace(level(window=window), mixer=mixer, mixer_kwargs=options, boundaries=boundaries)


def make(name: str, *, is_placed: bool = True, **options: Any) -> HierarchicalBlock:
    """A block in float64. No parameter keeps its initial zeros or ones."""
    torch.manual_seed(0)
    block = HierarchicalBlock(placed(name, is_placed=is_placed), length=LENGTH, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def chunks_of(lengths: Sequence[Sequence[int]], padding: int = 0) -> list[tuple[Tensor, Rows]]:
    """Random chunks whose rows have these lengths, with at least `padding` more tokens than the longest row."""
    starts, chunks = [0] * len(lengths[0]), []
    for each in lengths:
        x = torch.randn(len(each), max(each) + padding, DIM, dtype=torch.float64)
        chunks.append((x, Rows(starts, each, x.device)))
        starts = [start + length for start, length in zip(starts, each, strict=True)]
    return chunks


def row_of(state: BlockState, r: int) -> list[Tensor]:
    return [tensor[:, r] for tensor in state.held if tensor is not None]


def run(block: HierarchicalBlock, chunks: list[tuple[Tensor, Rows]]) -> tuple[list[list[Tensor]], BlockState]:
    """The valid outputs of each chunk and row, and the last state. Checks that rows without tokens keep their state."""
    state, outs = block.initial_state(len(chunks[0][0]), chunks[0][0]), []
    for x, rows in chunks:
        before = state.map(torch.clone)
        out, state = block(x, state, rows)
        assert out.shape == x.shape
        assert out.isfinite().all()
        outs.append([out[r, :length] for r, length in enumerate(rows.lengths)])
        for r, length in enumerate(rows.lengths):
            if not length:
                for new, old in zip(row_of(state, r), row_of(before, r), strict=True):
                    # a cache may have got empty slots
                    held = new if new.shape == old.shape else new.narrow(-2, 0, old.shape[-2])
                    assert torch.equal(held, old)
    return outs, state


def run_alone(block: HierarchicalBlock, chunks: list[tuple[Tensor, Rows]]) -> tuple[list[list[Tensor]], list[Any]]:
    """Likewise from each row by itself."""
    states = [block.initial_state(1, chunks[0][0]) for _ in chunks[0][0]]
    outs = []
    for x, rows in chunks:
        outs.append([])
        for r, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
            out = x[r : r + 1, :length]
            if length:
                out, states[r] = block(out, states[r], start)
            outs[-1].append(out[0])
    return outs, states


def check(block: HierarchicalBlock, chunks: list[tuple[Tensor, Rows]], compare_states: bool = True) -> None:
    (outs, state), (expected, states) = run(block, chunks), run_alone(block, chunks)
    torch.testing.assert_close(outs, expected, rtol=0, atol=1e-10)
    for r, alone in enumerate(states if compare_states else []):
        torch.testing.assert_close(row_of(state, r), row_of(alone, 0), rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', CASES)
@given(lengths=LENGTHS, padding=st.integers(0, 2), small=st.booleans(), grad=st.booleans(), gated=st.booleans())
@settings(max_examples=15)
def test_rows_equal_rows_alone(
    name: str, lengths: list[list[int]], padding: int, small: bool, grad: bool, gated: bool
) -> None:
    block = make(name, is_placed=padding < 2, residual='gru' if gated else 'add')
    with torch.set_grad_enabled(grad), patch.object(attention, 'MIN_RAGGED', 1 if small else 128):
        check(block, chunks_of(lengths, padding))


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('name', CASES)
def test_steps_and_long_chunks_alternate(name: str, grad: bool) -> None:
    block = make(name)
    with torch.set_grad_enabled(grad), patch.object(attention, 'MIN_RAGGED', 1):
        check(block, chunks_of(RAGGED))
        check(block, chunks_of([[3, 3, 3], *RAGGED, [7, 7, 7], *RAGGED], padding=1))


@pytest.mark.parametrize('name', CASES)
def test_gradients_equal_those_of_rows_alone(name: str) -> None:
    block = make(name)
    chunks = chunks_of(RAGGED[:6])
    weights = [torch.randn_like(x) for x, _ in chunks]
    gradients = []
    for runs in (run, run_alone):
        inputs = [x.clone().requires_grad_() for x, _ in chunks]
        outs, last = runs(block, [(x, rows) for x, (_, rows) in zip(inputs, chunks, strict=True)])
        loss = sum(
            (out * weight[r, : len(out)]).sum()
            for of_rows, weight in zip(outs, weights, strict=True)
            for r, out in enumerate(of_rows)
        )
        for state in [last] if runs is run else last:
            loss = loss + sum(t.pow(2).sum() for t in state.held if t is not None and t.is_floating_point())
        block.zero_grad()
        loss.backward()
        gradients.append([x.grad for x in inputs] + [parameter.grad for parameter in block.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    # nothing flows into padding
    for x, (_, rows) in zip(gradients[0], chunks, strict=False):
        assert all(not x[r, length:].any() for r, length in enumerate(rows.lengths))


@pytest.mark.parametrize('name', CASES)
def test_padding_changes_nothing(name: str) -> None:
    block, chunks = make(name), chunks_of(RAGGED, padding=2)
    changed = []
    for x, rows in chunks:
        is_padding = torch.arange(x.shape[1]) >= torch.tensor(rows.lengths)[:, None]
        changed.append((torch.where(is_padding[..., None], 100 * torch.randn_like(x), x), rows))
    with torch.no_grad():
        (outs, state), (others, other) = run(block, chunks), run(block, changed)
    torch.testing.assert_close(outs, others, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.held, other.held, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', ['full', 'window of 9, normed', 'hyena'])
@pytest.mark.parametrize('grad', [False, True])
def test_caches_grow_with_the_longest_row(name: str, grad: bool) -> None:
    with patch.object(memory, 'ROOM', 2), torch.set_grad_enabled(grad):
        # the cache of a row alone is smaller
        check(make(name), chunks_of(RAGGED), compare_states=False)


def test_only_rows_that_differ_leave_the_fast_path() -> None:
    block = make('full')
    starts: list[Any] = []
    block.attn.register_forward_pre_hook(lambda _, args: starts.append(args[2]))
    with torch.no_grad():
        state = block.initial_state(2, x := torch.randn(2, 3, DIM, dtype=torch.float64))
        for first, lengths in (([0, 0], [3, 3]), ([3, 3], [2, 3]), ([5, 6], [0, 0]), ([5, 6], [3, 3])):
            block(x, state, Rows(first, lengths, x.device))
    assert starts[0] == 0
    assert [type(start) for start in starts] == [int, Rows, Rows]


@pytest.mark.parametrize(
    ('name', 'calls'),
    [('gateloop', 2), ('simple-gateloop', 2), ('s4d', 2), ('h3', 2), ('hyena', 3), ('own', 3), ('full', 1)],
)
def test_mixers_run_once_for_each_group_and_hooks_fire(name: str, calls: int) -> None:
    block, plain = make(name), make(name)
    shapes: list[tuple[int, ...]] = []

    def double(_: nn.Module, args: tuple[Any, ...], result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        shapes.append(tuple(args[0].shape))
        return 2 * result[0], result[1]

    block.attn.register_forward_hook(double)
    x = torch.randn(5, 4, DIM, dtype=torch.float64)
    rows = Rows([2, 2, 2, 0, 2], [4, 3, 4, 4, 0], x.device)
    with torch.no_grad():
        updates = [each.mixed(x, each.initial_state(5, x).phases(0, 1), rows)[0] for each in (block, plain)]
    assert len(shapes) == calls
    for r, length in enumerate(rows.lengths):
        torch.testing.assert_close(updates[0][r, :length], 2 * updates[1][r, :length])


@pytest.mark.parametrize('name', ['full', 'window of 3, grouped queries', 'gateloop', 'hyena'])
@pytest.mark.parametrize('autocast', [False, True])
def test_lower_precision(name: str, autocast: bool) -> None:
    exact = make(name)
    block = make(name).float()
    chunks = chunks_of(RAGGED)
    single = [(x.float(), rows) for x, rows in chunks]
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        outs, state = run(block, single)
        kinds = [tensor.dtype for tensor in block.initial_state(3, single[0][0]).held if tensor is not None]
        assert [tensor.dtype for tensor in state.held if tensor is not None] == kinds
    with torch.no_grad():
        expected, _ = run(exact, chunks)
    for of_rows, exact_rows in zip(outs, expected, strict=True):
        for out, right in zip(of_rows, exact_rows, strict=True):
            torch.testing.assert_close(out.double(), right, rtol=0, atol=0.15 if autocast else 1e-4)


def test_placed_levels_have_no_xpos() -> None:
    assert not make('full').attn.rotary_emb.xpos
    assert make('full', is_placed=False).attn.rotary_emb.xpos
    assert not Attention(dim=DIM, placed=True).rotary_emb.xpos
    made = placed('full')
    with pytest.raises(ValueError, match='mixer_kwargs'):
        HierarchicalBlock(replace(made, mixer_kwargs=dict(placed=True)))


def test_rows_need_a_state_and_one_phase() -> None:
    x = torch.randn(2, 3, DIM)
    rows = Rows([0, 1], [3, 3], x.device)
    with pytest.raises(ValueError, match='without a state'):
        make('full').float()(x, None, rows)
    phased = HierarchicalBlock(level(4, 2))
    with pytest.raises(ValueError, match='2 phases'):
        phased(x, phased.initial_state(2, x), rows)
