"""Named configurations that together use every option of the model, and every name that an option can take."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from support.configs import let_surprise_cut
from torch import Tensor, nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.block import ACTIVATIONS
from simple_hierarchical_transformer.boundaries import BOUNDARIES, Boundaries, Marks
from simple_hierarchical_transformer.config import Config
from simple_hierarchical_transformer.levels import COMPRESSORS
from simple_hierarchical_transformer.mixers import MIXERS
from simple_hierarchical_transformer.ops.pattern_attention import MODES, PATTERNS
from simple_hierarchical_transformer.ops.window_attention import BACKENDS
from simple_hierarchical_transformer.resampling import DOWNSAMPLERS, UPSAMPLERS

# FlexAttention supports heads of 32 channels
BASE: dict[str, Any] = dict(
    num_tokens=256, dim=64, depth=2, dim_head=32, heads=2, ff_mult=2, seq_len=512, ngram_rows=1024, ignore_index=-1,
    recon_ignore_index=-1,
)  # fmt: skip
WINDOW = dict(window_sizes=64)
LEVELS = dict(hierarchies=(1, 2, 8), hierarchical_stride=(1, 1, 4), window_sizes=(16, 64, None))
TWO = dict(hierarchies=(1, 4), hierarchical_stride=(1, 2), window_sizes=(64, None))
HOURGLASS = dict(
    arrangement='hourglass', hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=(64, None), depth=(2, 1)
)
PLACED: dict[str, Any] = dict(
    arrangement='hourglass', hierarchies=(1, 4), boundaries=(None, 'words'), window_sizes=(64, None), depth=(2, 1)
)
LEARNED: dict[str, Any] = dict(PLACED, boundaries=(None, 'learned'))
# a placed level inside another
NESTED: dict[str, Any] = dict(
    PLACED,
    hierarchies=(1, 4, 16),
    boundaries=(None, 'words', 'sentences'),
    window_sizes=(64, 64, None),
    depth=(2, 2, 1),
)
NO_LOSSES = dict(recon_loss_weight=0.0, next_latent_loss_weight=0.0)
TABLES = dict(ngrams=(2, 3, 4), word_ngrams=(1, 2), recall=(3, 5), word_recall=(1,))
# the options of the presets of train.py
RECIPE: dict[str, Any] = dict(
    HOURGLASS, **TABLES, **NO_LOSSES, compressor='linear', merge='linear', ff_activation='relu2',
    mixer_kwargs=dict(qk_norm=True), zero_init=True,
)  # fmt: skip
QUANTIZED = dict(quantized_loss_weight=0.1, quantizer_codebooks=2, quantizer_codebook_size=16, quantizer_dim=8)

# options with which training draws random numbers: devices are compared in evaluation mode
DRAWN = {'ngram_dropout', 'recon_sample'}
# arguments without a case, and why
EXEMPT = {
    'use_flash_attn': 'it has no effect',
    'hierarchy_merge_all': "it is the old name of merge_into = 'all'",
    'ngram_rows': 'BASE sets it',
}


class LastByte(nn.Module):
    """A user's summarizer: a projection of every embedding at which a level token ends."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x[:, :: self.stride])


class DoubledIds(Boundaries):
    """A user's rule: a boundary where one of the last two ids repeats one of the two before it.

    The probability depends on the vectors too.
    """

    reach = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_p = nn.Linear(4 * dim, 1)

    def forward(self, x: Tensor, ids: Tensor, index: Tensor) -> Marks:
        repeats = ((ids[:, 2:, None] == ids.unfold(1, 2, 1)[:, :-1]).any(dim=-1)).unfold(1, 2, 1).any(dim=-1)
        return Marks(repeats, self.to_p(x.unfold(1, 4, 1).flatten(2))[..., 0].sigmoid())


