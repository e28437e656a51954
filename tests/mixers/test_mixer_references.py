"""Every mixer against a reference that computes step by step or pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.mixers import CASES, DIM, LENGTH, cases, make, taps_written_out
from torch import Tensor

from simple_hierarchical_transformer.mixers import (
    H3,
    S4D,
    Attention,
    GateLoop,
    Hyena,
    LSHAttention,
    SimpleGateLoop,
)
from simple_hierarchical_transformer.mixers.ssm import DiagonalSSM
from simple_hierarchical_transformer.ops.pattern_attention import attended


def heads_of(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def pattern_reference(i: int, *, pattern: str, parts: tuple[str, ...], stride: int, summary: int) -> list[int]:
    """The tokens that a token attends to, tested one by one."""

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
    assert attended(i, first=first, **pattern) == [j for j in pattern_reference(i, **pattern) if j >= first]


def attention_reference(mixer: Attention, x: Tensor) -> Tensor:
    """Head by head and query by query."""
    n, kv = x.shape[1], mixer.kv_heads
    qkv = heads_of(mixer.to_qkv(mixer.norm(x)), 4 + 2 * kv)
    q, k, v = qkv.split((4, kv, kv), dim=1)
    rotated = mixer.rotary_emb(torch.stack((q, k.repeat(1, 4 // kv, 1, 1))))
    outs = []
    for h in range(4):
        near = [settings for part, settings in mixer.patterns or () if h % kv in range(kv)[part]]
        row = []
        for i in range(n):
            first = 0 if mixer.window is None else max(i - mixer.window, 0)
            at = pattern_reference(i, **near[0]) if near else list(range(first, i + 1))
            weights = (rotated[0][:, h, i, None] * rotated[1][:, h, at]).sum(-1).div(2).softmax(-1)
            row.append((weights[..., None] * v[:, h % kv, at]).sum(1))
        outs.append(torch.stack(row, dim=1))
    return mixer.to_out(torch.cat(outs, dim=-1))


def lsh_reference(mixer: LSHAttention, x: Tensor) -> Tensor:
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


def gateloop_reference(mixer: GateLoop, x: Tensor) -> Tensor:
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


def simple_gateloop_reference(mixer: SimpleGateLoop, x: Tensor) -> Tensor:
    normed = mixer.norm(x)
    (q, kv), gates = mixer.to_qkv(normed).chunk(2, dim=-1), mixer.to_gates(normed).sigmoid()
    h, outs = torch.zeros_like(x[:, 0]), []
    for n in range(x.shape[1]):
        h = gates[:, n] * h + kv[:, n]
        outs.append(q[:, n] * h)
    return torch.stack(outs, dim=1)


def ssm_reference(ssm: DiagonalSSM, u: Tensor) -> Tensor:
    """`x' = A x + u` held constant over each step, with both numbers of each conjugate pair."""
    a = torch.complex(-ssm.log_a_real.exp(), ssm.a_imag)
    a, c = torch.cat((a, a.conj()), dim=-1), torch.view_as_complex(ssm.c)
    c, dt = torch.cat((c, c.conj()), dim=-1), ssm.log_dt.exp()[:, None]
    transition, input_factor = torch.exp(dt * a), (torch.exp(dt * a) - 1) / a
    state, outs = torch.zeros(len(u), *a.shape, dtype=a.dtype), []
    for n in range(u.shape[1]):
        state = transition * state + input_factor * u[:, n, :, None]
        outs.append((c * state).sum(-1).real + ssm.d * u[:, n])
    return torch.stack(outs, dim=1)


def s4d_reference(mixer: S4D, x: Tensor) -> Tensor:
    left, right = mixer.to_out(F.gelu(ssm_reference(mixer.ssm, mixer.norm(x)))).chunk(2, dim=-1)
    return left * right.sigmoid()


def h3_reference(mixer: H3, x: Tensor) -> Tensor:
    q, k, v = mixer.to_qkv(mixer.norm(x)).chunk(3, dim=-1)
    # the state of the shift model has the last keys, and moves by one position in each step
    memory, shifted = torch.zeros(len(x), len(mixer.shift_ssm.kernel), DIM, dtype=x.dtype), []
    for n in range(x.shape[1]):
        memory = torch.cat((k[:, n, None], memory[:, :-1]), dim=1)
        shifted.append((mixer.shift_ssm.kernel * memory).sum(1))
    return mixer.to_out(q * ssm_reference(mixer.ssm, torch.stack(shifted, dim=1) * v))


def hyena_reference(mixer: Hyena, x: Tensor) -> Tensor:
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


REFERENCES: dict[str, Callable[..., Tensor]] = {
    'attention': attention_reference,
    'lsh': lsh_reference,
    'gateloop': gateloop_reference,
    'simple-gateloop': simple_gateloop_reference,
    's4d': s4d_reference,
    'h3': h3_reference,
    'hyena': hyena_reference,
}


@cases
def test_outputs_and_gradients_equal_the_reference(case: tuple[str, bool, dict[str, Any]]) -> None:
    name = case[0]
    n = 15 if name == 'lsh' else 33
    for layer in (0, 1) if case[2].get('pattern_mode', '') == '' and 'pattern' in case[2] else (None,):
        mixer = make(case) if layer is None else make(case, layer=layer)
        x = torch.randn(2, n, DIM, dtype=torch.float64, requires_grad=True)
        ours, expected = mixer(x, None, 0)[0], REFERENCES[name](mixer, x)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        towards, wanted = torch.randn_like(ours), [x, *mixer.parameters()]
        for got, right in zip(
            torch.autograd.grad((ours * towards).sum(), wanted, allow_unused=True),
            torch.autograd.grad((expected * towards).sum(), wanted, allow_unused=True),
            strict=True,
        ):
            # an unused parameter has no gradient in one form, and zeros in the other
            got, right = (torch.zeros(()) if g is None else g for g in (got, right))
            torch.testing.assert_close(*torch.broadcast_tensors(got.double(), right.double()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', ['gateloop', 'simple-gateloop'])
def test_function_transforms_differentiate_a_recurrence(name: str) -> None:
    mixer, x = make(CASES[name]), torch.randn(1, 9, DIM, dtype=torch.float64)
    weights = dict(mixer.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(mixer, weights, (x, None, 0))[0].square().sum()

    ours = torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
    expected = torch.autograd.grad(loss(weights), list(weights.values()))
    torch.testing.assert_close(list(ours.values()), list(expected))
