"""The cost of a training step in parameters, operations and memory, and the limits of the machine."""

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
from .roles import walk

# larger batches are measured at this many tokens and extrapolated
FEW_TOKENS = 1 << 19
MOST_BYTES = 1 << 62
# missing in older versions of PyTorch for CPUs
USE_COUNT = getattr(torch._C, '_storage_Use_Count', None)


def parameters_by_level(model: HierarchicalTransformer) -> dict[int | None, int]:
    """The number of parameters of each level, by its index.

    The key None holds those that serve several levels: embeddings, merges and shared weights.
    """
    counts: Counter[int | None] = Counter(dict.fromkeys((*range(len(model.levels)), None), 0))
    owners: dict[nn.Parameter, set[int | None]] = {}
    for visit in walk(model):
        for weight in visit.weights:
            owners.setdefault(weight.parameter, set()).add(weight.level)
    for parameter, levels in owners.items():
        counts[levels.pop() if len(levels) == 1 else None] += parameter.numel()
    return dict(counts)


def step_flops(model: nn.Module, length: int) -> float:
    """Counts the operations of a training step on a sequence of `length` ids.

    The backward pass counts twice the forward pass.

    Counts products with weights, with two operations for each multiplication and addition, and the `operations` that
    modules declare.
    """
    total = 0.0
    for visit in walk(model, length):
        total += sum(2 * weight.parameter.numel() * weight.tokens for weight in visit.weights if weight.multiplies)
        # from the class: wrappers forward other attributes to the module that they wrap
        operations = getattr(type(visit.module), 'operations', None)
        total += operations(visit.module, visit.tokens) if callable(operations) else 0.0
    return 3 * total


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Measures the operations a second of a large matrix product on this device: the best of a few trials."""
    native = device.type != 'cpu' or dtype == torch.float32
    # a small product is enough to see that a dtype is slow
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
    """Waits until the device has finished its work."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its arguments, the mask as numbers, the output, and a number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
        ctx.save_for_backward(q, k, v, out, sums, None if mask is None else q.new_empty(mask.shape))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


# the functions that autocast runs in half precision
PRODUCTS = {
    F.linear, F.conv1d, F.scaled_dot_product_attention,
    torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
}  # fmt: skip


class FusedKernels(TorchFunctionMode):
    """Makes attention and norms on 'meta' keep the tensors that fused kernels keep.

    With `half`, products keep the tensors that autocast keeps.

    Without this mode, 'meta' materialises the matrix of attention scores and each step of a norm, and has no autocast.
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
    """Whether the backward pass would add `b` to `a` in place: nothing else holds `a`.

    Under a dispatch mode, autograd itself never adds in place.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(b, Tensor):
        return False
    alone = a.shape == b.shape and not a._is_view() and a.layout == torch.strided
    # one reference from the tensor and one from the Python object
    return alone and USE_COUNT is not None and USE_COUNT(a.untyped_storage()._cdata) <= 2


class Alive(TorchDispatchMode):
    """Tracks the memory of the tensors that operations create, also on 'meta'.

    It does not see memory that a kernel allocates and frees before it returns.
    """

    measures_routes = True

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = self.gradients = self.gradients_at_peak = 0
        self.of_parameter: dict[nn.Parameter, int] = {}
        # the number of rows in the last sparse gradient
        self.rows: dict[nn.Parameter, int] = {}
        # keyed by the storage object, because tensors on 'meta' have no address
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
        """Counts the gradient of a parameter separately."""

        def before(grad: Tensor) -> None:
            if grad.is_sparse:
                self.rows[parameter] = len(grad._values())

        def after(_: Tensor) -> None:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                self.note(parameter, parameter.grad.nbytes)

        return [parameter.register_hook(before), parameter.register_post_accumulate_grad_hook(after)]

    def note(self, parameter: nn.Parameter, size: int) -> None:
        """Records that the gradient of a parameter takes `size` bytes."""
        self.gradients += size - self.of_parameter.get(parameter, 0)
        self.of_parameter[parameter] = size


def bytes_kept(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Measures the bytes that a forward pass keeps for the backward pass, without parameters and its output."""
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
    """Plans the memory of a training step: the bytes on one device at its peak, by purpose. Their sum is the peak.

    A model on 'meta' takes the step, so nothing is computed and no memory allocated. The plan leaves out the overhead
    of the allocator and the temporary memory of kernels.

    Args:
        model: a model built on 'meta', in float32.
        optimizer: the optimizer of this model.
        rows: the number of sequences in a batch.
        length: the number of predicted ids in a sequence.
        accum: the number of batches in a step.
        position: for segments with a state, the largest number of ids that a state has read. Otherwise None.
        averaged: whether the run averages its weights.
        half: whether autocast multiplies in bfloat16 or float16.
    """

    def measured(rows: int) -> tuple[int, int]:
        return measure_step(model, optimizer, rows=rows, length=length, accum=accum, position=position, half=half)

    # beyond that many sequences, each one adds the same number of bytes
    few = max(FEW_TOKENS // length, 1)
    # the first step creates the optimizer's tensors
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
    """The bytes at the peak of a step without weights and optimizer tensors, and the share of gradients in them."""
    moments = (tensor for state in optimizer.state.values() for tensor in state.values())
    ids = torch.zeros(rows, length + (position is None), dtype=torch.long, device='meta')
    alive = Alive((*model.parameters(), *model.buffers(), *moments, ids))
    hooks = [hook for p in model.parameters() if p.requires_grad for hook in alive.watch(p)]
    run, run_backward = min(accum, 2), torch.autograd.Variable._execution_engine.run_backward
    # the rows of sparse gradients, including those of batches that are not run
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
                # loss.backward() would leave the mode, and checkpointing would recompute outside of it
                run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)
            del loss, _
            for p, read in alive.rows.items():
                # 'meta' neither adds sparse gradients nor merges their rows
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
    # each batch that was not run would have a state before and after it
    unrun = 0 if position is None else 2 * (accum - run) * states[0].nbytes
    return alive.peak + unrun, alive.gradients_at_peak


@torch.no_grad()
def state_at(model: HierarchicalTransformer, ids: Tensor, position: int) -> State:
    """A state at `position` with memory for that many ids. The model reads only the last of them."""
    state = model.initial_state(len(ids))
    if position == 0:
        return state
    return model(ids[:, :1], state=replace(state, position=position - 1), return_state=True)[1]


def device_memory(device: torch.device) -> int | None:
    """The bytes that one process may allocate on a device. None if that is unknown."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[1]
    if device.type != 'cpu' or not hasattr(os, 'sysconf'):
        return None
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    # all processes of a machine share its memory
    return min(total, *control_group_limits()) // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def control_group_limits(
    root: Path = Path('/sys/fs/cgroup'), groups_file: Path = Path('/proc/self/cgroup')
) -> list[int]:
    """The memory limits of this process's control groups in bytes. `MOST_BYTES` is always among them."""
    try:
        groups = [line.rsplit(':', 1)[1].lstrip('/') for line in groups_file.read_text().splitlines()]
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
