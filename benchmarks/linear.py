"""Which kernel multiplies by a weight fastest: what `simple_hierarchical_transformer/linear.py` chooses by.

    python benchmarks/linear.py

Compares, for one to many rows, float32 on a CPU: the BLAS behind `F.linear`, oneDNN's kernel, and a batched product
over slices of the weight; and for the weight's gradient the BLAS, oneDNN, and oneDNN on the transposed problem. Writes
benchmarks/linear.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import machine, timed
from torch import Tensor

from simple_hierarchical_transformer.ops.linear import SLICES

# (dim_in, dim_out)
SIZES = ((256, 256), (256, 1024), (512, 1536), (512, 2048), (2048, 512), (1024, 4096), (4096, 1024))
ROWS = (1, 2, 16, 256, 2048)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], '')


def sliced(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(weight.view(SLICES, -1, weight.shape[1]), x.t().expand(SLICES, -1, -1))


def microseconds(kernels: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """The median of each, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds):
        for name, kernel in kernels.items():
            spent[name].append(timed(kernel)[0] * 1e6)
    return {name: statistics.median(times[rounds // 4 :]) for name, times in spent.items()}


def row(label: str, found: dict[str, float], columns: tuple[str, ...]) -> str:
    fastest = min(found.values())
    cells = (f'**{found[name]:,.0f}**' if found[name] == fastest else f'{found[name]:,.0f}' for name in columns)
    return f'| {label} | ' + ' | '.join(cells) + ' |'


def main() -> None:
    torch.manual_seed(0)
    forward, backward = ('F.linear', 'oneDNN', 'sliced'), ('BLAS', 'oneDNN', 'oneDNN, transposed')
    lines = [
        '# Products with a weight',
        '',
        f'`python benchmarks/linear.py`, {machine()}. Medians in microseconds, kernels in turns.',
        '',
        '| rows x in to out | ' + ' | '.join(forward) + ' |',
        '|---|---|---|---|',
    ]
    for rows in ROWS:
        for dim_in, dim_out in SIZES:
            # more weights than a cache holds, as in a model
            weights = [torch.randn(dim_out, dim_in) for _ in range(max((1 << 25) // (dim_in * dim_out), 1))]
            x, turn = torch.randn(rows, dim_in), iter(range(1 << 30))

            def each(
                kernel: Callable[[Tensor, Tensor], Tensor],
                x: Tensor = x,
                weights: list[Tensor] = weights,
                turn: Iterator[int] = turn,
            ) -> Callable[[], Tensor]:
                return lambda: kernel(x, weights[next(turn) % len(weights)])

            kernels = dict(zip(forward, map(each, (F.linear, onednn, sliced)), strict=True))
            found = microseconds(kernels, rounds=200 if rows < 256 else 12)
            lines.append(row(f'{rows} x {dim_in} to {dim_out}', found, forward))
            print(lines[-1], flush=True)

    lines += ['', 'The gradient of the weight, for 2,048 rows:', '']
    lines += ['| in to out | ' + ' | '.join(backward) + ' |', '|---|---|---|---|']
    for dim_in, dim_out in SIZES:
        x, grad = torch.randn(2048, dim_in), torch.randn(2048, dim_out)
        kernels = {
            'BLAS': lambda x=x, grad=grad: grad.t() @ x,
            'oneDNN': lambda x=x, grad=grad: onednn(grad.t(), x.t()),
            'oneDNN, transposed': lambda x=x, grad=grad: onednn(x.t(), grad.t()).t().contiguous(),
        }
        lines.append(row(f'{dim_in} to {dim_out}', microseconds(kernels, rounds=12), backward))
        print(lines[-1], flush=True)

    (Path(__file__).resolve().parent / 'linear.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
