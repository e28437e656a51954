"""Every mixer and option: one contract for all, and each against a form written out step by step or pair by pair."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQ_LEN, build, loss_of_a_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer, mixers
from simple_hierarchical_transformer.mixers import (
    H3,
    MIXERS,
    S4D,
    Attention,
    GateLoop,
    Hyena,
    LSHAttention,
    SimpleGateLoop,
)
from simple_hierarchical_transformer.mixers.rotary import Rotary
from simple_hierarchical_transformer.mixers.ssm import DiagonalSSM
from simple_hierarchical_transformer.ops.fft_conv import causal_conv
from simple_hierarchical_transformer.ops.pattern_attention import attended
from simple_hierarchical_transformer.ops.result_cache import ResultCache
from simple_hierarchical_transformer.ops.scan import scan

DIM, LENGTH = 12, 40
STRIDED = dict(pattern='strided', stride=5)
FIXED = dict(pattern='fixed', stride=5, summary=2)

# name, whether no later token is heard at all, and settings
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    'grouped queries': ('attention', True, dict(kv_heads=2)),
    'one head of keys': ('attention', True, dict(kv_heads=1)),
    'one head of keys in a window': ('attention', True, dict(kv_heads=1, window=3)),
    'strided': ('attention', True, STRIDED),
    'strided, union': ('attention', True, dict(STRIDED, pattern_mode='union', kv_heads=2)),
    'strided, heads': ('attention', True, dict(STRIDED, pattern_mode='heads')),
    'fixed': ('attention', True, FIXED),
    'fixed, union': ('attention', True, dict(FIXED, pattern_mode='union')),
    'fixed, heads': ('attention', True, dict(FIXED, pattern_mode='heads', kv_heads=2)),
    'stride by default': ('attention', True, dict(pattern='fixed', pattern_mode='union')),
    'lsh': ('lsh', False, dict(entries=5, buckets=4)),
    'lsh of wide windows': ('lsh', False, dict(entries=64, rounds=3)),
    'lsh of one': ('lsh', False, dict(entries=1, rounds=1, buckets=2)),
    'gateloop': ('gateloop', True, {}),
    'gateloop, 3 heads': ('gateloop', True, dict(state_heads=3)),
    'simple-gateloop': ('simple-gateloop', True, {}),
    's4d': ('s4d', False, dict(state_dim=8)),
    's4d, inv, by matrices': ('s4d', False, dict(state_dim=8, init='inv', fft='monarch')),
    'h3': ('h3', False, dict(state_dim=8, shift_dim=5)),
    'h3 by matrices': ('h3', False, dict(state_dim=8, shift_dim=1, fft='monarch')),
    'hyena': ('hyena', False, dict(filter_dim=8)),
    'hyena of order 3, by matrices': ('hyena', False, dict(filter_dim=8, order=3, short=1, fft='monarch')),
}
cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)

HEADS = dict(heads=4, dim_head=4)
BASE: dict[str, Any] = dict(
    num_tokens=11, dim=(8, 12, 8), depth=2, seq_len=SEQ_LEN, **HEADS, ff_mult=2, hierarchies=(1, 8, 4),
    hierarchical_stride=(1, 4, 2), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip


def make(case: tuple[str, bool, dict[str, Any]], **settings: Any) -> nn.Module:
    """In float64, for a sequence of 40 tokens of width 12, and nothing left at the zeros and ones it starts with."""
    name, _, options = case
    own = dict(length=LENGTH, **HEADS) if name in ('attention', 'lsh') else {}
    if name == 'hyena':
        own = dict(length=LENGTH)
    if name == 'lsh':
        del own['length']
    torch.manual_seed(0)
    mixer = MIXERS[name](dim=DIM, **{**own, **options, **settings}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def in_model(case: tuple[str, bool, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Of a model whose coarse levels have that mixer; where heads are of the state, as many as every level can have."""
    name, _, options = case
    options = {**options, 'state_heads': 4} if 'state_heads' in options else dict(options)
    window = options.pop('window', None)
    own = dict(mixer=('attention', name, name), mixer_kwargs=(None, options, options), window_sizes=(3, window, window))
    return {**BASE, **changes, **own}


# one contract


@cases
def test_causal(case: tuple[str, bool, dict[str, Any]]) -> None:
    """To the bit; by a Fourier transform or a sort, but for rounding."""
    name, exact, _ = case
    model, ids = build(in_model(case)), torch.randint(0, 11, (2, SEQ_LEN))
    with torch.no_grad():
        before = model(ids)
        for at in (1, 7, 8, 30, SEQ_LEN - 1):
            changed = ids.clone()
            changed[:, at:] = (ids[:, at:] + 1 + torch.arange(SEQ_LEN - at)) % 11
            difference = (model(changed)[:, :at] - before[:, :at]).abs().max()
            assert difference == 0 if exact else difference < 1e-12, name


