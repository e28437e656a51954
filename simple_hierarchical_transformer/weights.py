"""Weights of a saved model: a safetensors file, in which a tensor with several names is written once."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config_file import CONFIG_FILE, check_file, shorten
from .ops.linear import DENSE

WEIGHTS_FILE = 'model.safetensors'

# The key of the metadata that maps the further names of shared tensors to their first names.
SHARED = 'shared'


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a model by name. A shared tensor appears under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def shared_names(model: nn.Module) -> dict[str, str]:
    """Returns the further names of shared parameters and buffers, each with the first name of its tensor."""
    return further_names(named_tensors(model))


def further_names(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the names of tensors that have an earlier name in the mapping, each with that name."""
    first: dict[int, str] = {}
    return {name: kept for name, tensor in named.items() if (kept := first.setdefault(id(tensor), name)) != name}


def held_weights(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the tensors to write for a model, each shared one once.

    Args:
        model: the model.
        state_dict: the tensors to write in place of the model's own.

    Raises:
        ValueError: names or shapes in `state_dict` are not those of the model, or a tensor cannot be written.
    """
    shared, expected = shared_names(model), model.state_dict()
    state = expected if state_dict is None else state_dict
    missing, unknown = (
        ', '.join(sorted(set(a) - set(b) - set(shared))) for a, b in ((expected, state), (state, expected))
    )
    if missing or unknown:
        found = f'missing {missing or "none"}; unknown {unknown or "none"}'
        raise ValueError(f'state_dict must hold the weights of the model: {shorten(found)}')
    held = {name: tensor for name, tensor in state.items() if name not in shared}
    for name, tensor in held.items():
        if type(tensor) not in DENSE:
            raise ValueError(
                f'{name} is not a plain tensor, got {type(tensor).__name__}: quantize after loading, gather shards'
            )
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f'state_dict has {name} {tuple(tensor.shape)}, which must be {tuple(expected[name].shape)} as in the '
                'model'
            )
        if tensor.is_meta:
            raise ValueError(f"{name} has no values to save: it is on 'meta'")
    return held


def save_weights(weights: Mapping[str, Tensor], shared: Mapping[str, str], path: Path) -> None:
    """Writes weights, with the further names of shared tensors in the metadata. Raises OSError if it fails."""
    held = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    # A single entry, because safetensors writes several in an order that differs between processes.
    write_tensors(held, path, {SHARED: json.dumps(shared, sort_keys=True)} if shared else {'format': 'pt'})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises OSError if it fails."""
    try:
        save_file(tensors, path, metadata)
        # safetensors creates a file that only its owner can read.
        path.chmod(0o644)
    except SafetensorError as error:
        raise OSError(f'{path} could not be written: {error}') from error


def read_tensors(path: str | Path, device: str = 'cpu') -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file and its metadata. On the CPU, the tensors may be views of the file.

    Raises:
        ValueError: the file is damaged.
    """
    check_file(path)
    try:
        with safe_open(path, 'pt', device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{path} is damaged, or not a safetensors file: {error}') from error


def read_aliases(metadata: Mapping[str, str], path: str | Path) -> dict[str, str]:
    """Returns the further names of shared tensors in a file's metadata, each with the first name of its tensor."""
    try:
        aliases = json.loads(metadata.get(SHARED, '{}'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} has metadata that are not JSON: {error}') from error
    if not isinstance(aliases, dict) or not all(isinstance(first, str) for first in aliases.values()):
        raise ValueError(f'{path} has metadata {SHARED!r} that do not map names to names')
    return aliases


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], aliases: Mapping[str, str], path: str | Path, strict: bool = True
) -> None:
    """Makes these tensors the parameters and buffers of a model, without a copy and in their own dtype.

    Args:
        model: the model, which may be on 'meta'.
        weights: the tensors by name.
        aliases: further names, each with the first name of the tensor. The model then shares these tensors.
        path: the file they come from, for messages.
        strict: raise an error for missing and unknown names. A warning names them otherwise.

    Raises:
        ValueError: the tensors do not fit the model.
    """
    named = named_tensors(model)
    weights = dict(weights)
    for name, first in aliases.items():
        if first in weights:
            tie(model, named, name, first)
            weights[name] = weights[first]
    for name, tensor in named.items():
        if name in weights and weights[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f'{path} has {name} of {weights[name].dtype}, which must be {tensor.dtype}')
    shared = further_names(named)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=strict, assign=True)
    except (RuntimeError, ValueError) as error:
        found = ' '.join(line.strip() for line in str(error).splitlines())
        raise ValueError(f'{path} does not fit its {CONFIG_FILE}: {shorten(found)}') from error
    if missing or unexpected:
        found = f'missing {", ".join(missing) or "none"}; unknown here {", ".join(unexpected) or "none"}'
        warnings.warn(f'{path} does not fit its {CONFIG_FILE}: {shorten(found)}', stacklevel=3)
    if shared:
        # load_state_dict assigned a new tensor to each name, so shared tensors must be tied again.
        named = named_tensors(model)
        for name, first in shared.items():
            tie(model, named, name, first)


def tie(model: nn.Module, named: dict[str, Tensor], name: str, to: str) -> None:
    """Replaces the parameter or buffer `name` of a model by its parameter or buffer `to`.

    `named` are the model's `named_tensors`, which this function updates.

    Raises:
        ValueError: the model lacks one of them, or they differ in shape or kind.
    """
    old, new = named.get(name), named.get(to)
    if old is None or new is None:
        raise ValueError(f'weights share {to} as {name}, which the model does not have')
    if old is new:
        return
    if old.shape != new.shape or isinstance(old, nn.Parameter) != isinstance(new, nn.Parameter):
        raise ValueError(
            f'weights share {to} {tuple(new.shape)} as {name} {tuple(old.shape)}, which differ in shape or kind'
        )
    module, _, leaf = name.rpartition('.')
    setattr(model.get_submodule(module), leaf, new)
    named[name] = new


def holds_meta(model: nn.Module) -> bool:
    """Returns whether a parameter, a buffer or a tensor attribute of a module is on 'meta' and so has no values."""
    attributes = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers(), attributes))


def main_dtype(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """Returns the floating point dtype of most elements, None if there is none."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else None
