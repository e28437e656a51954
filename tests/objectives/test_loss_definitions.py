"""Losses equal their definitions, computed token by token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.configs import SEQ_LEN, build, configs
from torch import Tensor

# placed levels have a test of their own
STRIDED = configs().filter(lambda config: not any(config.get('boundaries', ())))


@given(config=STRIDED, n=st.integers(2, SEQ_LEN), seed=st.integers(0, 9))
def test_losses_equal_their_definitions(config: dict[str, Any], n: int, seed: int) -> None:
    """The definitions loop over tokens and rollouts, without tensor operations over the sequence."""
    model = build(config, seed)
    weights = model.loss_weights
    ids = torch.randint(0, 11, (2, n + 1))
    ids[torch.rand(ids.shape) < 0.2] = 0
    ignored = config['ignore_index']

    with torch.no_grad():
        loss, parts = model(ids, return_loss=True)
        read, targets = ids[:, :-1], ids[:, 1:]
        logits, latents = model(read, return_logits_and_embeds=True)
        embeds = model.inspect(read).embeds
        compressed = model(read, return_hierarchical_token_embeds=True)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)

    ce = mean(
        [-logits[b, i].log_softmax(-1)[targets[b, i]] for b in range(2) for i in range(n) if targets[b, i] != ignored]
    )

    recon = torch.zeros((), dtype=torch.float64)
    others = torch.zeros((), dtype=torch.float64)
    next_latent = torch.zeros((), dtype=torch.float64)
    for index, level in enumerate(model.levels):
        c, s, x = level.compression, level.stride, latents[index]
        m = x.shape[1]

        if c > 1 and config['recon_loss_weight'] > 0:
            seen = []
            for b in range(2):
                for j in range(m):
                    given_back = model.compressors[index].to_recon(x[b, j]).view(c, -1).log_softmax(-1)
                    for k in range(c):
                        position = j * s - (c - 1) + k
                        if position >= 0 and read[b, position] != config['recon_ignore_index']:
                            seen.append(-given_back[k, read[b, position]])
            recon = recon + mean(seen)

        if f'ponder/{c}x' in parts.named:
            # its value has its own test
            others = others + 0.01 * parts.named[f'ponder/{c}x']

        if weights.get(f'prophet/{c}x', 0.0) > 0:
            foreseen = []
            for b in range(2):
                for j in range(m):
                    said = model.to_prophet[str(index)](x[b, j]).view(c, -1).log_softmax(-1)
                    for k in range(c):
                        position = j * s + 1 + k
                        if position <= n and ids[b, position] != ignored:
                            foreseen.append(-said[k, ids[b, position]])
            torch.testing.assert_close(parts.named[f'prophet/{c}x'], mean(foreseen))
            others = others + weights[f'prophet/{c}x'] * mean(foreseen)

        if weights.get(f'quantized/{c}x', 0.0) > 0:
            quantizer, named = model.quantizers[str(index)], []
            of = compressed[index] if config['quantize_from'] == 'compressed' else x
            for b in range(2):
                for j in range(m - 1):
                    said = model.to_quantized[str(index)](x[b, j]).view(-1, 5).log_softmax(-1)
                    if read[b, (j + 1) * s] == ignored:
                        continue
                    vector = of[b, j + 1]
                    vector = (vector - vector.mean()) / (vector.var(correction=0) + 1e-5).sqrt()
                    for k, (projection, codebook) in enumerate(
                        zip(quantizer.projection, quantizer.codebook, strict=True)
                    ):
                        near = [F.cosine_similarity(vector @ projection, code, dim=0) for code in codebook]
                        named.append(-said[k, torch.stack(near).argmax()])
            torch.testing.assert_close(parts.named[f'quantized/{c}x'], mean(named))
            others = others + weights[f'quantized/{c}x'] * mean(named)

        if weights.get(f'next_latent/{c}x', 0.0) > 0:
            dynamics, summarize = model.latent_dynamics[str(index)], model.chunk_summarizers[str(index)]
            steps: list[list[Tensor]] = [[] for _ in range(config['num_rollouts'])]
            for b in range(2):
                for j in range(m - config['num_rollouts']):
                    h, before = x[b, j], torch.zeros((), dtype=torch.float64)
                    for r in range(config['num_rollouts']):
                        t = j + r + 1
                        chunk = embeds[b, max(t * s - (c - 1), 0) : t * s + 1]
                        h = dynamics(h, summarize.proj(chunk.mean(0)))
                        mse = (h - x[b, t]).square().mean()
                        cosine = (h @ x[b, t]) / (h.norm() * x[b, t].norm())
                        element = {
                            'mse': mse,
                            'smooth_l1': F.smooth_l1_loss(h, x[b, t]),
                            'mse_and_cosine_sim': 0.1 * mse + 0.9 * (1 - cosine),
                        }[config['next_latent_loss_type']]
                        weight = torch.exp(-before) if config['dynamic_rollout_loss_weight'] else 1.0
                        if read[b, t * s] != ignored:
                            steps[r].append(weight * element / config['num_rollouts'])
                        before = before + element
            level_loss = sum(mean(step) for step in steps)
            torch.testing.assert_close(parts.next_latent_per_hierarchy[index], level_loss)
            next_latent = next_latent + weights[f'next_latent/{c}x'] * level_loss

    torch.testing.assert_close(parts.ce, ce)
    torch.testing.assert_close(parts.recon, recon)
    torch.testing.assert_close(parts.next_latent, next_latent)
    if 'autoencoder' in parts.named:
        others = others + 0.1 * parts.named['autoencoder']
    torch.testing.assert_close(loss, ce + next_latent + config['recon_loss_weight'] * recon + others)
    weighted = sum(model.loss_weights[name] * part for name, part in parts.named.items())
    torch.testing.assert_close(loss, weighted)
