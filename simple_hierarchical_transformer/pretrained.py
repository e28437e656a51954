"""A model as a folder, on disk or on the Hugging Face hub: settings as JSON, weights as safetensors, a model card."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from inspect import signature
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import plain
from .ops.linear import DENSE
from .version import __version__

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
CARD_FILE = 'README.md'

# the entry of a file's metadata that has the further names of tensors, each with the first
SHARED = 'shared'

# raised when a folder is written that older versions would misread
FORMAT = 1
HEADER = ('format', 'library_version')

MODEL_CARD = """---
{{ card_data }}
---

# {{ title | default('A hierarchical transformer') }}

A causal language model that reads a sequence at several resolutions at once, {{ parameters }} parameters, made with
simple-hierarchical-transformer {{ version }}.

| level | stride | width | heads | window |
|---|---|---|---|---|
{% for level in levels -%}
| {{ level.compression }}x | {{ level.stride }} | {{ level.dim }} | {{ level.heads }} x {{ level.dim_head }} | {{
'full' if level.window is none else level.window }} |
{% endfor %}
```python
from simple_hierarchical_transformer import HierarchicalTransformer

model = HierarchicalTransformer.from_pretrained('this folder, or its name on the hub')
```
{% if training %}
{{ training }}
{% endif %}"""

# how many of PyTorch's functions a constructor may call: some, and as many for each name in the weights
CALLS, CALLS_PER_NAME = 10_000, 100
# what constructors raise, given settings that they were not written for
BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

Device = str | int | torch.device
Model = TypeVar('Model', bound='Pretrained')


class Pretrained(ModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a module that takes its settings as keywords.

    No pickle is written or read. What config.json cannot hold is refused on saving, and a parameter that has several
    names keeps them.
    """

    _not_in_config: list[str]

    def __new__(cls: type[Model], *args: Any, **kwargs: Any) -> Model:
        """Keeps what the constructor is given, defaults included, as `save_pretrained` writes it."""
        model = super().__new__(cls)
        names = [p.name for p in cls._hub_mixin_init_parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        # arguments without a name cannot be given again
        given = {'*args': object()} if len(args) > len(names) else dict(zip(names, args, strict=False))
        given = {name: plain(value) for name, value in {**given, **kwargs}.items()}
        model._not_in_config = sorted(name for name, value in given.items() if name in HEADER or not is_json(value))
        kept = {name: value for name, value in given.items() if name not in model._not_in_config}
        model._hub_mixin_config = {**cls._hub_mixin_jsonable_default_values, **kept}
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes config.json, model.safetensors and README.md, the model card, into a folder.

        Each file is replaced whole or not at all, a model card that is there already stays.

        Args:
            save_directory: the folder, made where it does not exist.
            state_dict: the weights to write, those of the model by default: averaged ones, or gathered ones where the
                model's own are spread over devices.
            push_to_hub: upload it, too.
            repo_id: with `push_to_hub`, its name there; that of the folder by default.
            config: none is taken, since it is made of the arguments that the model was built with.
            model_card_kwargs: for the model card: `title`, and `training`, a text in markdown.
            push_to_hub_kwargs: what `push_to_hub` takes.

        Returns the address of the commit on the hub, or None without `push_to_hub`.

        Raises:
            ValueError: the model was built with something that JSON cannot hold: a callable, a module; modules were
                replaced since, or wrapped, so that the folder would load as another model; `state_dict` is not the
                model's, or has tensors that are quantized or have no values.
            OSError: the folder cannot be written, or the disk is full.
        """
        if self._not_in_config:
            raise ValueError(
                f'{" and ".join(self._not_in_config)} cannot be written to {CONFIG_FILE}, so the folder could not be '
                'loaded again: save the state dict instead'
            )
        if config is not None:
            raise ValueError('config is made of the arguments of the model, and was given')

        if changed := self.changed_modules():
            raise ValueError(
                f'{shorten(", ".join(changed), 200)} are not as the constructor makes them, and from_pretrained would '
                'build those: merge adapters first, replace modules in the constructor of a subclass, or save the '
                'state dict'
            )
        weights = held_weights(self, state_dict)  # type: ignore[arg-type]

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(zip(HEADER, (FORMAT, __version__), strict=True), **(self._hub_mixin_config or {}))  # type: ignore[arg-type]
        with TemporaryDirectory(dir=folder, prefix='.partial-') as name:
            partial = Path(name)
            (partial / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
            save_weights(weights, shared_names(self), partial / WEIGHTS_FILE)  # type: ignore[arg-type]
            if not (folder / CARD_FILE).exists():
                card = str(self.generate_model_card(**(model_card_kwargs or {})))
                # names of files may hold bytes that are no UTF-8
                (partial / CARD_FILE).write_text(card, encoding='utf-8', errors='backslashreplace', newline='')
            for file in partial.iterdir():
                os.replace(file, folder / file.name)

        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def changed_modules(self: Any) -> list[str]:
        """The names of modules of another kind than the constructor makes, or that it does not make, or that lack."""

        def described(model: nn.Module) -> dict[str, tuple[type, str]]:
            named = model.named_modules(remove_duplicate=False)
            return {name: (type(module), module.extra_repr()) for name, module in named if name}

        try:
            # a constructor may draw random numbers although there is nothing to fill
            with torch.random.fork_rng(devices=[]), torch.device('meta'):
                made = described(type(self)(**self._hub_mixin_config))
        except BUILD_ERRORS:
            # a subclass that computes with values
            return []
        own = described(self)
        # FSDP gives modules a class that extends theirs
        return [
            name
            for name in {**own, **made}
            if name not in own
            or name not in made
            or own[name][1] != made[name][1]
            or not (own[name][0] is made[name][0] or is_sharding(own[name][0], made[name][0]))
        ]

    def generate_model_card(self, *_: Any, **kwargs: Any) -> ModelCard:
        """The text that stands beside the weights: what the model is, how it is loaded, how it was trained."""
        parameters = sum(parameter.numel() for parameter in self.parameters())  # type: ignore[attr-defined]
        return ModelCard.from_template(
            self._hub_mixin_info.model_card_data,
            template_str=MODEL_CARD,
            levels=self.levels,  # type: ignore[attr-defined]
            parameters=f'{parameters:,}',
            version=__version__,
            **kwargs,
        )

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: Device | None = None,
        device_map: Device | Mapping[str, Device] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        strict: bool = True,
        **settings: Any,
    ) -> Model:
        """Loads what `save_pretrained` wrote, in evaluation mode.

        The model is built without memory first and compared with the weights, so that a folder from a stranger cannot
        take more memory than its weights do.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository on the hub.
            force_download: download files again that are in the hub's cache.
            token: of the hub.
            cache_dir: the folder of the hub's cache.
            local_files_only: read the hub's cache alone.
            revision: a branch, tag or commit on the hub.
            map_location: the device to load onto, the CPU by default.
            device_map: the same, under the name that other libraries have for it. One device for the whole model.
            dtype: a floating point dtype, or its name, that the model is converted to. By default, and with 'auto', it
                keeps the dtype of the file.
            torch_dtype: the older name of `dtype`.
            strict: False takes weights that lack some tensors or have others besides, with a warning that names them.
                What is missing is as the constructor made it. The weights do not bound the memory then.
            settings: arguments of the constructor that replace those in config.json.

        Raises:
            ValueError: config.json or the weights are damaged, do not fit each other, or are of a newer version; an
                argument is not allowed.
            OSError: a file cannot be read, or not be downloaded.
        """
        given = pretrained_model_name_or_path
        if not isinstance(given, (str, os.PathLike)) or not str(given):
            raise ValueError(
                f'pretrained_model_name_or_path must be a folder or the name of a repository, got {given!r}'
            )
        source = str(pretrained_model_name_or_path)
        device, wanted = check_device(map_location, device_map), check_dtype(dtype, torch_dtype)

        def find(name: str) -> str:
            if os.path.isdir(source):
                return os.path.join(source, name)
            return hf_hub_download(
                repo_id=source,
                filename=name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )

        names = argument_names(cls)
        if unknown := sorted(set(settings) - names):
            raise TypeError(f'{cls.__name__}.from_pretrained() got unexpected arguments: {", ".join(unknown)}')
        try:
            config = read_config(find(CONFIG_FILE))
        except LocalEntryNotFoundError:
            # no connection, and nothing in the cache
            raise
        except (FileNotFoundError, EntryNotFoundError) as error:
            raise ValueError(f'{source} is no saved model: there is no {CONFIG_FILE} in it') from error
        check_config(config, source, known={*names, *HEADER})
        settings = {name: value for name, value in config.items() if name not in HEADER} | settings

        path = find(WEIGHTS_FILE)
        weights, metadata = read_tensors(path)
        aliases = read_aliases(metadata, path)

        # every tensor that is built has a name in the weights, so their number bounds how much there is to build
        limit = CALLS + CALLS_PER_NAME * (len(weights) + len(aliases)) if strict else math.inf

        def build(on: torch.device) -> Any:
            try:
                with CallLimit(limit), on:
                    return cls(**settings)
            except BUILD_ERRORS as error:
                if on.type == 'meta' and 'meta' in str(error):
                    # a subclass computes with values, which tensors on 'meta' do not have
                    return None
                raise ValueError(f'{CONFIG_FILE} of {source} does not make a model: {shorten(str(error))}') from error

        model = build(torch.device('meta')) if strict else None
        if model is not None:
            load_weights(model, weights, aliases, path)
        if model is None or holds_meta(model):
            # what is not among the weights is as the constructor makes it
            model = build(device).to(device=device, dtype=main_dtype(weights))
            load_weights(model, weights, aliases, path, strict)
        if device.type == 'cpu':
            # views of the file would change, or end the process, with the file
            for tensor in chain(model.parameters(), model.buffers()):
                tensor.data = tensor.data.clone()
        return model.to(device=device, dtype=wanted).eval()


def is_json(value: Any) -> bool:
    """Whether JSON gives back what went in, lists for tuples aside."""

    def as_list(value: Any) -> Any:
        return [as_list(each) for each in value] if isinstance(value, (list, tuple)) else value

    try:
        return json.loads(json.dumps(value, allow_nan=False)) == as_list(value)
    except (TypeError, ValueError):
        return False


def argument_names(cls: type) -> set[str]:
    """The names of a constructor's arguments, and of those that it passes on as `**kwargs` to what it extends."""
    names: set[str] = set()
    for base in cls.__mro__:
        if '__init__' in vars(base):
            parameters = list(signature(vars(base)['__init__']).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names


def check_device(map_location: Any, device_map: Any) -> torch.device:
    """The device that both name, the CPU where none does. Raises ValueError where it is not one, or not there."""
    devices = set()
    for name, value in (('map_location', map_location), ('device_map', device_map)):
        # the empty name is that of the whole model
        given = value[''] if isinstance(value, Mapping) and list(value) == [''] else value
        if given is None:
            continue
        try:
            devices.add(torch.empty(0, device=torch.device(given)).device)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name} must be one device, as 'cpu' or 'cuda:0', got {value!r}: {error}") from error
    if len(devices) > 1:
        raise ValueError(f'map_location and device_map must be the same, got {map_location!r} and {device_map!r}')
    return devices.pop() if devices else torch.device('cpu')


def check_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | None:
    """The dtype that both name, None where it is that of the file. Raises ValueError where it is no floating point."""
    dtypes = set()
    for name, value in (('dtype', dtype), ('torch_dtype', torch_dtype)):
        if value is None or value == 'auto':
            continue
        named = getattr(torch, value.removeprefix('torch.'), None) if isinstance(value, str) else value
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"{name} must be a floating point dtype, its name or 'auto', got {value!r}")
        dtypes.add(named)
    if len(dtypes) > 1:
        raise ValueError(f'dtype and torch_dtype must be the same, got {dtype!r} and {torch_dtype!r}')
    return dtypes.pop() if dtypes else None


