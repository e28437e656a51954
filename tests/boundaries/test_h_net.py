"""Learned boundaries, smoothing, residual and ratio loss against H-Net's formulas, token by token in float64.

Hwang et al. 2025, arXiv 2507.07955, equations 4 to 10.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.configs import SMALL, build
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer

H_NET: dict[str, Any] = dict(
    SMALL, arrangement='hourglass', hierarchies=(1, 4), boundaries=(None, 'learned'), upsample='smooth', merge='skip',
    depth=(2, 1), ignore_index=-1, recon_loss_weight=0.0, next_latent_loss_weight=0.0,
)  # fmt: skip
THREE_STAGES: dict[str, Any] = dict(
    H_NET, hierarchies=(1, 2, 8), boundaries=(None, 'learned', 'learned'), depth=(2, 2, 1), dim=(8, 12, 12)
)
EPS = 1e-4


def h_net(model: HierarchicalTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of one row of ids `(n,)`, and the sum of its ratio losses."""
    ratios = []

    def stage(k: int, finer: Tensor) -> Tensor:
        i = model.order[k]
        level = model.levels[i]
        # a map of each token, then a norm
        x, _ = model.compressors[i](finer[None])
        x = model.post_token_emb_norms[i](x)
        blocks = [model.layers[layer][i] for layer in range(level.depth)]
        last = k + 1 == len(model.order)
        before = level.depth if last else level.depth // 2
        for block in blocks[:before]:
            x = block(x)[0]
        x = x[0]
        if last:
            return x

        rule = model.boundaries[str(model.order[k + 1])]
        n = len(x)
        p = [torch.ones((), dtype=x.dtype)]
        for t in range(1, n):
            q, key = rule.to_q.weight @ x[t - 1], rule.to_k.weight @ x[t]
            p.append((1 - (q @ key) / (q.norm() * key.norm())) / 2)
        b = [bool(each > 0.5) for each in p]

        inner = stage(k + 1, torch.stack([x[t] for t in range(n) if b[t]]))
        smoothed, chunk, out = torch.zeros(inner.shape[-1], dtype=x.dtype), -1, []
        merge = model.hierarchical_merges[k]
        for t in range(n):
            if b[t]:
                chunk += 1
                kept = p[t].clamp(EPS, 1 - EPS)
                smoothed = kept * inner[chunk] + (1 - kept) * smoothed
            c = p[t] if b[t] else 1 - p[t]
            factor = c + (1 - c).detach()
            passed = smoothed * factor
            out.append(
                merge.residual.weight @ x[t] + (passed if len(passed) == len(x[t]) else merge.to_finer.weight @ passed)
            )
        f, g = sum(b) / n, sum(p) / n
        size = model.levels[model.order[k + 1]].compression / level.compression
        ratios.append(size / (size - 1) * ((size - 1) * f * g + (1 - f) * (1 - g)))

        x = torch.stack(out)[None]
        for block in blocks[before:]:
            x = block(x)[0]
        return x[0]

    final = stage(0, model.token_emb.weight[ids])
    return model.to_logits(model.norms[model.order[0]](final)), sum(ratios, torch.zeros(()))


@pytest.mark.parametrize('config', [H_NET, dict(H_NET, dim=(8, 12)), THREE_STAGES], ids=['one', 'wider', 'two'])
def test_values_and_gradients_are_those_of_h_net(config: dict[str, Any]) -> None:
    model = build(config)
    ids, labels = torch.randint(0, 11, (3, 30)), torch.randint(0, 11, (3, 30))
    loss, parts = model(ids, labels=labels, return_loss=True)
    rows = [h_net(model, row) for row in ids]
    logits = torch.stack([row[0] for row in rows])
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-10)

    ratio = sum(row[1] for row in rows) / 3
    found = sum(part for name, part in parts.named.items() if name.startswith('ratio'))
    torch.testing.assert_close(found, ratio, rtol=0, atol=1e-10)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.03 * ratio
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)

    weights = dict(model.named_parameters())
    ours = torch.autograd.grad(loss, weights.values(), allow_unused=True)
    theirs = torch.autograd.grad(expected, weights.values(), allow_unused=True)
    for name, mine, its in zip(weights, ours, theirs, strict=True):
        assert its is not None, name
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10, msg=lambda said, name=name: f'{name}: {said}')
    assert any(weight.abs().max() > 1e-6 for name, weight in zip(weights, ours, strict=True) if 'boundaries' in name)


def test_it_starts_with_a_residual_of_zero_in_float32() -> None:
    model = HierarchicalTransformer(**H_NET)
    assert not model.hierarchical_merges[0].residual.weight.any()
    merge, x = model.hierarchical_merges[0], torch.randn(1, 9, 8)
    inner = torch.randn(1, 9, 8)
    (merged, _), _ = merge([x, inner])
    torch.testing.assert_close(merged, inner)
    seen = []
    merge.residual.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model(torch.randint(0, 11, (1, 9)))
    assert seen == [torch.float32]


def test_without_a_gradient_the_factor_is_left_out() -> None:
    model, ids = build(H_NET), torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        plain = model(ids)
    torch.testing.assert_close(model(ids), plain, rtol=0, atol=1e-12)


def test_the_ratio_loss_is_1_at_the_intended_share() -> None:
    """And its gradient pushes the probability down where there are too many boundaries."""
    n = 4.0

    def ratio(f: float, g: Tensor) -> Tensor:
        return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))

    assert ratio(1 / n, torch.tensor(1 / n)).item() == pytest.approx(1)
    for share, sign in ((0.5, 1), (0.1, -1)):
        g = torch.tensor(share, requires_grad=True)
        ratio(share, g).backward()
        assert g.grad.sign() == sign

    model = HierarchicalTransformer(**dict(H_NET, ratio_loss_weight=1.0, dim=16))
    optimizer, ids = torch.optim.Adam(model.parameters(), lr=1e-2), torch.randint(0, 11, (8, 40))
    shares = []
    for _ in range(40):
        _, parts = model(ids, return_loss=True)
        parts.named['ratio/4x'].backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(parts.named['pieces/4x'].item())
    assert abs(shares[-1] - 1 / 4) < 0.08 < abs(shares[0] - 1 / 4)
