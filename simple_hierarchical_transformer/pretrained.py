"""A model as a folder, on disk or on the Hugging Face hub: settings as JSON, weights as safetensors, a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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

Model = TypeVar('Model', bound='Pretrained')


class Pretrained(ModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a module that takes its settings as keywords.

    No pickle is written or read. What config.json cannot hold is refused on saving, and a parameter that has several
    names keeps them.
    """

    _not_in_config: list[str]

    def __new__(cls: type[Model], *args: Any, **kwargs: Any) -> Model:
        model = super().__new__(cls, *args, **kwargs)
        model._not_in_config = sorted(name for name, value in kwargs.items() if not is_json(value))
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
            ValueError: the model was built with something that JSON cannot hold: a callable, a module.
            OSError: the folder cannot be written, or the disk is full.
        """
        if self._not_in_config:
            raise ValueError(
                f'{" and ".join(self._not_in_config)} cannot be written to {CONFIG_FILE}, so the folder could not be '
                'loaded again: save the state dict instead'
            )
        if config is not None:
            raise ValueError('config is made of the arguments of the model, and was given')

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(zip(HEADER, (FORMAT, __version__), strict=True), **(self._hub_mixin_config or {}))  # type: ignore[arg-type]
        with TemporaryDirectory(dir=folder, prefix='.partial-') as name:
            partial = Path(name)
            (partial / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + '\n')
            save_weights(self, partial / WEIGHTS_FILE, state_dict)  # type: ignore[arg-type]
            if not (folder / CARD_FILE).exists():
                self.generate_model_card(**(model_card_kwargs or {})).save(partial / CARD_FILE)
            for file in partial.iterdir():
                os.replace(file, folder / file.name)

        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

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
    def _from_pretrained(
        cls: type[Model],
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = 'cpu',
        config: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> Model:
        check_config(config, model_id, known={*cls._hub_mixin_init_parameters, *HEADER})
        if os.path.isdir(model_id):
            weights = os.path.join(model_id, WEIGHTS_FILE)
        else:
            weights = hf_hub_download(
                repo_id=model_id,
                filename=WEIGHTS_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        model: Any = cls(**model_kwargs)
        load_weights(model, weights, map_location)
        return model.to(map_location).eval()


def is_json(value: Any) -> bool:
    """Whether JSON gives back what went in, lists for tuples aside."""

    def as_list(value: Any) -> Any:
        return [as_list(each) for each in value] if isinstance(value, (list, tuple)) else value

    try:
        return json.loads(json.dumps(value, allow_nan=False)) == as_list(value)
    except (TypeError, ValueError):
        return False


def check_config(config: Mapping[str, Any] | None, source: str, known: set[str]) -> None:
    """Refuses, with a ValueError, settings that are not there, that a newer version wrote, or that are not ours."""
    if config is None:
        raise ValueError(f'{source} is no saved model: there is no {CONFIG_FILE} in it')
    written = config.get('format', FORMAT)
    if not isinstance(written, int) or written > FORMAT:
        raise ValueError(
            f'{CONFIG_FILE} of {source} has format {written!r}, by version {config.get("library_version", "unknown")} '
            f'of the library; this is version {__version__}, which reads formats up to {FORMAT}'
        )
    if unknown := set(config) - known:
        raise ValueError(f'{CONFIG_FILE} of {source} has settings unknown here: {", ".join(sorted(unknown))}')


def shared_names(model: nn.Module) -> dict[str, str]:
    """The further names of parameters and buffers that have several, and the first name of each."""
    first: dict[int, str] = {}
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: kept for name, tensor in named if (kept := first.setdefault(id(tensor), name)) != name}


def save_weights(model: nn.Module, path: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes a safetensors file, each shared tensor once, its further names in the file's metadata.

    Raises OSError where it cannot.
    """
    shared = shared_names(model)
    state = model.state_dict() if state_dict is None else state_dict
    held = {name: tensor.detach().contiguous() for name, tensor in state.items() if name not in shared}
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
    """The tensors of a safetensors file, and its metadata. Raises ValueError where it is torn."""
    try:
        with safe_open(path, 'pt', device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{path} is torn, or no safetensors file: {error}') from error


def load_weights(model: nn.Module, path: str | Path, device: str = 'cpu') -> None:
    """Loads what `save_weights` wrote; what shared a tensor there shares it here.

    Raises ValueError where the file is torn, RuntimeError where it does not fit the model.
    """
    weights, metadata = read_tensors(path, device)
    for name, kept in json.loads(metadata.get(SHARED, '{}')).items():
        if kept in weights:
            tie(model, name, kept)
            weights[name] = weights[kept]
    model.load_state_dict(weights)


def tie(model: nn.Module, name: str, to: str) -> None:
    """Gives the parameter `to` another name."""

    def owner(path: str) -> tuple[nn.Module, str]:
        module, _, leaf = path.rpartition('.')
        return model.get_submodule(module), leaf

    try:
        (module, leaf), (source, source_leaf) = owner(name), owner(to)
        old, new = getattr(module, leaf), getattr(source, source_leaf)
    except AttributeError as error:
        raise ValueError(f'weights share {to} as {name}, which the model does not have') from error
    if old is not new:
        setattr(module, leaf, new)
