"""What a model costs: parameters, operations, memory, and what the machine could do at most."""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ..memory import State
from ..model import HierarchicalTransformer
from ..ops.norm import RootMeanSquare
from .optim import KERNELS, LOOKUPS, NGRAMS

# where in a parameter's name the number of its level stands
LEVEL_AT = {
    'compressors': 1,
    'post_token_emb_norms': 1,
    'layers': 2,
    'norms': 1,
    'latent_dynamics': 1,
    'chunk_summarizers': 1,
    'to_prophet': 1,
    'to_quantized': 1,
    'step_embeds': 1,
    'halting': 1,
    'autoencoder': 2,
}

# as many tokens are planned with before the rest are counted in proportion
FEW_TOKENS = 1 << 19
MOST_BYTES = 1 << 62
# older versions of PyTorch for a CPU do not have it
USE_COUNT = getattr(torch._C, '_storage_Use_Count', None)


def level_of(name: str) -> int | None:
    """Which level a parameter of that name belongs to, None where to all."""
    parts = name.split('.')
    at = LEVEL_AT.get(parts[0])
    return int(parts[at]) if at is not None and parts[at].isdigit() else None


def parameters_by_level(model: HierarchicalTransformer) -> dict[int | None, int]:
    """How many parameters each level has; under None those that serve several: embeddings, merges, shared ones."""
    counts: Counter[int | None] = Counter(dict.fromkeys((*range(len(model.levels)), None), 0))
    owners: dict[nn.Parameter, set[int | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(level_of(name))
    for parameter, levels in owners.items():
        counts[levels.pop() if len(levels) == 1 else None] += parameter.numel()
    return dict(counts)


def step_flops(model: HierarchicalTransformer, length: int) -> float:
    """Operations that a sequence of `length` takes to learn from: forward once, backward twice as many.

    Products with weights, and what mixers do besides (`products`, where they tell), two operations for a multiplication
    and an addition.
    """
    total = 0.0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if multiplies(name, parameter):
            total += 2 * parameter.numel() * length / apart(model, name)
    layers: Any = model.layers
    for layer in layers:
        for level, block in zip(model.levels, layer, strict=True):
            if block is None:
                continue
            row = length / level.stride / level.phases
            total += level.phases * getattr(block.attn, 'products', lambda _: 0.0)(row)
    return 3 * total


def multiplies(name: str, parameter: nn.Parameter) -> bool:
    """Whether tokens are multiplied with a parameter of that name: not with tables, biases, or what makes kernels."""
    apart = {*LOOKUPS, *NGRAMS, *KERNELS} & set(name.split('.'))
    return parameter.ndim >= 2 and not apart and not name.endswith('bias')


def apart(model: HierarchicalTransformer, name: str) -> float:
    """How many positions the tokens that a weight is multiplied with stand apart, on average over its rows."""
    parts, strides = name.split('.'), [level.stride for level in model.levels]
    if parts[0] == 'hierarchical_merges':
        merge: Any = model.hierarchical_merges[int(parts[1])]
        # an hourglass' merges live between two levels, whose strides count from the finer one's
        finest = strides[model.order[int(parts[1])]] if model.arrangement == 'hourglass' else 1
        if parts[2] == 'receivers':
            own = merge.strides[int(parts[3])]
            if parts[4] != 'to_kv':
                return finest * own
            # without a window, what no token of the receiver hears is not projected
            return finest * max(merge.strides[int(parts[5])], 1 if merge.window else own)
        if parts[2] == 'to_others':
            return finest * merge.strides[int(parts[3])]
        if parts[2:4] == ['net', '3']:
            # what is made for a receiving level, at its tokens
            rows = [(merge.dims[i], merge.strides[i]) for i in merge.into]
            return finest * sum(dim for dim, _ in rows) / sum(dim / stride for dim, stride in rows)
        return finest
    if parts[0] == 'autoencoder':
        if parts[1] == 'encoders':
            return model.autoencoder.grids[int(parts[2])]  # type: ignore[union-attr]
        # a decoder splits each of the tokens of a level's map, one for each of the ids that it sums up
        return 1 if parts[1] == 'to_ids' else model.levels[int(parts[2])].compression
    level = level_of(name)
    if level is None:
        return 1
    if 'to_scores' in parts or 'to_values' in parts:
        # formed for each of the finer tokens that are pooled
        return strides[level] // model.compressors[level].windows.stride  # type: ignore[operator, return-value]
    return strides[level]


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second that a large product reaches on this device, now: the best of a few."""
    native = device.type != 'cpu' or dtype == torch.float32
    # where a product is slow, a small one says so soon enough
    size = (8192 if device.type != 'cpu' else 2048) if native else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: its arguments, a mask as numbers, what it returns, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
        ctx.save_for_backward(q, k, v, out, sums, None if mask is None else q.new_empty(mask.shape))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


# what autocast has multiplied in half precision
PRODUCTS = {
    F.linear, F.conv1d, F.scaled_dot_product_attention,
    torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
}  # fmt: skip


class FusedKernels(TorchFunctionMode):
    """Has attention and norms on 'meta' take the memory of fused kernels, and products that of autocast with `half`.

    By itself 'meta' forms the whole matrix of scores and each step of a norm, and knows no autocast.
    """

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.half and func in PRODUCTS:
            args, kwargs = tree_map(halved, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], kwargs.get('attn_mask'))
        if func is F.rms_norm:
            return RootMeanSquare.apply(args[0], kwargs['weight'])
        return func(*args, **kwargs)


def halved(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def is_sum_of_gradients(a: Tensor, b: Any) -> bool:
    """Whether the backward pass would write the sum over `a`: nobody else holds it. Under a mode it never does."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(b, Tensor):
        return False
    alone = a.shape == b.shape and not a._is_view() and a.layout == torch.strided
    # the tensor's own reference, and that of the Python object
    return alone and USE_COUNT is not None and USE_COUNT(a.untyped_storage()._cdata) <= 2


class Alive(TorchDispatchMode):
    """Follows the memory of the tensors that operations make, on 'meta' too.

    What a kernel takes for itself and gives back before it ends is not seen.
    """

    measures_routes = True

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = self.gradients = self.gradients_at_peak = 0
        self.of_parameter: dict[nn.Parameter, int] = {}
        # how many rows the last sparse gradient had
        self.rows: dict[nn.Parameter, int] = {}
        # by the storage itself: on 'meta' there is no address
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and is_sum_of_gradients(*args):
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                    self.follow(part.untyped_storage())
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        if self.bytes > self.peak:
            self.peak, self.gradients_at_peak = self.bytes, self.gradients

    def watch(self, parameter: nn.Parameter) -> list[RemovableHandle]:
        """Tells its gradient from what else is alive."""

        def before(grad: Tensor) -> None:
            if grad.is_sparse:
                self.rows[parameter] = len(grad._values())

        def after(_: Tensor) -> None:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                self.note(parameter, parameter.grad.nbytes)

        return [parameter.register_hook(before), parameter.register_post_accumulate_grad_hook(after)]

    def note(self, parameter: nn.Parameter, size: int) -> None:
        """The gradient of a parameter takes `size` bytes now."""
        self.gradients += size - self.of_parameter.get(parameter, 0)
        self.of_parameter[parameter] = size


def bytes_kept(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes that a forward pass leaves in memory for the backward pass; parameters and its output do not count."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with Alive((*model.parameters(), *model.buffers())) as alive:
        for tensor in given:
            alive.follow(tensor.untyped_storage())
        output = model(*args, **kwargs)
        returned = {id(t.untyped_storage()): t.untyped_storage() for t in tree_leaves(output) if isinstance(t, Tensor)}
        return alive.bytes - sum(storage.nbytes() for storage in returned.values())


def step_memory(
    model: HierarchicalTransformer,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    length: int,
    accum: int = 1,
    position: int | None = None,
    averaged: bool = False,
    half: bool = False,
) -> dict[str, int]:
    """Bytes that a device holds at the peak of a training step, by what holds them. They sum to the peak.

    Nothing is computed, and no memory taken: a model on 'meta' takes the step. What the allocator adds, and what
    kernels take for a moment, is not in it.

    Args:
        model: built on 'meta', in float32.
        optimizer: of it.
        rows: sequences in a batch.
        length: ids of a sequence that are predicted.
        accum: batches in a step.
        position: where segments are read with a state, how many ids a state has read at most.
        averaged: whether an average of the weights is kept besides.
        half: whether products are those of autocast in bfloat16 or float16.
    """

    def measured(rows: int) -> tuple[int, int]:
        return measure_step(model, optimizer, rows=rows, length=length, accum=accum, position=position, half=half)

    # of many more sequences, each adds as much as the last
    few = max(FEW_TOKENS // length, 1)
    # the first step makes the optimizer's tensors
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad()
    peak, gradients = measured(min(rows, 2 * few))
    if rows > 2 * few:
        peak += (peak - measured(few)[0]) * (rows - 2 * few) // few

    weights = sum(p.nbytes for p in model.parameters())
    return {
        'weights': weights + sum(buffer.nbytes for buffer in model.buffers()),
        'gradients': gradients,
        'optimizer': sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()),
        'averaged weights': weights * averaged,
        'ids of a step': 8 * accum * rows * (length + 1),
        f'activations of {rows:,} x {length:,}': peak - gradients,
    }


def measure_step(
    model: HierarchicalTransformer,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    length: int,
    accum: int,
    position: int | None,
    half: bool,
) -> tuple[int, int]:
    """What a step adds at its peak to weights and the optimizer's tensors, and how much of that are gradients."""
    moments = (tensor for state in optimizer.state.values() for tensor in state.values())
    ids = torch.zeros(rows, length + (position is None), dtype=torch.long, device='meta')
    alive = Alive((*model.parameters(), *model.buffers(), *moments, ids))
    hooks = [hook for p in model.parameters() if p.requires_grad for hook in alive.watch(p)]
    run, run_backward = min(accum, 2), torch.autograd.Variable._execution_engine.run_backward
    # gradients of batches that are not run, as many as their rows
    sparse: dict[nn.Parameter, list[Tensor]] = {}
    with alive:
        states: list[Any] = [None] * run
        if position is not None:
            states = [state_at(model, ids, position) for _ in range(run)]
        for i in range(run):
            extra: dict[str, Any] = {} if position is None else dict(state=states[i], return_state=True)
            with FusedKernels(half):
                loss, _, *after = model(ids, return_loss=True, **extra)
                states += after
                # loss.backward() would leave the mode, and what is computed again would be without it
                run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)
            del loss, _
            for p, read in alive.rows.items():
                # 'meta' neither adds sparse gradients nor joins their rows
                count, p.grad = read * (accum if i == run - 1 else accum - 1), None
                sparse[p] = [ids.new_empty(1, count), p.new_empty(count, p.shape[1])]
                alive.note(p, sum(each.nbytes for each in sparse[p]))
        for p, (indices, values) in sparse.items():
            found = min(len(values), len(p))
            joined = indices.new_empty(1, found), p.new_empty(found, p.shape[1])
            p.grad = torch.sparse_coo_tensor(*joined, p.shape, is_coalesced=True, check_invariants=False)
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    # each batch that was not run has a state before and one after it
    unrun = 0 if position is None else 2 * (accum - run) * states[0].nbytes
    return alive.peak + unrun, alive.gradients_at_peak


@torch.no_grad()
def state_at(model: HierarchicalTransformer, ids: Tensor, position: int) -> State:
    """A state with room for `position` ids, which all but the last of were not read."""
    state = model.initial_state(len(ids))
    if position == 0:
        return state
    return model(ids[:, :1], state=replace(state, position=position - 1), return_state=True)[1]


def device_memory(device: torch.device) -> int | None:
    """Bytes that one process may take on a device, where that can be known."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[1]
    if device.type != 'cpu' or not hasattr(os, 'sysconf'):
        return None
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    # processes of one machine share its memory
    return min(total, *control_group_limits()) // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def control_group_limits(root: Path = Path('/sys/fs/cgroup'), own: Path = Path('/proc/self/cgroup')) -> list[int]:
    """What the kernel lets this process and its groups take, in bytes, none where it sets no limit."""
    try:
        groups = [line.rsplit(':', 1)[1].lstrip('/') for line in own.read_text().splitlines()]
    except OSError:
        groups = []
    found = [MOST_BYTES]
    for group in ('', *groups):
        for folder in (root / group, *(root / group).parents):
            for name in ('memory.max', 'memory/memory.limit_in_bytes'):
                with suppress(OSError, ValueError):
                    found.append(int((folder / name).read_text()))
            if folder == root:
                break
    return found
