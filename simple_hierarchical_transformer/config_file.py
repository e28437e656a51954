"""`config.json` of a saved model: the arguments of its constructor, recorded, written, read and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from stat import S_ISREG

from .checks import plain
from .version import __version__

CONFIG_FILE = 'config.json'

# Increase this when older versions would misread a folder.
FORMAT = 1
HEADER = ('format', 'library_version')


def record_arguments(
    parameters: Sequence[Parameter], args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Splits the arguments of a constructor's call into those that config.json can hold and the others.

    Args:
        parameters: the parameters of the constructor, without `self`.
        args: the positional arguments.
        kwargs: the keyword arguments.

    Returns:
        The values for config.json by name, without defaults, and the names of the arguments that it cannot hold.
    """
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Arguments for `*args` have no name, so they cannot be passed as keywords later.
    given = {'*args': object()} if len(args) > len(names) else dict(zip(names, args, strict=False))
    given = {name: plain(value) for name, value in {**given, **kwargs}.items()}
    lost = sorted(name for name, value in given.items() if name in HEADER or not is_json(value))
    return {name: value for name, value in given.items() if name not in lost}, lost


def argument_names(cls: type) -> set[str]:
    """Returns the names of a constructor's arguments, including those of base classes that get its `**kwargs`."""
    names: set[str] = set()
    for base in cls.__mro__:
        if '__init__' in vars(base):
            parameters = list(signature(vars(base)['__init__']).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names


def is_json(value: object) -> bool:
    """Returns whether a value survives a round trip through JSON. Tuples may become lists."""

    def as_list(value: object) -> object:
        return [as_list(each) for each in value] if isinstance(value, (list, tuple)) else value

    try:
        return json.loads(json.dumps(value, allow_nan=False)) == as_list(value)
    except (TypeError, ValueError):
        return False


def write_config(arguments: Mapping[str, object], path: Path) -> None:
    """Writes the arguments of a constructor to a JSON file, after the format and the version of the library."""
    config = {**dict(zip(HEADER, (FORMAT, __version__), strict=True)), **arguments}
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def read_config(path: str | Path) -> dict[str, object]:
    """Returns the contents of config.json. Raises ValueError if it is not a JSON object."""
    check_file(path)
    try:
        config = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold a JSON object of settings, got {type(config).__name__}')
    return config


def check_config(config: Mapping[str, object], source: str, names: set[str]) -> dict[str, object]:
    """Checks what `read_config` returned against the names of the constructor's arguments.

    Returns:
        The arguments for the constructor.

    Raises:
        ValueError: the format is newer than this version of the library, or an argument is unknown.
    """
    written = config.get('format', FORMAT)
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise ValueError(
            f'{CONFIG_FILE} of {source} has format {written!r}, by version {config.get("library_version", "unknown")} '
            f'of the library; this is version {__version__}, which reads formats up to {FORMAT}'
        )
    if unknown := set(config) - names - set(HEADER):
        raise ValueError(f'{CONFIG_FILE} of {source} has settings unknown here: {shorten(", ".join(sorted(unknown)))}')
    return {name: value for name, value in config.items() if name not in HEADER}


def check_file(path: str | Path) -> None:
    """Raises ValueError unless `path` is a regular file. A pipe or a device could block the reader forever."""
    if not S_ISREG(os.stat(path).st_mode):
        raise ValueError(f'{path} is not a regular file')


def shorten(text: str, limit: int = 2000) -> str:
    """Returns the first `limit` characters of a text."""
    return text if len(text) <= limit else f'{text[:limit]} ...'
