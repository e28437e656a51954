"""Checks of options against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .arrangements import arrangement_of
from .generation.prompts import BYTE_VOCABULARIES

if TYPE_CHECKING:
    from .config import Config


def check_together(config: Config) -> None:
    """Raises ValueError where two options contradict each other, and names both."""
    check_embeddings(config)
    check_layers(config)
    check_prediction(config)
    arrangement_of(config).check(config)
    check_merges(config)
    check_autoencoder(config)
    check_next_latent(config)


def check_embeddings(config: Config) -> None:
    for name in ('word_ngrams', 'word_recall'):
        if getattr(config, name) and config.num_tokens not in BYTE_VOCABULARIES:
            raise ValueError(f'{name} reads ids as bytes: num_tokens must be 256, 257 or 258, got {config.num_tokens}')


def check_layers(config: Config) -> None:
    if config.halting is not None and (not config.share_layers or arrangement_of(config).nested):
        raise ValueError(
            f"halting is for share_layers = True and arrangement = 'parallel', got {config.share_layers} and "
            f'{config.arrangement!r}'
        )
    together: dict[str, Any] = dict(residual='add', halting=None, arrangement='parallel', gradient_checkpointing=False)
    for name, allowed in together.items() if config.reversible else ():
        if (given := getattr(config, name)) != allowed:
            raise ValueError(f'reversible goes with {name} = {allowed!r}, got {given!r}')
    differ = any(level.depth < config.layers for level in config.levels)
    if differ and (not arrangement_of(config).nested or config.share_layers):
        raise ValueError(
            f"depth may differ between hierarchies with arrangement = 'hourglass' and share_layers = False alone, "
            f'got {config.depth!r} with {config.arrangement!r} and {config.share_layers}'
        )
    for kwargs in (level.mixer_kwargs for level in config.levels if level.mixer == 'attention'):
        interleaves = 'pattern' in kwargs and kwargs.get('pattern_mode', 'interleave') == 'interleave'
        if config.share_layers and interleaves:
            raise ValueError("share_layers has no layers to interleave: pattern_mode must be 'union' or 'heads'")


def check_prediction(config: Config) -> None:
    if all(config.levels[i].stride > 1 for i in config.predict_from):
        strides = {config.compressions[i]: config.levels[i].stride for i in config.predict_from}
        raise ValueError(
            'hierarchical_stride must be 1 for the level that predicts (predict_hierarchy), or for one level '
            f'where all predict (predict_use_all_hierarchy), got strides {strides} by hierarchy'
        )


def check_merges(config: Config) -> None:
    if config.hierarchy_merge_all and len(config.receivers) < len(config.levels):
        raise ValueError(f'hierarchy_merge_all merges into all, and merge_into is {config.merge_into!r}')
    if config.merge_window and config.merge != 'attention':
        raise ValueError(f"merge_window is for merge = 'attention', got {config.merge_window} with {config.merge!r}")


def check_autoencoder(config: Config) -> None:
    if not config.autoencoder:
        return
    if arrangement_of(config).nested:
        raise ValueError(f'autoencoder feeds levels side by side, and arrangement is {config.arrangement!r}')
    if set(config.values('compressor')) != {'conv'}:
        raise ValueError(f"autoencoder takes the compressors' place, and compressor is {config.compressor!r}")
    if max(config.compressions) == 1:
        raise ValueError(f'autoencoder needs a hierarchy that compresses, got {config.compressions}')


def check_next_latent(config: Config) -> None:
    # checks the weights
    _ = config.rollouts
    if len(config.summarizers) != len(config.levels):
        raise ValueError(
            f'chunk_summarizers must have one module or None for each of the {len(config.levels)} hierarchies, '
            f'got {len(config.summarizers)}'
        )
    weights = config.values('next_latent_loss_weight')
    for level, summarizer, weight in zip(config.levels, config.summarizers, weights, strict=True):
        if summarizer is not None and not isinstance(summarizer, nn.Module):
            raise ValueError(f'chunk_summarizers must be modules or None, got {summarizer!r}')
        if summarizer is not None and weight == 0:
            raise ValueError(
                f'chunk_summarizers has a module for hierarchy {level.compression}, which has a '
                'next_latent_loss_weight of 0 and would never use it'
            )