@cases
@given(data=st.data())
@settings(max_examples=4)
def test_chunks_equal_one_pass(case: tuple[str, bool, dict[str, Any]], data: st.DataObject) -> None:
    model, ids = build(in_model(case)), torch.randint(0, 11, (2, SEQ_LEN))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    with torch.set_grad_enabled(data.draw(st.booleans())):
        whole, _ = model(ids, return_state=True)
        torch.testing.assert_close(whole, model(ids), rtol=0, atol=1e-9)
        state, outs, at = None, [], 0
        for size in [*sizes, SEQ_LEN]:
            chunk = ids[:, at : at + size]
            if chunk.shape[1]:
                out, state = model(chunk, state=state, return_state=True)
                outs.append(out)
            at += size
        torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-8)


@cases
def test_chunks_equal_one_pass_far_beyond_its_length(case: tuple[str, bool, dict[str, Any]]) -> None:
    mixer, x = make(case), torch.randn(2, 4 * LENGTH, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = mixer(x, mixer.initial_state(2, x), 0)
        for size in (1, 7, 64):
            state, outs = mixer.initial_state(2, x), []
            for at in range(0, x.shape[1], size):
                out, state = mixer(x[:, at : at + size], state, at)
                outs.append(out)
            torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-8)


@cases
def test_the_state_stays_as_large_as_it_is_said_to_be(case: tuple[str, bool, dict[str, Any]]) -> None:
    name, _, options = case
    mixer, x = make(case), torch.randn(3, 30, DIM, dtype=torch.float64)
    heads, kv_heads = options.get('state_heads', DIM), options.get('kv_heads', 4)
    width = DIM // heads
    before, buckets, rounds = options.get('entries', 0) - 1, options.get('buckets', 16), options.get('rounds', 2)
    order, short = options.get('order', 2), options.get('short', 3)
    entries = (3, rounds, 4, buckets)
    expected = {
        'attention': [(3, kv_heads, options.get('window', LENGTH) + 1, 4)] * 2,
        'lsh': [(*entries, before, 4)] * 2 + [entries],
        'gateloop': [(3, heads, width, width, 2)],
        'simple-gateloop': [(3, DIM)],
        's4d': [(3, DIM, 4, 2)],
        'h3': [(3, options.get('shift_dim', 64) - 1, DIM), (3, DIM, 4, 2)],
        'hyena': [(3, short - 1, (order + 1) * DIM)] + [(3, LENGTH - 1, DIM)] * order,
    }[name]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = mixer.initial_state(3, x)
            assert [tuple(t.shape) for t in state] == expected
            addresses = [t.data_ptr() for t in state]
            kept = [t.clone() for t in state]
            for at, size in ((0, 20), (20, 1), (21, 9)):
                after = mixer(x[:, at : at + size], state, at)[1]
                assert [tuple(t.shape) for t in after] == expected
                if grad:
                    # what was passed in is as it was
                    assert all(torch.equal(t, old) for t, old in zip(state, kept, strict=True))
                    kept = [t.clone() for t in after]
                else:
                    assert [t.data_ptr() for t in after] == addresses
                state = after


@cases
def test_finite_at_many_positions(case: tuple[str, bool, dict[str, Any]]) -> None:
    # full attention takes a minute, and has a test of its own
    settings: dict[str, Any] = {}
    n = 100_000
    if case[0] == 'attention':
        # patterns take longer than others
        n = 40_000 if 'pattern' in case[2] else n
        settings = dict(length=n, stride=200) if 'pattern' in case[2] else dict(window=50)
    mixer = make(case, **settings).float()
    x = torch.randn(1, n, DIM, requires_grad=True)
    out, _ = mixer(x, None, 0)
    assert out.isfinite().all()
    assert out[:, -1000:].std() > 1e-4
    out[:, -1000:].sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in mixer.parameters())