def check_file(path: str | Path) -> None:
    """Refuses what is no regular file: a pipe or a device would block, or never end."""
    if not S_ISREG(os.stat(path).st_mode):
        raise ValueError(f'{path} is no regular file')


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file. Raises ValueError where it holds something else."""
    check_file(path)
    try:
        config = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold a JSON object of settings, got {type(config).__name__}')
    return config


def check_config(config: Mapping[str, Any], source: str, known: set[str]) -> None:
    """Refuses, with a ValueError, settings that a newer version wrote, or that are not ours."""
    written = config.get('format', FORMAT)
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise ValueError(
            f'{CONFIG_FILE} of {source} has format {written!r}, by version {config.get("library_version", "unknown")} '
            f'of the library; this is version {__version__}, which reads formats up to {FORMAT}'
        )
    if unknown := set(config) - known:
        raise ValueError(f'{CONFIG_FILE} of {source} has settings unknown here: {shorten(", ".join(sorted(unknown)))}')


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model, by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def shared_names(model: nn.Module) -> dict[str, str]:
    """The further names of parameters and buffers that have several, and the first name of each."""
    return further_names(named_tensors(model))


def further_names(named: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that stand in a mapping under an earlier name, too, and that name."""
    first: dict[int, str] = {}
    return {name: kept for name, tensor in named.items() if (kept := first.setdefault(id(tensor), name)) != name}


