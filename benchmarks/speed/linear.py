"""A comparison of kernels for products with a weight. `ops/linear.py` chooses kernels by these figures.

    python benchmarks/speed/linear.py

Compares kernels for one to many rows in float32 on a CPU: the BLAS behind `F.linear`, oneDNN's kernel, and a batched
product over slices of the weight. For the gradient of the weight it compares the BLAS, oneDNN, and oneDNN on the
transposed problem. Writes linear.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.machine import machine
from benchmarks.common.results import new_folder, new_parser, write_lines
from benchmarks.common.tables import line, markdown
from benchmarks.common.timing import median_seconds
from simple_hierarchical_transformer.ops.linear import SLICES

# (dim_in, dim_out)
SIZES = ((256, 256), (256, 1024), (512, 1536), (512, 2048), (2048, 512), (1024, 4096), (4096, 1024))
ROWS = (1, 2, 16, 256, 2048)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], '')


def sliced(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(weight.view(SLICES, -1, weight.shape[1]), x.t().expand(SLICES, -1, -1))


def row(label: str, kernels: dict[str, Callable[[], Tensor]], rounds: int) -> list[str]:
    """Microseconds of each kernel. The fastest is bold."""
    found = median_seconds(kernels, rounds)
    cells = [f'{1e6 * seconds:,.0f}' for seconds in found.values()]
    fastest = min(found.values())
    return [
        label,
        *(f'**{cell}**' if found[name] == fastest else cell for name, cell in zip(found, cells, strict=True)),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument('--out', type=Path, help='folder of the results (default: one of today in benchmarks/results)')
    parser.add_argument('--toy', action='store_true', help='one tiny size and few rounds, to see that the script runs')
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes, many = (((16, 32),), 32) if args.toy else (SIZES, 2048)
    forward: list[list[str]] = []
    for rows in (1, many) if args.toy else ROWS:
        for dim_in, dim_out in sizes:
            # more weights than a cache holds, as in a model
            count = 1 if args.toy else max((1 << 25) // (dim_in * dim_out), 1)
            weights = cycle([torch.randn(dim_out, dim_in) for _ in range(count)])
            x = torch.randn(rows, dim_in)
            kernels = {
                'F.linear': lambda x=x, weights=weights: F.linear(x, next(weights)),
                'oneDNN': lambda x=x, weights=weights: onednn(x, next(weights)),
                'sliced': lambda x=x, weights=weights: sliced(x, next(weights)),
            }
            rounds = 4 if args.toy else 200 if rows < 256 else 12
            forward.append(row(f'{rows} x {dim_in} to {dim_out}', kernels, rounds))
            print(line(forward[-1]), flush=True)

    backward: list[list[str]] = []
    for dim_in, dim_out in sizes:
        x, grad = torch.randn(many, dim_in), torch.randn(many, dim_out)
        kernels = {
            'BLAS': lambda x=x, grad=grad: grad.t() @ x,
            'oneDNN': lambda x=x, grad=grad: onednn(grad.t(), x.t()),
            'oneDNN, transposed': lambda x=x, grad=grad: onednn(x.t(), grad.t()).t().contiguous(),
        }
        backward.append(row(f'{dim_in} to {dim_out}', kernels, 4 if args.toy else 12))
        print(line(backward[-1]), flush=True)

    if args.toy and not args.out:
        return
    lines = [
        '# Products with a weight',
        '',
        f'`python benchmarks/speed/linear.py`, {machine()}. Medians in microseconds. The kernels take turns.',
        '',
        *markdown(('rows x in to out', 'F.linear', 'oneDNN', 'sliced'), forward),
        '',
        f'The gradient of the weight, for {many:,} rows:',
        '',
        *markdown(('in to out', 'BLAS', 'oneDNN', 'oneDNN, transposed'), backward),
    ]
    write_lines((args.out or new_folder('linear')) / 'linear.md', lines)


if __name__ == '__main__':
    main()
