"""A summary of a model in a few lines, for `repr(model)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .model import HierarchicalTransformer

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)


def summary(model: HierarchicalTransformer) -> str:
    """One line for the model, one for each level, and one for each part."""
    like = model.token_emb.weight
    lines = [
        f'num_tokens={model.num_tokens}, seq_len={model.seq_len}, arrangement={model.arrangement!r}, '
        f'{count_parameters(model)}, {like.dtype}, {like.device}',
        *map(str, model.levels),
        *(
            f'({name}): {describe(part)}, {count_parameters(part)}'
            for name, part in model.named_children()
            if not isinstance(part, CONTAINERS) or len(part)
        ),
    ]
    return '\n  '.join((f'{type(model).__name__}(', *lines)) + '\n)'


def count_parameters(module: nn.Module) -> str:
    return f'{sum(parameter.numel() for parameter in module.parameters()):,} parameters'


def describe(module: nn.Module) -> str:
    """Describes a module in one line. For a container, it is the number and the classes of its parts."""

    def kind(part: nn.Module) -> str:
        if not isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            return type(part).__name__
        parts = part.values() if isinstance(part, nn.ModuleDict) else part
        kinds = dict.fromkeys(kind(each) for each in parts if each is not None)
        return f'{len(part)} x {" | ".join(kinds)}'

    return kind(module) if list(module.children()) else str(module).replace('\n', ' ')
