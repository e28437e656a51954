"""Half precision by autocast gives numbers near those of float32."""

from __future__ import annotations

import pytest
import torch
from support.configs import THREE, TWO_LEVELS, in_chunks

from simple_hierarchical_transformer import HierarchicalTransformer


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', ['auto', 'local-attention'])
def test_autocast_is_safe(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    model = HierarchicalTransformer(**TWO_LEVELS, attn_backend=backend)
    ids = torch.randint(0, 11, (2, 33))
    exact, exact_parts = model(ids, return_loss=True)
    with torch.autocast('cpu', dtype=dtype):
        loss, parts = model(ids, return_loss=True)
        assert model(ids).dtype == dtype
    for part in (loss, parts.ce, parts.next_latent, parts.recon):
        assert part.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(parts.recon, exact_parts.recon, rtol=0.02, atol=0.02)
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('grad', [False, True])
def test_autocast_works_with_a_state(dtype: torch.dtype, grad: bool) -> None:
    model, ids = HierarchicalTransformer(**THREE), torch.randint(0, 11, (2, 30))
    exact = model(ids)
    with torch.autocast('cpu', dtype=dtype), torch.set_grad_enabled(grad):
        chunked, state = in_chunks(model, ids, [9, 1, 4])
        assert model.score(ids) > 0
        assert model.generate(ids, 3).shape == (2, 3)
    torch.testing.assert_close(chunked.float(), exact, rtol=0.1, atol=0.1)
    assert {tensor.dtype for tensor in state.tensors()} == {torch.float32}
