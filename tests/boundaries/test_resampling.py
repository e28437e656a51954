"""Down- and upsampling of placed levels against loops over pieces, in one pass and in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simple_hierarchical_transformer.boundaries import Marks
from simple_hierarchical_transformer.memory import PlacedState
from simple_hierarchical_transformer.pieces import Frame, Pieces, place
from simple_hierarchical_transformer.resampling import EPS, OFFSETS, UPSAMPLERS, PieceAttention

DIM, HEADS, N = 6, 2, 40


def cut(
    boundary: Tensor, probability: Tensor | None, x: Tensor, before: PlacedState | None = None
) -> tuple[Pieces, PlacedState | None]:
    """The pieces of finer tokens x `(batch, n, dim)` with these boundaries."""
    b, n = boundary.shape
    start = 0 if before is None else int(before.count[-1])
    positions = torch.arange(n).expand(b, -1)
    frame = Frame(positions, start)
    return place(lambda *_: Marks(boundary, probability), 4, x, torch.zeros(b, n).long(), frame, before)


def state_of(batch: int) -> PlacedState:
    zeros = torch.zeros(batch).long()
    return PlacedState(
        count=zeros,
        cut=zeros,
        pending=zeros.bool(),
        ids=torch.full((batch, 1), -1),
        finer=torch.zeros(batch, 1, DIM).double(),
    )


def inner(x: Tensor) -> Tensor:
    """Stands for the layers of the level: any map of single tokens."""
    return torch.sin(3 * x)


def example(share: float, seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Finer tokens, boundaries of which the first is one, and their probabilities."""
    torch.manual_seed(seed)
    x = torch.randn(batch, N, DIM, dtype=torch.float64)
    boundary = torch.rand(batch, N) < share
    boundary[:, 0] = True
    p = torch.rand(batch, N, dtype=torch.float64) / 2
    return x, boundary, torch.where(boundary, 1 - p, p)


def upsampler(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return UPSAMPLERS[kind](DIM).double()


def upsampled(kind: str, module: Any, x: Tensor, boundary: Tensor, p: Tensor | None) -> Tensor:
    """The definition of each upsampler for one row: x `(n, dim)`, boundary and p `(n,)`."""
    out, latest, since, smoothed = [], torch.zeros(DIM).double(), 0, torch.zeros(DIM).double()
    for t in range(len(x)):
        if boundary[t]:
            latest, since = inner(x[t]), 0
            if kind == 'smooth':
                assert p is not None
                kept = p[t].clamp(EPS, 1 - EPS)
                smoothed = kept * latest + (1 - kept) * smoothed
        if kind == 'smooth':
            value = smoothed
        elif kind == 'boundary':
            value = latest if boundary[t] else torch.zeros(DIM).double()
        elif kind == 'offset':
            matrix = module.to_offsets.weight.unflatten(0, (OFFSETS, DIM))[since % OFFSETS]
            value = latest + matrix @ latest
        else:
            value = latest
        if p is not None:
            c = p[t] if boundary[t] else 1 - p[t]
            value = value * (c + (1 - c).detach())
        out.append(value)
        since += 1
    return torch.stack(out)


@pytest.mark.parametrize('share', [0.0, 0.04, 0.3, 1.0])
@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('kind', UPSAMPLERS)
def test_upsampling_equals_its_definition(kind: str, learned: bool, share: float) -> None:
    if kind == 'smooth' and not learned:
        pytest.skip('needs probabilities')
    module = upsampler(kind)
    x, boundary, p = example(share)
    x.requires_grad_(), p.requires_grad_()
    given_p = p if learned else None
    pieces, _ = cut(boundary, given_p, x)
    picked = torch.stack([x[r].index_select(0, pieces.at[r]) for r in range(3)])
    out, _ = module(inner(picked), pieces, None)
    expected = torch.stack([upsampled(kind, module, x[r], boundary[r], p[r] if learned else None) for r in range(3)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)

    weights = torch.randn_like(out)
    wanted = [x, *([p] if learned else []), *module.parameters()]
    ours = torch.autograd.grad((out * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def pooled(module: PieceAttention, piece: Tensor) -> Tensor:
    """What attention finds in one piece `(tokens, dim)`, added to its last token."""
    scores = (piece @ module.to_scores.weight.T).softmax(0)
    values = (piece @ module.to_values.weight.T).unflatten(-1, (HEADS, -1))
    found = (scores[..., None] * values).sum(0).flatten()
    return piece[-1] + module.to_out.weight @ found


@pytest.mark.parametrize('share', [0.0, 0.04, 0.3, 1.0])
def test_attention_pools_each_piece(share: float) -> None:
    torch.manual_seed(2)
    module = PieceAttention(DIM, HEADS, 4).double()
    x, boundary, _ = example(share)
    x = (30 * x).requires_grad_()
    pieces, _ = cut(boundary, None, x)
    out, _ = module(x, pieces, None)
    seen, expected = [], []
    for r in range(3):
        begin = 0
        for k, t in enumerate(boundary[r].nonzero()[:, 0].tolist()):
            expected.append(pooled(module, x[r, begin : t + 1]))
            seen.append(out[r, k])
            begin = t + 1
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=0, atol=1e-11)
    weights = torch.randn(len(seen), DIM, dtype=torch.float64)
    wanted = [x, *module.parameters()]
    ours = torch.autograd.grad((torch.stack(seen) * weights).sum(), wanted)
    theirs = torch.autograd.grad((torch.stack(expected) * weights).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize('kind', [*UPSAMPLERS, 'attention'])
@given(
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    sizes=st.lists(st.integers(1, 15), min_size=1),
    grad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_equal_one_pass(kind: str, share: float, sizes: list[int], grad: bool, seed: int) -> None:
    module: Any = PieceAttention(DIM, HEADS, 4).double() if kind == 'attention' else upsampler(kind)
    x, boundary, p = example(share, seed)

    def run(at: slice, before: PlacedState | None, state: Any) -> tuple[Tensor, list[Tensor], PlacedState | None, Any]:
        chunk = x[:, at]
        positions = torch.arange(chunk.shape[1]).expand(3, -1)
        frame = Frame(positions, at.start)
        pieces, after = place(
            lambda *_: Marks(boundary[:, at], p[:, at]), 4, chunk, torch.zeros(3, chunk.shape[1]).long(), frame, before
        )
        if kind == 'attention':
            out, state = module(chunk, pieces, state)
            return out, [out[r, : int(pieces.lengths[r])] for r in range(3)], after, state
        picked = torch.stack([chunk[r].index_select(0, pieces.at[r]) for r in range(3)])
        out, state = module(inner(picked), pieces, state)
        return out, list(out), after, state

    with torch.set_grad_enabled(grad):
        _, whole, _, _ = run(slice(0, N), None, None)
        before, state = state_of(3), module.initial_state(3, x[0, 0, 0])
        parts, at, turn = [], 0, 0
        while at < N:
            end = min(at + sizes[turn % len(sizes)], N)
            _, rows, before, state = run(slice(at, end), before, state)
            parts.append(rows)
            at, turn = end, turn + 1
    for r, row in enumerate(zip(*parts, strict=True)):
        torch.testing.assert_close(torch.cat(row), whole[r], rtol=0, atol=1e-11)
