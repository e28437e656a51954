"""Makes state dicts of the published package 0.4.0 fit."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .objectives import OBJECTIVES
from .weights import shared_names

# the rotary frequencies of windowed attention, under the published package's name
WINDOWED_FREQS = re.compile(r'(layers\.\d+\.\d+\.attn\.)attn_fn\.rel_pos\.inv_freq')
# modules that exist only if an objective uses them: those of objectives, and heads inside other modules
CONTAINERS = '|'.join(name for kind in OBJECTIVES for name in kind.containers)
OPTIONAL_KEYS = re.compile(
    rf'((?:{CONTAINERS})\.\d+|compressors\.\d+\.to_recon|autoencoder\.decoders\.\d+|autoencoder\.to_ids)\.'
)


def adapt_published_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """A hook of `load_state_dict`: renames keys that the published package names otherwise, drops unused ones.

    Raises ValueError where the model has one weight for several that differ in the state dict.
    """
    for name, first in shared_names(model).items():
        held, kept = (state_dict.get(f'{prefix}{key}') for key in (name, first))
        if held is not None and kept is not None and not (held.is_meta or torch.equal(held, kept)):
            raise ValueError(f'{name} and {first} are one weight in this model, and differ in the state dict')
    known = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if freqs := WINDOWED_FREQS.fullmatch(name):
            state_dict[f'{prefix}{freqs[1]}rotary_emb.freqs'] = state_dict.pop(key)
        elif (part := OPTIONAL_KEYS.match(name)) and not any(each.startswith(part[0]) for each in known):
            del state_dict[key]