@cases
def test_runs_in_half_precision_and_compiled(case: tuple[str, bool, dict[str, Any]]) -> None:
    model, ids = build(in_model(case, depth=1)), torch.randint(0, 11, (2, 25))
    expected, _ = model(ids, return_loss=True)
    wanted = list(model.parameters())
    gradients = torch.autograd.grad(expected, wanted)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    loss, _ = compiled(ids, return_loss=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), gradients)

    model = model.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, _ = model(ids, return_loss=True)
        loss.backward()
        with torch.no_grad():
            _, state = model(ids[:, :13], return_state=True)
            out, _ = model(ids[:, 13:], state=state, return_state=True)
    assert state.dtype == torch.float32
    assert out.isfinite().all()
    torch.testing.assert_close(loss.double(), expected, rtol=0.05, atol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@cases
def test_a_half_precision_model_is_near_the_exact_one_far_out(case: tuple[str, bool, dict[str, Any]]) -> None:
    name = case[0]
    exact, half = make(case).float(), make(case).bfloat16()
    # of weights that both have
    with torch.no_grad():
        for p, q in zip(exact.parameters(), half.parameters(), strict=True):
            p.copy_(q)
    x = torch.randn(1, 30, DIM).bfloat16()
    state = half.initial_state(1, x)
    with torch.no_grad():
        expected, _ = exact(x.float(), None, 0)
        out, _ = half(x, None, 0)
        steps = [half(x[:, i, None], state, i)[0] for i in range(30)]
    if name == 'lsh':
        # a rounded hash is another bucket
        assert out.isfinite().all()
        return
    assert out.dtype == torch.bfloat16
    for got in (out, torch.cat(steps, dim=1)):
        assert (got.float() - expected).norm() < 0.05 * expected.norm()


def in_half(config: dict[str, Any]) -> HierarchicalTransformer:
    """Built where half precision is what tensors are made in."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return HierarchicalTransformer(**config)
    finally:
        torch.set_default_dtype(torch.float32)


def on_meta(config: dict[str, Any]) -> HierarchicalTransformer:
    with torch.device('meta'):
        return HierarchicalTransformer(**config)


@cases
def test_what_is_exact_stays_so_however_a_model_becomes_half_precision(
    case: tuple[str, bool, dict[str, Any]],
) -> None:
    config, ids = in_model(case, depth=1), torch.randint(0, 11, (2, SEQ_LEN))
    model = build(config).float()
    weights = model.state_dict()
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights.items()}
    expected = deepcopy(model).bfloat16()

    built, assigned, copied = in_half(config), deepcopy(model), deepcopy(model)
    built.load_state_dict(weights)
    assigned.load_state_dict(rounded, assign=True)
    # rounded values do not take the place of those that they were rounded from
    copied.load_state_dict(rounded)
    for got in (built, assigned, copied.bfloat16()):
        kinds = {name: t.dtype for name, t in got.state_dict().items()}
        assert kinds == {name: t.dtype for name, t in expected.state_dict().items()}
        assert torch.equal(got(ids), expected(ids))

    # frequencies are what they are by definition; of others no more is known than was loaded
    for load, empty in ((rounded, on_meta(config)), (rounded, in_half(config))):
        empty.load_state_dict(load, assign=True)
        for name, t in empty.state_dict().items():
            kept = expected.state_dict()[name]
            assert t.dtype == kept.dtype
            assert torch.equal(t, kept if name.endswith('freqs') else rounded[name].to(t.dtype))


def test_frequencies_of_one_s_own_are_loaded() -> None:
    rotary, other = (Rotary(8, pairs='halves') for _ in range(2))
    rotary.freqs.mul_(0.25)
    other.load_state_dict({'freqs': rotary.freqs.bfloat16()}, assign=True)
    assert torch.equal(other.freqs, rotary.freqs.bfloat16().float())
    other.load_state_dict(rotary.state_dict())
    other.load_state_dict({'freqs': rotary.freqs.bfloat16()})
    assert torch.equal(other.freqs, rotary.freqs)


def test_a_half_precision_ssm_keeps_its_time_scales() -> None:
    ssm, n = DiagonalSSM(16, state_dim=32, init='lin', fft='torch'), 3000
    u = torch.randn(1, n, 16).bfloat16()
    expected, _ = ssm(u.float())
    ssm.bfloat16()
    assert {p.dtype for p in (ssm.log_dt, ssm.a_imag)} == {torch.float32}
    assert ssm.c.dtype == torch.bfloat16
    state = ssm.initial_state(1, u)
    with torch.no_grad():
        out, _ = ssm(u)
        _, state = ssm(u[:, :1500], state)
        rest, _ = ssm(u[:, 1500:], state)
    for got in (out[:, 1500:], rest):
        assert (got.float() - expected[:, 1500:]).norm() < 0.03 * expected[:, 1500:].norm()


def test_hyena_s_filters_are_made_anew_where_weights_change() -> None:
    mixer, x = make(CASES['hyena']).float(), torch.randn(1, 20, DIM)
    with torch.no_grad():
        before = mixer(x, None, 0)[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            mixer(x, None, 0)
        # whatever was formed under autocast
        assert torch.equal(mixer(x, None, 0)[0], before)
        mixer.filters.to_filters.weight.mul_(torch.rand(2 * DIM, 1) + 0.5).add_(0.1)
        after = mixer(x, None, 0)[0]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, mixer(x, None, 0)[0])


@pytest.mark.parametrize('name', ['gateloop', 'simple-gateloop'])
def test_transforms_of_functions_see_through_a_recurrence(name: str) -> None:
    mixer, x = make(CASES[name]), torch.randn(1, 9, DIM, dtype=torch.float64)
    weights = dict(mixer.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(mixer, weights, (x, None, 0))[0].square().sum()

    ours = torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
    expected = torch.autograd.grad(loss(weights), list(weights.values()))
    torch.testing.assert_close(list(ours.values()), list(expected))


# each written out


def heads_of(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def pattern_written_out(i: int, *, pattern: str, parts: tuple[str, ...], stride: int, summary: int) -> list[int]:
    """Which tokens a token attends to, one by one."""

    def holds(j: int) -> bool:
        near = i - j <= stride if pattern == 'strided' else j // stride == i // stride
        far = (i - j) % stride == 0 if pattern == 'strided' else j % stride >= stride - summary
        return j == i or ('near' in parts and near) or ('far' in parts and far)

    return [j for j in range(i + 1) if holds(j)]


@given(
    i=st.integers(0, 90), first=st.integers(0, 90), stride=st.integers(1, 9), summary=st.integers(1, 9),
    pattern=st.sampled_from(['strided', 'fixed']), parts=st.sampled_from([('near',), ('far',), ('near', 'far')]),
)  # fmt: skip
def test_attended_is_the_pattern(i: int, first: int, **pattern: Any) -> None:
    first, pattern['summary'] = min(first, i), min(pattern['summary'], pattern['stride'])
    assert attended(i, first=first, **pattern) == [j for j in pattern_written_out(i, **pattern) if j >= first]


def attention_written_out(mixer: Attention, x: Tensor) -> Tensor:
    """Head by head, each query with its keys one by one."""
    n, kv = x.shape[1], mixer.kv_heads
    qkv = heads_of(mixer.to_qkv(mixer.norm(x)), 4 + 2 * kv)
    q, k, v = qkv.split((4, kv, kv), dim=1)
    turned = mixer.rotary_emb(torch.stack((q, k.repeat(1, 4 // kv, 1, 1))))
    outs = []
    for h in range(4):
        near = [settings for part, settings in mixer.patterns or () if h % kv in range(kv)[part]]
        row = []
        for i in range(n):
            first = 0 if mixer.window is None else max(i - mixer.window, 0)
            at = pattern_written_out(i, **near[0]) if near else list(range(first, i + 1))
            weights = (turned[0][:, h, i, None] * turned[1][:, h, at]).sum(-1).div(2).softmax(-1)
            row.append((weights[..., None] * v[:, h % kv, at]).sum(1))
        outs.append(torch.stack(row, dim=1))
    return mixer.to_out(torch.cat(outs, dim=-1))


def lsh_written_out(mixer: LSHAttention, x: Tensor) -> Tensor:
    qk, v = (heads_of(to(mixer.norm(x)), 4) for to in (mixer.to_qk, mixer.to_v))
    along = torch.einsum('bhnd,rhdk->rbhnk', qk, mixer.rotations)
    buckets = torch.cat((along, -along), dim=-1).argmax(-1)
    q, k = mixer.rotary_emb(torch.stack((qk, F.normalize(qk, dim=-1))))
    outs, totals = torch.zeros(mixer.rounds, *q.shape, dtype=x.dtype), torch.zeros(buckets.shape, dtype=x.dtype)
    for place in torch.cartesian_prod(*map(torch.arange, buckets.shape)).tolist():
        r, b, h, i = place
        at = [j for j in range(i + 1) if buckets[r, b, h, j] == buckets[r, b, h, i]][-(mixer.before + 1) :]
        scores = torch.stack([q[b, h, i] @ k[b, h, j] / 2 if j != i else q.new_tensor(-1e5) for j in at])
        outs = outs.index_put(tuple(map(torch.tensor, place)), scores.softmax(0) @ v[b, h, at])
        totals = totals.index_put(tuple(map(torch.tensor, place)), scores.logsumexp(0))
    mixed = (outs * totals.softmax(0)[..., None]).sum(0)
    return mixer.to_out(mixed.transpose(1, 2).flatten(2))


def gateloop_written_out(mixer: GateLoop, x: Tensor) -> Tensor:
    normed, heads = mixer.norm(x), mixer.heads
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in mixer.to_qkv(normed).chunk(3, dim=-1))
    alpha, beta = (t.unflatten(-1, (heads, -1)) for t in mixer.to_gates(normed).chunk(2, dim=-1))
    memory: Any = 0
    outs = []
    for n in range(x.shape[1]):
        gate = alpha[:, n].sigmoid() * torch.exp(1j * beta[:, n])
        memory = gate[..., None] * memory + torch.einsum('bhi,bhj->bhij', k[:, n], v[:, n])
        outs.append(torch.einsum('bhi,bhij->bhj', q[:, n].to(memory.dtype), memory).real.flatten(1))
    y = mixer.out_norm(torch.stack(outs, dim=1))
    return mixer.to_out(y * F.silu(mixer.to_out_gate(normed)))


def simple_gateloop_written_out(mixer: SimpleGateLoop, x: Tensor) -> Tensor:
    normed = mixer.norm(x)
    (q, kv), gates = mixer.to_qkv(normed).chunk(2, dim=-1), mixer.to_gates(normed).sigmoid()
    h, outs = torch.zeros_like(x[:, 0]), []
    for n in range(x.shape[1]):
        h = gates[:, n] * h + kv[:, n]
        outs.append(q[:, n] * h)
    return torch.stack(outs, dim=1)


def ssm_written_out(ssm: DiagonalSSM, u: Tensor) -> Tensor:
    """`x' = A x + u` held constant over each step, both halves of the pairs, matrix by matrix."""
    a = torch.complex(-ssm.log_a_real.exp(), ssm.a_imag)
    a, c = torch.cat((a, a.conj()), dim=-1), torch.view_as_complex(ssm.c)
    c, dt = torch.cat((c, c.conj()), dim=-1), ssm.log_dt.exp()[:, None]
    transition, into = torch.exp(dt * a), (torch.exp(dt * a) - 1) / a
    state, outs = torch.zeros(len(u), *a.shape, dtype=a.dtype), []
    for n in range(u.shape[1]):
        state = transition * state + into * u[:, n, :, None]
        outs.append((c * state).sum(-1).real + ssm.d * u[:, n])
    return torch.stack(outs, dim=1)


def s4d_written_out(mixer: S4D, x: Tensor) -> Tensor:
    left, right = mixer.to_out(F.gelu(ssm_written_out(mixer.ssm, mixer.norm(x)))).chunk(2, dim=-1)
    return left * right.sigmoid()


def taps_written_out(kernel: Tensor, x: Tensor) -> Tensor:
    """Tap by tap, the newest first."""
    return sum(F.pad(x, (0, 0, s, 0))[:, : x.shape[1]] * tap for s, tap in enumerate(kernel))  # type: ignore[return-value]


def h3_written_out(mixer: H3, x: Tensor) -> Tensor:
    q, k, v = mixer.to_qkv(mixer.norm(x)).chunk(3, dim=-1)
    # the state of the shift model are the last keys, each step moved on by one
    memory, shifted = torch.zeros(len(x), len(mixer.shift_ssm.kernel), DIM, dtype=x.dtype), []
    for n in range(x.shape[1]):
        memory = torch.cat((k[:, n, None], memory[:, :-1]), dim=1)
        shifted.append((mixer.shift_ssm.kernel * memory).sum(1))
    return mixer.to_out(q * ssm_written_out(mixer.ssm, torch.stack(shifted, dim=1) * v))


def hyena_written_out(mixer: Hyena, x: Tensor) -> Tensor:
    made = mixer.filters
    t = torch.arange(LENGTH, dtype=x.dtype)[:, None] / (LENGTH - 1)
    angles = 2 * math.pi * t * torch.linspace(1e-4, 7, 8, dtype=x.dtype)
    hidden = torch.cat((t, angles.cos(), angles.sin()), dim=-1)
    for i in range(2):
        hidden = torch.sin(made.frequency[i] * made.to_hidden[i](hidden))
    fall = torch.exp(-t * (-math.log(0.01) / torch.linspace(1.5, 0.3, mixer.order * DIM, dtype=x.dtype)))
    filters = made.to_filters(hidden) * fall
    filters = filters / filters.abs().sum(0)
    parts = taps_written_out(mixer.short_conv.kernel, mixer.to_in(mixer.norm(x))).chunk(mixer.order + 1, dim=-1)
    v = parts[0]
    for gate, taps, bias in zip(parts[1:], filters.chunk(mixer.order, dim=-1), mixer.skip_bias, strict=True):
        v = gate * (taps_written_out(taps, v) + bias * v)
    return mixer.to_out(v)


WRITTEN_OUT: dict[str, Callable[..., Tensor]] = {
    'attention': attention_written_out,
    'lsh': lsh_written_out,
    'gateloop': gateloop_written_out,
    'simple-gateloop': simple_gateloop_written_out,
    's4d': s4d_written_out,
    'h3': h3_written_out,
    'hyena': hyena_written_out,
}


@cases
def test_numbers_and_gradients_are_those_written_out(case: tuple[str, bool, dict[str, Any]]) -> None:
    name = case[0]
    n = 15 if name == 'lsh' else 33
    for layer in (0, 1) if case[2].get('pattern_mode', '') == '' and 'pattern' in case[2] else (None,):
        mixer = make(case) if layer is None else make(case, layer=layer)
        x = torch.randn(2, n, DIM, dtype=torch.float64, requires_grad=True)
        ours, expected = mixer(x, None, 0)[0], WRITTEN_OUT[name](mixer, x)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        towards, wanted = torch.randn_like(ours), [x, *mixer.parameters()]
        for got, right in zip(
            torch.autograd.grad((ours * towards).sum(), wanted, allow_unused=True),
            torch.autograd.grad((expected * towards).sum(), wanted, allow_unused=True),
            strict=True,
        ):
            # what nothing hangs on has no gradient in one form, and one of zeros in the other
            got, right = (torch.zeros(()) if g is None else g for g in (got, right))
            torch.testing.assert_close(*torch.broadcast_tensors(got.double(), right.double()), rtol=1e-6, atol=1e-9)


@given(n=st.integers(1, 70), complex_=st.booleans(), wide=st.booleans())
def test_scan_is_the_recurrence(n: int, complex_: bool, wide: bool) -> None:
    dtype = torch.complex128 if complex_ else torch.float64
    a = torch.randn(2, n, 3, 1 if wide else 4, dtype=dtype).requires_grad_()
    b = torch.randn(2, n, 3, 4, dtype=dtype, requires_grad=True)
    initial = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    # gates of at most 1, some of them zero
    gates = a / a.abs().detach().clamp(min=1) * (torch.rand(2, n, 3, 1) > 0.2)
    h, steps = initial, []
    for t in range(n):
        h = gates[:, t] * h + b[:, t]
        steps.append(h)
    expected, ours = torch.stack(steps, dim=1), scan(gates, b, initial)
    torch.testing.assert_close(ours, expected)
    towards = torch.randn_like(ours)
    for got, right in zip(
        torch.autograd.grad((ours * towards).abs().square().sum(), (a, b, initial), retain_graph=True),
        torch.autograd.grad((expected * towards).abs().square().sum(), (a, b, initial)),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


@given(n=st.integers(1, 70), taps=st.integers(1, 90), fft=st.sampled_from(['torch', 'monarch']))
def test_convolution_is_the_sum_over_taps(n: int, taps: int, fft: str) -> None:
    x, kernel = torch.randn(2, n, 3, dtype=torch.float64), torch.randn(taps, 3, dtype=torch.float64)
    torch.testing.assert_close(causal_conv(x, kernel, fft), taps_written_out(kernel, x), rtol=0, atol=1e-12)


# what is kept between steps


def scale_data(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1.25)


def swap_data(model: nn.Module) -> None:
    """As an average of weights is swapped in."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data * 1.25


def assign(model: nn.Module) -> None:
    weights = {name: t * 1.25 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def steps_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last ids, one by one after a chunk."""
    with torch.no_grad():
        out, state = model(ids[:, :-3], return_state=True)
        outs = []
        for at in range(ids.shape[1] - 3, ids.shape[1]):
            out, state = model(ids[:, at : at + 1], state=state, return_state=True)
            outs.append(out)
    return torch.cat(outs, dim=1)


@cases
def test_nothing_that_is_kept_outlives_the_weights_it_was_made_of(case: tuple[str, bool, dict[str, Any]]) -> None:
    config, ids = in_model(case, depth=1), torch.randint(0, 11, (2, 11))
    model, fresh = build(config), build(config)
    before = steps_of(model, ids)
    for change in (scale_data, swap_data, assign):
        change(model)
        change(fresh)
        after = steps_of(model, ids)
        assert not torch.equal(after, before)
        # a copy has read nothing yet
        assert torch.equal(after, steps_of(deepcopy(fresh), ids)), change
        before = after


@cases
def test_threads_do_not_disturb_each_other(case: tuple[str, bool, dict[str, Any]]) -> None:
    """One reads between any two lines of the other's step: a switch at the worst moment comes too seldom by itself."""
    mixer = make(case)
    x = torch.randn(1, 1, DIM, dtype=torch.float64)

    def read(start: int) -> Tensor:
        with torch.no_grad():
            return mixer(x, mixer.initial_state(1, x), start)[0]

    # of a table of positions each has another row
    here, there = 3, 3000
    expected, interrupted = read(here), []
    package = str(Path(mixers.__file__).parent)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == 'line':
            interrupted.append(other.submit(read, there).result())
        return trace

    with ThreadPoolExecutor(1) as other:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            got = read(here)
        finally:
            sys.settrace(before)
    assert len(interrupted) > 5
    assert torch.equal(got, expected)


@pytest.mark.parametrize('name', ['to_hidden.0', 'to_filters'])
def test_a_change_to_the_network_of_filters_takes_effect(name: str) -> None:
    mixer, x = make(CASES['hyena']), torch.randn(2, 5, DIM, dtype=torch.float64)
    layer = mixer.filters.get_submodule(name)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            state, steps = mixer.initial_state(2, x), []
            for i in range(x.shape[1]):
                out, state = mixer(x[:, i : i + 1], state, i)
                steps.append(out)
        return [mixer(x)[0], torch.cat(steps, dim=1)]

    before = outputs()
    hook = layer.register_forward_hook(lambda _, __, out: 2 * out + 1)
    hooked = outputs()
    hook.remove()
    torch.testing.assert_close(*hooked)
    assert not torch.allclose(hooked[0], before[0])
    torch.testing.assert_close(outputs(), before)
    mixer.filters.set_submodule(name, nn.Sequential(layer, nn.Tanh()))
    replaced = outputs()
    torch.testing.assert_close(*replaced)
    assert not torch.allclose(replaced[0], before[0])


def test_the_last_result_is_that_of_the_values_at_hand() -> None:
    kept, called = ResultCache(), []

    def double(x: Tensor, factor: int) -> Tensor:
        called.append(factor)
        return x * factor

    x = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        for factor in (2, 2, 3, 2):
            assert torch.equal(kept(double, (x,), factor), x * factor)
        assert called == [2, 3, 2]
        x.data[1] = 5
        assert torch.equal(kept(double, (x,), 2), x * 2)
        # no copy of a module carries it along
        assert deepcopy(kept)._last is None
    # a result with a graph is kept for nobody
    assert kept(double, (x,), 2).requires_grad
    assert len(called) == 5
    with torch.device('meta'):
        assert kept(double, (torch.ones(3),), 2).is_meta


# in a model


class Average(nn.Module):
    """A mixer from outside: the mean of all tokens so far."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(dim)
        self.to_out = nn.Linear(dim, dim)

    def initial_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        return (like.new_zeros(batch, self.norm.normalized_shape[0]),)

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None, start: int) -> tuple[Tensor, Any]:
        total = self.norm(x).cumsum(dim=1) + (0 if state is None else state[0][:, None])
        count = torch.arange(start + 1, start + x.shape[1] + 1)[:, None]
        if state is not None:
            state = (total[:, -1],) if torch.is_grad_enabled() else (state[0].copy_(total[:, -1]),)
        return self.scale * self.to_out(total / count), state


def test_a_mixer_from_outside() -> None:
    config = dict(BASE, mixer=('attention', Average, Average), mixer_kwargs=(None, dict(scale=0.5), None))
    model, ids = build(config), torch.randint(0, 11, (2, SEQ_LEN))
    assert [model.layers[1][i].attn.scale for i in (1, 2)] == [0.5, 1.0]
    whole = model(ids)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state, outs = None, []
            for chunk in ids.split([5, 1, 1, 20, 21], dim=1):
                out, state = model(chunk, state=state, return_state=True)
                outs.append(out)
            torch.testing.assert_close(torch.cat(outs, dim=1), whole)


def test_three_mixers_learn_are_saved_loaded_and_sampled_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HierarchicalTransformer(
        num_tokens=8, dim=24, depth=2, seq_len=24, dim_head=12, heads=2, window_sizes=(1, None, None),
        hierarchies=(1, 2, 4), hierarchical_stride=(1, 2, 4), mixer=('attention', 'gateloop', 's4d'),
        mixer_kwargs=(None, dict(state_heads=12), dict(state_dim=16)), recon_loss_weight=0.0,
        next_latent_loss_weight=0.0,
    )  # fmt: skip
    assert loss_of_a_copy(model, steps=150) < 0.5

    model.save_pretrained(tmp_path)
    again = HierarchicalTransformer.from_pretrained(tmp_path)
    prompt = torch.randint(1, 8, (2, 9))
    new = again.generate(prompt, 30, temperature=0)
    assert torch.equal(new, model.generate(prompt, 30, temperature=0))
    assert torch.equal(new[:, :15], model.generate(prompt, 15, temperature=0, use_cache=False))


def test_fewer_heads_of_keys_are_a_smaller_state() -> None:
    whole, grouped = (build(dict(BASE, mixer_kwargs=kwargs)).initial_state(1) for kwargs in (None, dict(kv_heads=1)))
    sizes = [
        sum(t.nbytes for layer in state.blocks for block in layer for t in block.mixer) for state in (whole, grouped)
    ]
    assert sizes[0] == 4 * sizes[1]


def test_grouped_queries_are_heads_whose_keys_are_alike() -> None:
    grouped = make(CASES['grouped queries'])
    plain = Attention(dim=DIM, **HEADS, length=LENGTH).double()
    q, k, v = grouped.to_qkv.weight.unflatten(0, (8, 4)).split((4, 2, 2))
    weights = {name: weight for name, weight in grouped.state_dict().items() if name != 'to_qkv.weight'}
    plain.load_state_dict({**weights, 'to_qkv.weight': torch.cat((q, k, k, v, v)).flatten(0, 1)})
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    torch.testing.assert_close(grouped(x)[0], plain(x)[0])


def test_a_state_moves_to_another_dtype_and_counts_stay_whole() -> None:
    model = build(in_model(CASES['lsh']))
    _, state = model(torch.randint(0, 11, (2, 20)), return_state=True)
    moved = state.to(torch.float32)
    kinds = {t.dtype for t in moved.tensors()}
    assert kinds == {torch.float32, torch.int64}
    assert state.to(torch.float64) is state


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(mixer='mamba'), 'mixer must be one of attention, lsh, gateloop, simple-gateloop, s4d, h3, hyena, or a'),
        (dict(mixer=nn.Identity()), 'or a class of modules, got Identity() for hierarchy 1'),
        (dict(mixer=('attention', 's4d')), 'mixer must be one value or one for each of the 3 hierarchies'),
        (dict(mixer=('attention', ['s4d'], 's4d')), "or a class of modules, got ['s4d'] for hierarchy 8"),
        (dict(mixer_kwargs=dict(bogus=2), window_sizes=0), "stride, summary for mixer Attention, got 'bogus'"),
        (dict(mixer_kwargs=3), 'mixer_kwargs must be a dict or None, got 3 for hierarchy 1'),
        (dict(mixer='s4d', mixer_kwargs=dict(order=2)), 'of hierarchy 1 must be of state_dim, init, fft for mixer S4D'),
        (dict(mixer='hyena', mixer_kwargs=dict(length=2)), "short, filter_dim, fft for mixer Hyena, got 'length'"),
        (dict(mixer='simple-gateloop', mixer_kwargs=dict(a=1)), "must be of none for mixer SimpleGateLoop, got 'a'"),
        (dict(mixer_kwargs=dict(kv_heads=3)), 'kv_heads must divide the 4 heads, got 3'),
        (dict(mixer_kwargs=dict(kv_heads=0)), 'kv_heads must be an integer of at least 1, got 0'),
        (dict(mixer_kwargs=dict(pattern='dense')), "pattern must be one of strided, fixed, got 'dense'"),
        (dict(mixer_kwargs=dict(stride=4)), 'pattern_mode, stride and summary are for a pattern, and pattern is'),
        (dict(mixer_kwargs=dict(pattern='strided', stride=0)), 'stride must be an integer of at least 1, got 0'),
        (dict(mixer_kwargs=dict(pattern='strided', summary=1)), "summary is for pattern = 'fixed', got 1 for"),
        (dict(mixer_kwargs=dict(pattern='fixed', stride=4, summary=5)), 'summary must be at most the stride of 4'),
        (dict(mixer_kwargs=dict(pattern='fixed', pattern_mode='both')), 'pattern_mode must be one of interleave'),
        (
            dict(mixer_kwargs=dict(pattern='fixed', pattern_mode='heads', kv_heads=1)),
            "pattern_mode = 'heads' needs two heads or more (kv_heads), got 1",
        ),
        (
            dict(mixer_kwargs=dict(pattern='fixed'), window_sizes=3),
            'pattern is for full attention, and window_sizes is 3',
        ),
        (dict(mixer='lsh', mixer_kwargs=dict(buckets=3)), 'buckets must be even (directions and their opposites)'),
        (dict(mixer='lsh', dim_head=3), 'dim_head must be even (rotary embeddings turn pairs of channels), got 3'),
        (dict(mixer='gateloop', mixer_kwargs=dict(state_heads=5)), 'state_heads must divide dim 8, got 5'),
        (dict(mixer='s4d', mixer_kwargs=dict(state_dim=5)), 'state_dim must be even (complex numbers come in pairs)'),
        (dict(mixer='s4d', mixer_kwargs=dict(init='legs')), "init must be one of lin, inv, got 'legs'"),
        (dict(mixer='h3', mixer_kwargs=dict(fft='learned')), "fft must be one of torch, monarch, got 'learned'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)  # fmt: skip
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HierarchicalTransformer(**{**BASE, **arguments})
