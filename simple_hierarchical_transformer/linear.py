"""Linear maps, by the faster of two kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# below this size of a weight the call costs more than the product
MIN_WEIGHT = 1 << 16
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with oneDNN's kernel where that serves: float32 on a CPU, without gradients.

    A step of generation multiplies each weight by a vector or a few, and is over when the weights have been read:
    oneDNN reads them at the memory's pace, the BLAS behind `F.linear` at half of it or less (benchmarks/generate.py).
    """
    fast = (
        HAS_ONEDNN
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
    )
    if fast:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` on `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