def names_in(hint: Any) -> Iterator[Any]:
    """The values of all `Literal`s in a type hint."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from names_in(part)


def options_of(function: Any) -> dict[str, tuple[Any, ...]]:
    """The arguments of a constructor, each with the names that its annotation lists."""
    hints = get_type_hints(inspect.unwrap(function))
    hints.pop('return', None)
    return {name: tuple(names_in(hint)) for name, hint in hints.items()}


def model_options() -> dict[str, tuple[Any, ...]]:
    """The fields of `Config`, one per constructor argument, each with the names that its annotation lists."""
    hints = get_type_hints(Config)
    return {field.name: tuple(names_in(hints[field.name])) for field in fields(Config)}


MODEL_OPTIONS = model_options()
DEFAULTS = {name: each.default for name, each in inspect.signature(HierarchicalTransformer).parameters.items()}
# arguments that a level passes to its mixer
OF_LEVEL = {'dim', 'dim_head', 'heads', 'window', 'length', 'layer', 'backend', 'placed'}
MIXER_OPTIONS = {
    name: {option: names for option, names in options_of(mixer.__init__).items() if option not in OF_LEVEL}
    for name, mixer in MIXERS.items()
}


def named_cases() -> dict[str, dict[str, Any]]:
    """One case for each name that an option can take."""
    cases: dict[str, dict[str, Any]] = {}
    for merge in MODEL_OPTIONS['merge']:
        cases[f'placed, merge {merge}'] = dict(NESTED, merge=merge)
        if merge == 'skip':
            cases[f'merge {merge}'] = dict(HOURGLASS, merge=merge)
            continue
        cases[f'merge {merge}'] = dict(LEVELS, merge=merge)
        cases[f'merge {merge} into all'] = dict(LEVELS, merge=merge, merge_into='all')
    for rule in BOUNDARIES:
        cases[f'boundaries {rule}'] = dict(PLACED, boundaries=(None, rule))
    for downsample in DOWNSAMPLERS:
        cases[f'downsample {downsample}'] = dict(NESTED, downsample=downsample)
    for upsample in UPSAMPLERS:
        cases[f'upsample {upsample}'] = dict(LEARNED, upsample=upsample)
    for kind in MODEL_OPTIONS['arrangement']:
        cases[f'arrangement {kind}'] = dict(HOURGLASS, depth=2, arrangement=kind)
    for compressor in COMPRESSORS:
        cases[f'compressor {compressor}'] = dict(TWO, compressor=compressor)
    for activation in ACTIVATIONS:
        cases[f'feed-forward {activation}'] = dict(WINDOW, ff_activation=activation)
    for backend in BACKENDS:
        cases[f'window by {backend}'] = dict(WINDOW, attn_backend=backend)
        # with a state, full attention runs on this backend too, and grouped queries share keys
        cases[f'levels by {backend}'] = dict(LEVELS, attn_backend=backend, mixer_kwargs=dict(kv_heads=1))
    for residual in MODEL_OPTIONS['residual']:
        cases[f'residual {residual}'] = dict(WINDOW, residual=residual)
    for loss in MODEL_OPTIONS['next_latent_loss_type']:
        cases[f'next latent by {loss}'] = dict(TWO, next_latent_loss_type=loss)
    for source in MODEL_OPTIONS['quantize_from']:
        cases[f'quantized {source}'] = dict(TWO, **QUANTIZED, quantize_from=source)
    for halting in MODEL_OPTIONS['halting']:
        shared = dict(TWO, share_layers=True, depth=3)
        cases[f'halting {halting}'] = dict(shared, halting=halting, ponder_loss_weight=0.1)
    for mixer in MIXERS:
        cases[mixer] = dict(TWO, mixer=mixer, window_sizes=None)
        for option, names in MIXER_OPTIONS[mixer].items():
            if option not in ('pattern', 'pattern_mode'):
                for name in names:
                    cases[f'{mixer}, {option} {name}'] = dict(TWO, mixer=mixer, mixer_kwargs={option: name})
    for pattern in PATTERNS:
        for mode in MODES:
            kwargs = dict(pattern=pattern, pattern_mode=mode)
            cases[f'pattern {pattern} {mode}'] = dict(mixer_kwargs=kwargs)
    return cases


CASES: dict[str, dict[str, Any]] = {
    'full attention': {},
    'no attention': dict(window_sizes=0),
    'windows of half a level': dict(TWO, window_sizes='auto'),
    **named_cases(),
    'merge window': dict(LEVELS, merge='attention', merge_window=3, merge_into=(1, 8)),
    'predict from a coarse level': dict(TWO, hierarchies=(2, 4), predict_hierarchy=2),
    'predict from all': dict(LEVELS, predict_use_all_hierarchy=True),
    'tables': dict(WINDOW, **TABLES),
    'tables in training': dict(WINDOW, ngrams=(2, 3), ngram_dropout=0.5),
    'recipe': RECIPE,
    'shared weights': dict(LEVELS, window_sizes=(16, 64, 8), share_attention=True, share_feed_forward=True),
    'shared layers': dict(TWO, share_layers=True),
    'reversible': dict(LEVELS, reversible=True),
    'checkpointing': dict(LEVELS, gradient_checkpointing=True),
    'chunks of feed-forwards': dict(WINDOW, ff_chunks=3),
    'autoencoder': dict(LEVELS, autoencoder=True, autoencoder_loss_weight=0.2),
    'losses': dict(LEVELS, prophet_loss_weight=(0.0, 0.1, 0.1), recon_loss_weight=0.2, recon_sample=0.5, **QUANTIZED),
    'rollouts': dict(
        TWO, num_rollouts=3, rollout_weights=(1.0, 0.5, 0.25), dynamic_loss_decay=2.0, detach_summaries=False,
        dynamics_hidden_dim=48, dynamics_num_layers=2,
    ),
    'rollouts of fixed weight': dict(TWO, num_rollouts=2, dynamic_rollout_loss_weight=False),
    'summarizers': dict(TWO, chunk_summarizers=(None, LastByte(64, 2)), next_latent_loss_weight=(0.1, 0.3)),
    'ignored ids': dict(TWO, ignore_index=101, recon_ignore_index=101, prophet_loss_weight=0.1),
    'grouped queries': dict(TWO, mixer_kwargs=dict(kv_heads=1, qk_norm=True)),
    'pattern of own sizes': dict(mixer_kwargs=dict(pattern='fixed', pattern_mode='union', stride=16, summary=3)),
    'lsh of own sizes': dict(mixer='lsh', mixer_kwargs=dict(rounds=3, buckets=8, entries=32)),
    'gateloop of few heads': dict(mixer='gateloop', mixer_kwargs=dict(state_heads=4)),
    's4d of own sizes': dict(mixer='s4d', mixer_kwargs=dict(state_dim=16)),
    'h3 of own sizes': dict(mixer='h3', mixer_kwargs=dict(state_dim=16, shift_dim=5)),
    'H-Net': dict(NESTED, boundaries=(None, 'learned', 'learned'), upsample='smooth', merge='skip'),
    'SpaceByte': dict(PLACED, upsample='boundary', merge='linear', predict_use_all_hierarchy=True),
    'short pieces': dict(PLACED, max_piece=8),
    'AU-Net': dict(NESTED, upsample='offset', merge='skip', ff_activation='swiglu'),
    'BLT': dict(PLACED, boundaries=(None, 'surprise'), downsample='attention', merge='attention', merge_window=3),
    'placed inside a stride': dict(
        NESTED, hierarchies=(1, 2, 8), hierarchical_stride=(1, 2, 1), boundaries=(None, None, 'rise'),
    ),
    'placed at fixed counts': dict(
        NESTED, boundaries=(None, 'learned', 'every'), downsample=('token', 'attention', 'token'),
        upsample=('repeat', 'smooth', 'offset'),
    ),
    'placed, all losses': dict(
        NESTED, boundaries=(None, 'learned', 'surprise'), ratio_loss_weight=0.05, surprise_loss_weight=0.5,
        prophet_loss_weight=(0.0, 0.1, 0.1), recon_loss_weight=0.2, num_rollouts=2, **QUANTIZED,
    ),
    'placed recipe': RECIPE | NESTED | dict(hierarchical_stride=1),
    'placed with recurrent layers': dict(
        LEARNED, mixer=('gateloop', 'attention'), residual='gru', share_layers=True, depth=2
    ),
    'placed by a user': dict(PLACED, boundaries=(None, DoubledIds(64)), upsample='smooth'),
    'hyena of own sizes': dict(mixer='hyena', mixer_kwargs=dict(order=3, short=5, filter_dim=16)),
}  # fmt: skip


def build(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> HierarchicalTransformer:
    """Builds a model on the CPU and moves every parameter away from its initial zeros and ones.

    The model is in training mode, unless training draws random numbers.
    """
    torch.manual_seed(0)
    # the model gets its own copies of modules among the arguments
    model = HierarchicalTransformer(**deepcopy({**BASE, **config})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    let_surprise_cut(model)
    return model.train(trains(config))


def trains(config: dict[str, Any]) -> bool:
    """Whether a model gives the same numbers at each call in training mode: it draws none and moves no threshold."""
    rules = config.get('boundaries', ())
    return not (DRAWN & config.keys() or {'surprise', 'rise'} & {rule for rule in rules if isinstance(rule, str)})


def words(batch: int, n: int) -> Tensor:
    """Bytes in which words and n-grams repeat."""
    vocabulary = torch.tensor(list(b'the cat sat on a mat; Then it ate \n')).repeat(batch, -(-n // 36) + 1)
    drawn = torch.randint(0, 256, vocabulary.shape)
    return vocabulary.where(torch.rand(vocabulary.shape) < 0.8, drawn)[:, :n]
