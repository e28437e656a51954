"""A model saved as a folder, on disk or on the Hugging Face hub: config.json, safetensors weights and a model card."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config_file import (
    CONFIG_FILE,
    argument_names,
    check_config,
    read_config,
    record_arguments,
    shorten,
    write_config,
)
from .levels import Level
from .version import __version__
from .weights import (
    WEIGHTS_FILE,
    held_weights,
    holds_meta,
    load_weights,
    main_dtype,
    read_aliases,
    read_tensors,
    save_weights,
    shared_names,
)

if TYPE_CHECKING:

    class HubModule(ModelHubMixin, nn.Module):
        """The base classes of a saved model. At runtime, the model class inherits nn.Module before this mixin."""

else:
    HubModule = ModelHubMixin

CARD_FILE = 'README.md'
MODEL_CARD = """---
{{ card_data }}
---

# {{ title | default('A hierarchical transformer') }}

A causal language model that reads a sequence at several resolutions at once, {{ parameters }} parameters, made with
simple-hierarchical-transformer {{ version }}.

| level | stride or boundaries | width | heads | window |
|---|---|---|---|---|
{% for level in levels -%}
| {{ level.compression }}x | {{ level.boundaries or level.stride }} | {{ level.dim }} | {{ level.heads }} x {{
level.dim_head }} | {{ 'full' if level.window is none else level.window }} |
{% endfor %}
```python
from simple_hierarchical_transformer import HierarchicalTransformer

model = HierarchicalTransformer.from_pretrained('this folder, or its name on the hub')
```
{% if training %}
{{ training }}
{% endif %}"""

# The limit on calls of PyTorch's functions in a constructor: a constant, plus a number for each name in the weights.
CALLS, CALLS_PER_NAME = 10_000, 100
# Errors that constructors raise for unexpected settings.
BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

Device = str | int | torch.device
Model = TypeVar('Model', bound='Pretrained')
Result = TypeVar('Result')


class Pretrained(HubModule):
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to a module whose arguments can be keywords.

    Nothing is pickled. Arguments that config.json cannot hold are refused on saving. Shared parameters stay shared.
    """

    levels: Sequence[Level]
    """Described in the model card."""
    _hub_mixin_config: dict[str, object]
    _not_in_config: list[str]

    def __new__(cls: type[Model], *args: object, **kwargs: object) -> Model:
        """Records the arguments of the constructor for `save_pretrained`."""
        model = super().__new__(cls)
        parameters = list(cls._hub_mixin_init_parameters.values())[1:]
        recorded, model._not_in_config = record_arguments(parameters, args, kwargs)
        model._hub_mixin_config = {**cls._hub_mixin_jsonable_default_values, **recorded}
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: object = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes config.json, model.safetensors and README.md, the model card, to a folder.

        Each file is replaced as a whole or not at all. An existing model card is kept.

        Args:
            save_directory: the folder. It is created if it does not exist.
            state_dict: the weights to write in place of the model's own, such as averaged weights, or gathered weights
                if the model's own are sharded.
            push_to_hub: also upload the folder to the hub.
            repo_id: the name of the repository on the hub. The default is the name of the folder.
            config: must be None, since the configuration consists of the arguments that the model was built with.
            model_card_kwargs: values for the model card: `title`, and `training`, a text in markdown.
            push_to_hub_kwargs: further arguments of `push_to_hub`.

        Returns:
            The address of the commit on the hub with `push_to_hub`, None otherwise.

        Raises:
            ValueError: the model was built with something that JSON cannot hold, such as a callable or a module;
                modules were replaced or wrapped since, so that the folder would load as another model; `state_dict`
                does not have the model's weights, or has tensors that are quantized or on 'meta'; `config` is given.
            OSError: the folder cannot be written, or the disk is full.
        """
        if self._not_in_config:
            raise ValueError(
                f'{" and ".join(self._not_in_config)} cannot be written to {CONFIG_FILE}, so the folder could not be '
                'loaded again: save the state dict instead'
            )
        if config is not None:
            raise ValueError('config must be None: config.json is made of the arguments of the model')

        if changed := self.changed_modules():
            raise ValueError(
                f'{shorten(", ".join(changed), 200)} are not as the constructor makes them, and from_pretrained would '
                'build those: merge adapters first, replace modules in the constructor of a subclass, or save the '
                'state dict'
            )
        weights = held_weights(self, state_dict)

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix='.partial-') as name:
            partial = Path(name)
            write_config(self._hub_mixin_config, partial / CONFIG_FILE)
            save_weights(weights, shared_names(self), partial / WEIGHTS_FILE)
            if not (folder / CARD_FILE).exists():
                card = str(self.generate_model_card(**(model_card_kwargs or {})))
                # The text may have file names whose bytes are not UTF-8.
                (partial / CARD_FILE).write_text(card, encoding='utf-8', errors='backslashreplace', newline='')
            for file in partial.iterdir():
                os.replace(file, folder / file.name)

        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def changed_modules(self) -> list[str]:
        """Returns the names of modules that differ from those that the constructor makes."""

        def describe(model: nn.Module) -> dict[str, tuple[type, str]]:
            named = model.named_modules(remove_duplicate=False)
            return {name: (type(module), module.extra_repr()) for name, module in named if name}

        try:
            # A constructor may draw random numbers even though tensors on 'meta' have no values.
            with torch.random.fork_rng(devices=[]), torch.device('meta'):
                expected = describe(type(self)(**self._hub_mixin_config))
        except BUILD_ERRORS:
            # The constructor of a subclass may need values, which tensors on 'meta' lack.
            return []
        found = describe(self)
        return [
            name
            for name in {**found, **expected}
            if name not in found
            or name not in expected
            or found[name][1] != expected[name][1]
            or not (found[name][0] is expected[name][0] or is_fsdp_class(found[name][0], expected[name][0]))
        ]

    def generate_model_card(self, *_: object, **kwargs: Any) -> ModelCard:
        """Returns the model card: a description of the model, how to load it and how it was trained."""
        return ModelCard.from_template(
            self._hub_mixin_info.model_card_data,
            template_str=MODEL_CARD,
            levels=self.levels,
            parameters=f'{sum(parameter.numel() for parameter in self.parameters()):,}',
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
        **settings: object,
    ) -> Model:
        """Loads what `save_pretrained` wrote, in evaluation mode.

        The model is first built on 'meta' and compared with the weights. A folder from an untrusted source
        therefore cannot take more memory than its weights do.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository on the hub.
            force_download: download files again even if they are in the hub's cache.
            token: the token for the hub.
            cache_dir: the folder of the hub's cache.
            local_files_only: read only the hub's cache.
            revision: a branch, tag or commit on the hub.
            map_location: the device to load onto. The default is the CPU.
            device_map: the same, under the name that other libraries use. One device for the whole model.
            dtype: the floating point dtype to convert the model to, or its name. By default, and with 'auto', the model
                keeps the dtype of the file.
            torch_dtype: the older name of `dtype`.
            strict: False accepts weights with missing or additional tensors, and names these in a warning. Missing
                tensors are initialized by the constructor. Memory is then not bounded by the weights.
            settings: arguments of the constructor that override those in config.json.

        Returns:
            The model.

        Raises:
            ValueError: config.json or the weights are damaged, do not match, or are of a newer version; an
                argument has a value that is not allowed.
            TypeError: the constructor has no argument of this name.
            OSError: a file cannot be read or downloaded.
        """
        given = pretrained_model_name_or_path
        if not isinstance(given, (str, os.PathLike)) or not str(given):
            raise ValueError(
                f'pretrained_model_name_or_path must be a folder or the name of a repository, got {given!r}'
            )
        source = str(pretrained_model_name_or_path)
        device, wanted = check_device(map_location, device_map), check_dtype(dtype, torch_dtype)
        names = argument_names(cls)
        if unknown := sorted(set(settings) - names):
            raise TypeError(f'{cls.__name__}.from_pretrained() got unexpected arguments: {", ".join(unknown)}')

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

        try:
            config = read_config(find(CONFIG_FILE))
        except LocalEntryNotFoundError:
            # The hub cannot be reached, and the file is not in its cache.
            raise
        except (FileNotFoundError, EntryNotFoundError) as error:
            raise ValueError(f'{source} is not a saved model: there is no {CONFIG_FILE} in it') from error
        settings = check_config(config, source, names) | settings

        path = find(WEIGHTS_FILE)
        weights, metadata = read_tensors(path)
        aliases = read_aliases(metadata, path)

        # Every tensor of the model has a name in the weights, so their number bounds the work of a constructor.
        limit = CALLS + CALLS_PER_NAME * (len(weights) + len(aliases)) if strict else math.inf

        def build(on: torch.device) -> Model:
            try:
                with CallLimit(limit), on:
                    return cls(**settings)
            except BUILD_ERRORS as error:
                raise ValueError(f'{CONFIG_FILE} of {source} does not make a model: {shorten(str(error))}') from error

        model = None
        if strict:
            try:
                model = build(torch.device('meta'))
            except ValueError as error:
                # The constructor of a subclass may need values, which tensors on 'meta' lack.
                if 'meta' not in str(error.__cause__):
                    raise
        if model is not None:
            load_weights(model, weights, aliases, path)
        if model is None or holds_meta(model):
            # Tensors that are not among the weights keep the values that the constructor gives them.
            model = build(device)
            model.to(device=device, dtype=main_dtype(weights))
            load_weights(model, weights, aliases, path, strict)
        if device.type == 'cpu':
            # Views of the file would change with it, and a truncated file would end the process.
            for tensor in chain(model.parameters(), model.buffers()):
                tensor.data = tensor.data.clone()
        return model.to(device=device, dtype=wanted).eval()


def is_fsdp_class(cls: type, base: type) -> bool:
    """Returns whether `cls` is the class that FSDP2 gives to sharded modules of class `base`."""
    return hasattr(cls, 'reshard') and issubclass(cls, base)


def check_device(map_location: Device | None, device_map: Device | Mapping[str, Device] | None) -> torch.device:
    """Returns the device that both arguments name, the CPU if both are None.

    Raises:
        ValueError: one of them is not a device, or a device that is not available, or they differ.
    """
    devices = set()
    for name, value in (('map_location', map_location), ('device_map', device_map)):
        # The empty name stands for the whole model.
        given = value[''] if isinstance(value, Mapping) and list(value) == [''] else value
        if given is None:
            continue
        try:
            devices.add(torch.empty(0, device=torch.device(cast(Device, given))).device)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name} must be one device, as 'cpu' or 'cuda:0', got {value!r}: {error}") from error
    if len(devices) > 1:
        raise ValueError(f'map_location and device_map must be the same, got {map_location!r} and {device_map!r}')
    return devices.pop() if devices else torch.device('cpu')


def check_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that both arguments name, None if the dtype of the file is to be kept.

    Raises:
        ValueError: one of them is not a floating point dtype, or they differ.
    """
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


class CallLimit(TorchFunctionMode):
    """Raises ValueError in the current thread after `limit` calls of PyTorch's functions."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.left = limit

    def __torch_function__(
        self,
        func: Callable[..., Result],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Result:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f'it has more parts than {WEIGHTS_FILE} has tensors')
        return func(*args, **(kwargs or {}))
