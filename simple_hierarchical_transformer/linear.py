"""Linear maps, by the faster of two kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# below this size of a weight the call costs more than the product
MIN_WEIGHT = 1 << 15
# into how many slices a weight is cut: enough for the threads of a desktop, and a divisor of most widths
SLICES = 32
FEW_ROWS = (1, 2)
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by faster kernels where they serve: float32 on a CPU, without gradients.

    A step of generation multiplies each weight by a vector or a few, and is over when the weights have been read. The
    BLAS behind `F.linear` reads them at half the memory's pace or less. A batched product, whose batches are slices
    of the weight, keeps the memory's pace for a row or two, oneDNN's kernel for more (benchmarks/linear.py).
    """
    fast = (
        x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHT
        and x.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
    )
    if not fast:
        return F.linear(x, weight, bias)

    dim_out, dim_in = weight.shape
    rows = x.numel() // dim_in
    if rows in FEW_ROWS and dim_out % SLICES == 0:
        columns = x.reshape(rows, dim_in).t().expand(SLICES, -1, -1)
        out = torch.bmm(weight.view(SLICES, -1, dim_in), columns).view(dim_out, rows).t().reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    if HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` on `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