def is_sharding(kind: type, base: type) -> bool:
    """Whether `kind` is the class that FSDP gives modules of `base`."""
    return hasattr(kind, 'reshard') and issubclass(kind, base)


def held_weights(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a model that a file holds, of its own or a given state dict: each shared one once.

    Raises ValueError where they are not the model's, or cannot be written.
    """
    shared, own = shared_names(model), model.state_dict()
    state = own if state_dict is None else state_dict
    missing, unknown = (', '.join(sorted(set(a) - set(b) - set(shared))) for a, b in ((own, state), (state, own)))
    if missing or unknown:
        found = f'missing {missing or "none"}; unknown {unknown or "none"}'
        raise ValueError(f'state_dict must hold the weights of the model: {shorten(found)}')
    held = {name: tensor for name, tensor in state.items() if name not in shared}
    for name, tensor in held.items():
        if type(tensor) not in DENSE:
            raise ValueError(
                f'{name} is no plain tensor, got {type(tensor).__name__}: quantize after loading, gather shards'
            )
        if tensor.shape != own[name].shape:
            raise ValueError(
                f'state_dict has {name} {tuple(tensor.shape)}, which must be {tuple(own[name].shape)} as in the model'
            )
        if tensor.is_meta:
            raise ValueError(f"{name} has no values to save: it is on 'meta'")
    return held


def save_weights(weights: Mapping[str, Tensor], shared: Mapping[str, str], path: Path) -> None:
    """Writes a safetensors file, with further names of shared tensors in its metadata. Raises OSError if it cannot."""
    held = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    # one entry, since several stand in the file in an order that differs from process to process
    write_tensors(held, path, {SHARED: json.dumps(shared, sort_keys=True)} if shared else {'format': 'pt'})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises OSError where it cannot be written."""
    try:
        save_file(tensors, path, metadata)
        # safetensors leaves it to its owner alone
        path.chmod(0o644)
    except SafetensorError as error:
        raise OSError(f'{path} could not be written: {error}') from error


def read_tensors(path: str | Path, device: str = 'cpu') -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata. On the CPU they may be views of the file.

    Raises ValueError where it is torn.
    """
    check_file(path)
    try:
        with safe_open(path, 'pt', device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{path} is torn, or no safetensors file: {error}') from error


def read_aliases(metadata: Mapping[str, str], path: str | Path) -> dict[str, str]:
    """The further names of tensors in a file's metadata, and the first name of each."""
    try:
        aliases = json.loads(metadata.get(SHARED, '{}'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} has metadata that are no JSON: {error}') from error
    if not isinstance(aliases, dict) or not all(isinstance(first, str) for first in aliases.values()):
        raise ValueError(f'{path} has metadata {SHARED!r} that do not map names to names')
    return aliases


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], aliases: Mapping[str, str], path: str | Path, strict: bool = True
) -> None:
    """Gives a model these tensors, of their dtype. What shares a tensor by `aliases` shares it here.

    Raises ValueError where they do not fit the model.
    """
    own = named_tensors(model)
    weights = dict(weights)
    for name, first in aliases.items():
        if first in weights:
            tie(model, own, name, first)
            weights[name] = weights[first]
    for name, tensor in own.items():
        if name in weights and weights[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f'{path} has {name} of {weights[name].dtype}, which must be {tensor.dtype}')
    shared = further_names(own)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=strict, assign=True)
    except (RuntimeError, ValueError) as error:
        found = ' '.join(line.strip() for line in str(error).splitlines())
        raise ValueError(f'{path} does not fit its {CONFIG_FILE}: {shorten(found)}') from error
    if missing or unexpected:
        found = f'missing {", ".join(missing) or "none"}; unknown here {", ".join(unexpected) or "none"}'
        warnings.warn(f'{path} does not fit its {CONFIG_FILE}: {shorten(found)}', stacklevel=3)
    if shared:
        # each name was given a tensor of its own
        own = named_tensors(model)
        for name, first in shared.items():
            tie(model, own, name, first)


def tie(model: nn.Module, own: dict[str, Tensor], name: str, to: str) -> None:
    """Gives the parameter or buffer `to` another name. `own` are the model's `named_tensors`, kept up to date.

    Raises ValueError where one is neither, or they are not of the same kind and shape.
    """
    old, new = own.get(name), own.get(to)
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
    own[name] = new


def holds_meta(model: nn.Module) -> bool:
    """Whether some tensor of a model has no values: a parameter, a buffer, or an attribute of a module."""
    attributes = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers(), attributes))


def main_dtype(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """The floating point dtype that most numbers are of."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else None


class CallLimit(TorchFunctionMode):
    """Raises ValueError, in this thread, once more than `limit` of PyTorch's functions have been called."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.left = limit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f'it has more parts than {WEIGHTS_FILE} has tensors')
        return func(*args, **(kwargs or {}))


def shorten(text: str, most: int = 2000) -> str:
    """The beginning of a text that may be long."""
    return text if len(text) <= most else f'{text[:most]} ...'
