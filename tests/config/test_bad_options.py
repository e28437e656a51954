"""Bad options are refused by the constructor, with an error that names the argument."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.mixers import MIXERS

GOOD: dict[str, Any] = dict(num_tokens=11, dim=8, depth=1, seq_len=16, dim_head=4, heads=2)


# options of placed levels in an hourglass, and what is said of them
PLACED: list[tuple[dict[str, Any], str]] = [
    (
        dict(hierarchies=(1, 4), boundaries=(None, 'spaces')),
        'boundaries must be None, one of every, words, sentences, learned, surprise, rise, or a module, got '
        "'spaces' for hierarchy 4",
    ),
    (dict(hierarchies=(1, 4), boundaries=(None, 3)), 'or a module, got 3 for hierarchy 4'),
    (dict(hierarchies=(1, 4), boundaries=(None,)), 'boundaries must be one value or one for each of the 2'),
    (
        dict(hierarchies=(1, 4), boundaries=nn.Identity()),
        'boundaries must have one module or None for each hierarchy, got one module for all',
    ),
    (
        dict(hierarchies=(4, 1), boundaries=(None, 'every')),
        "boundaries must be None for the finest hierarchy, 1, got 'every'",
    ),
    (
        dict(boundaries='every', hierarchies=1, depth=2, dim=8, window_sizes=None),
        "boundaries place levels inside the finest one, and hierarchies is 1, got 'every'",
    ),
    (
        dict(hierarchies=(1, 4, 8), boundaries=(None, 'every', None)),
        'boundaries must place hierarchy 8 too, which is inside placed hierarchy 4',
    ),
    (
        dict(hierarchies=(1, 4), hierarchical_stride=(1, 2), boundaries=(None, 'every')),
        'hierarchical_stride must be 1 for a level with boundaries, got 2 for hierarchy 4',
    ),
    (
        dict(hierarchies=(1, 4), compressor=('conv', 'mean'), boundaries=(None, 'every')),
        "compressor must be 'conv', the default, for a level with boundaries, which has downsample in its place, got "
        "'mean' for hierarchy 4",
    ),
    *(
        (
            dict(hierarchies=(1, 4), boundaries=(None, rule)),
            f'boundaries {rule!r} reads ids as bytes: num_tokens must be 256, 257 or 258, got 11',
        )
        for rule in ('words', 'sentences')
    ),
    (
        dict(hierarchies=(1, 4, 6), boundaries=(None, 'learned', 'every')),
        "hierarchies must be multiples of the next finer one, 4, with boundaries = 'every', got 6",
    ),
    (
        dict(hierarchies=(1, 6), boundaries=(None, None)),
        'hierarchies must be powers of two (1, 2, 4, ...), got 6 in (1, 6)',
    ),
    (dict(hierarchies=(3, 6), boundaries='every'), 'hierarchies must be powers of two (1, 2, 4, ...), got 3 in (3, 6)'),
    (
        dict(hierarchies=(1, 4), boundaries=(None, 'every'), upsample='smooth'),
        "upsample = 'smooth' needs boundaries with probabilities, 'learned' or a module, got 'every' for hierarchy 4",
    ),
    (
        dict(hierarchies=(1, 4, 8), boundaries=(None, 'every', 'every'), merge='attention', merge_window=2),
        'merge_window must be 0 where a placed hierarchy is inside another, as 8 in 4, got 2',
    ),
    (
        dict(hierarchies=(1, 4), boundaries=(None, 'every'), upsample='nearest'),
        "upsample must be one of repeat, boundary, offset, smooth, got 'nearest'",
    ),
    (
        dict(hierarchies=(1, 4), boundaries=(None, 'every'), downsample='mean'),
        "downsample must be one of token, attention, got 'mean'",
    ),
    (dict(hierarchies=(1, 4), downsample='attention'), "downsample is for levels with boundaries, got 'attention'"),
    (
        dict(hierarchies=(1, 4), boundaries=(None, 'every'), upsample=('offset', 'repeat')),
        "upsample is for levels with boundaries, got 'offset' for hierarchy 1",
    ),
]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(num_tokens=0), 'num_tokens must be an integer of at least 1, got 0'),
        (dict(num_tokens=1.5), 'num_tokens must be an integer of at least 1, got 1.5'),
        (
            dict(attn_backend='xformers'),
            "attn_backend must be one of auto, sdpa, flex, local-attention, got 'xformers'",
        ),
        (dict(recon_sample=0), 'recon_sample must be above 0 and at most 1, got 0'),
        (dict(recon_sample=1.5), 'recon_sample must be above 0 and at most 1, got 1.5'),
        (dict(gradient_checkpointing=1), 'gradient_checkpointing must be True or False, got 1'),
        (dict(depth=0), 'depth must be an integer of at least 1, got 0'),
        (dict(depth=10**6), 'depth must be at most 4,096, got 1000000'),
        (dict(num_rollouts=10**9), 'num_rollouts must be at most 4,096, got 1000000000'),
        (dict(ngrams=(10**9,)), 'ngrams must be at most 65,536, got 1000000000'),
        (dict(dim=10**30), f'dim must be at most 1,000,000,000,000, got {10**30}'),
        (dict(ff_mult=1e308), 'ff_mult must be at most 1.25e+11, got 1e+308'),
        (dict(ignore_index=10**30), f'ignore_index must be at most 1,000,000,000,000, got {10**30}'),
        (
            dict(num_rollouts=2, rollout_weights=(1e308, 1e308)),
            'rollout_weights must be at most 1e+30, got 1e+308',
        ),
        (dict(depth=True), 'depth must be an integer of at least 1, got True'),
        (dict(seq_len=0), 'seq_len must be an integer of at least 1, got 0'),
        (dict(dim=0), 'dim must be an integer of at least 2, got 0'),
        (dict(dim=(8, 8)), 'dim must be one value or one for each of the 1 hierarchies, got (8, 8)'),
        (dict(dim=(8,), hierarchies=(1, 2)), 'dim must be one value or one for each of the 2 hierarchies, got (8,)'),
        (dict(heads=0), 'heads must be an integer of at least 1, got 0'),
        (dict(heads='two'), "heads must be an integer of at least 1, got 'two'"),
        (dict(dim_head=0), 'dim_head must be an integer of at least 1, got 0'),
        (dict(dim_head=3), 'dim_head must be even (rotary embeddings turn pairs of channels), got 3'),
        (dict(ff_mult=0), 'ff_mult must leave a hidden width of at least 1, got 0 for dim 8'),
        (
            dict(num_tokens=2**63),
            'num_tokens must be at most 1,000,000,000,000, got 9223372036854775808',
        ),
        (dict(dynamics_num_layers=10**9), 'dynamics_num_layers must be at most 4,096, got 1000000000'),
        (dict(quantizer_codebooks=10**9), 'quantizer_codebooks must be at most 4,096, got 1000000000'),
        (dict(num_tokens=np.array([2, 3])), 'num_tokens must be an integer of at least 1, got [2, 3]'),
        (dict(num_tokens=torch.tensor(2.0)), 'num_tokens must be an integer of at least 1, got 2.0'),
        (dict(depth=np.bool_(True)), 'depth must be an integer of at least 1, got True'),
        (dict(dim=torch.empty(1, device='meta')), 'dim must be an integer of at least 2, got tensor('),
        (dict(hierarchies='12'), "hierarchies must be powers of two (1, 2, 4, ...), got '12' in '12'"),
        (dict(hierarchies=b'\x01'), "hierarchies must be powers of two (1, 2, 4, ...), got b'\\x01' in b'\\x01'"),
        (dict(ff_mult=-1), 'ff_mult must be a finite number of at least 0, got -1'),
        (dict(hierarchies=()), 'hierarchies must name at least one compression factor, got none'),
        (dict(hierarchies=(1, 3)), 'hierarchies must be powers of two (1, 2, 4, ...), got 3 in (1, 3)'),
        (dict(hierarchies=0), 'hierarchies must be powers of two (1, 2, 4, ...), got 0 in 0'),
        (dict(hierarchies=(2, 2)), 'hierarchies must all differ, got (2, 2)'),
        (dict(hierarchies=(1, 2.0)), 'hierarchies must be powers of two (1, 2, 4, ...), got 2.0'),
        (
            dict(hierarchies=(1, 4), hierarchical_stride=(1, 3)),
            'hierarchical_stride must be powers of two (1, 2, 4, ...), got 3 for hierarchy 4',
        ),
        (
            dict(hierarchies=(1, 4), hierarchical_stride=(1, 8)),
            'hierarchical_stride must not exceed its hierarchy, got stride 8 for hierarchy 4',
        ),
        (dict(hierarchies=(1, 4), hierarchical_stride=2), 'hierarchical_stride must not exceed its hierarchy'),
        (
            dict(hierarchies=(1, 4), hierarchical_stride=(1, 2), predict_hierarchy=4),
            'hierarchical_stride must be 1 for the level that predicts (predict_hierarchy)',
        ),
        (
            dict(hierarchies=(2, 4), hierarchical_stride=(2, 4), predict_use_all_hierarchy=True),
            'for one level where all predict (predict_use_all_hierarchy), got strides {2: 2, 4: 4}',
        ),
        (dict(predict_hierarchy=2), 'predict_hierarchy must be one of hierarchies [1], got 2'),
        (dict(window_sizes=-1), 'window_sizes must be an integer of at least 0, got -1'),
        (dict(window_sizes=2.5), 'window_sizes must be an integer of at least 0, got 2.5'),
        (dict(window_sizes=(4, None)), 'window_sizes must be one value or one for each of the 1 hierarchies'),
        (dict(recon_loss_weight=-0.1), 'recon_loss_weight must be a finite number of at least 0, got -0.1'),
        (dict(recon_loss_weight=float('nan')), 'recon_loss_weight must be a finite number of at least 0, got nan'),
        (dict(next_latent_loss_weight=-1), 'next_latent_loss_weight must be a finite number of at least 0, got -1'),
        (dict(next_latent_loss_weight=(0.1, 0.2)), 'next_latent_loss_weight must be one value or one for each of'),
        (dict(next_latent_loss_type='l2'), 'next_latent_loss_type must be one of mse_and_cosine_sim, mse, smooth_l1'),
        (dict(next_latent_loss_type=3), 'or a callable, got 3'),
        (dict(num_rollouts=0), 'num_rollouts must be an integer of at least 1, got 0'),
        (dict(num_rollouts=2, rollout_weights=(1.0,)), 'rollout_weights must have one value for each of the 2'),
        (dict(rollout_weights=1.0), 'rollout_weights must be a tuple or list, got 1.0'),
        (dict(rollout_weights=(0.0,)), 'rollout_weights must not all be zero, got (0.0,)'),
        (dict(rollout_weights=(-1.0,)), 'rollout_weights must be a finite number of at least 0, got -1.0'),
        (dict(dynamic_loss_decay=-1), 'dynamic_loss_decay must be a finite number of at least 0, got -1'),
        (dict(dynamics_hidden_dim=0), 'dynamics_hidden_dim must be an integer of at least 1, got 0'),
        (dict(dynamics_num_layers=0), 'dynamics_num_layers must be an integer of at least 1, got 0'),
        (dict(ignore_index=None), 'ignore_index must be an integer, got None'),
        (dict(recon_ignore_index=1.0), 'recon_ignore_index must be an integer, got 1.0'),
        (dict(hierarchy_merge_all='no'), "hierarchy_merge_all must be True or False, got 'no'"),
        (dict(predict_use_all_hierarchy=1), 'predict_use_all_hierarchy must be True or False, got 1'),
        (dict(detach_summaries=None), 'detach_summaries must be True or False, got None'),
        (dict(predict_hierarchy=True), 'predict_hierarchy must be one of hierarchies [1], got True'),
        (dict(merge='mean'), "merge must be one of concat, linear, attention, skip, got 'mean'"),
        (dict(merge_window=-1), 'merge_window must be an integer of at least 0, got -1'),
        (dict(merge_window=2, hierarchies=(1, 2)), "merge_window is for merge = 'attention', got 2 with 'concat'"),
        (
            dict(hierarchies=(1, 2), merge_into='some'),
            "merge_into must be 'predict', 'all' or a tuple of hierarchies [1, 2] that differ, got 'some'",
        ),
        (dict(hierarchies=(1, 2), merge_into=(1, 4)), 'or a tuple of hierarchies [1, 2] that differ, got (1, 4)'),
        (dict(hierarchies=(1, 2), merge_into=()), 'or a tuple of hierarchies [1, 2] that differ, got ()'),
        *(
            (dict(hierarchies=(1, 2), merge_into=into), f'or a tuple of hierarchies [1, 2] that differ, got {into}')
            for into in ((True,), (1, 1), ([1],))
        ),
        (dict(hierarchies=(1, 2), merge_into=(2,)), 'merge_into must name a level that predicts, [1]: nothing would'),
        (
            dict(hierarchies=(1, 2), merge_into=(1,), hierarchy_merge_all=True),
            'hierarchy_merge_all merges into all, and merge_into is (1,)',
        ),
        (dict(arrangement='serial'), "arrangement must be one of parallel, hourglass, got 'serial'"),
        (
            dict(arrangement='hourglass', hierarchies=(1, 2), predict_hierarchy=2),
            "arrangement = 'hourglass' predicts from its finest level, got predict_hierarchy 2",
        ),
        (
            dict(arrangement='hourglass', hierarchies=(1, 4, 8), hierarchical_stride=(1, 4, 2)),
            "hierarchical_stride must not fall from a level to a coarser one in arrangement = 'hourglass', got 4 for "
            'hierarchy 4 and 2 for 8',
        ),
        (
            dict(arrangement='hourglass', hierarchies=(1, 4), hierarchy_merge_all=True),
            "merge_into is for arrangement = 'parallel'",
        ),
        (dict(arrangement='hourglass', hierarchies=(1, 4), autoencoder=True), "and arrangement is 'hourglass'"),
        (dict(compressor='pool'), "compressor must be one of conv, attention, mean, linear, or a module, got 'pool'"),
        (dict(compressor=('conv', 'mean')), 'compressor must be one value or one for each of the 1 hierarchies'),
        (dict(compressor=nn.Identity(), hierarchies=(1, 2)), 'compressor must have one module for each hierarchy'),
        (dict(autoencoder=True), 'autoencoder needs a hierarchy that compresses, got [1]'),
        (
            dict(autoencoder=True, hierarchies=(1, 2), compressor='mean'),
            "autoencoder takes the compressors' place, and compressor is 'mean'",
        ),
        (dict(residual='none'), "residual must be one of add, gru, got 'none'"),
        *(
            (
                dict(reversible=True, **{name: value}, **more),
                f'reversible goes with {name} = {allowed!r}, got {value!r}',
            )
            for name, value, allowed, more in (
                ('residual', 'gru', 'add', {}),
                ('halting', 'act', None, dict(share_layers=True)),
                ('arrangement', 'hourglass', 'parallel', {}),
                ('gradient_checkpointing', True, False, {}),
            )
        ),
        (dict(ff_chunks=0), 'ff_chunks must be an integer of at least 1, got 0'),
        (dict(share_layers=1), 'share_layers must be True or False, got 1'),
        (
            dict(halting='act'),
            "halting is for share_layers = True and arrangement = 'parallel', got False and 'parallel'",
        ),
        (dict(halting='often', share_layers=True), "halting must be one of act, got 'often'"),
        (dict(ponder_loss_weight=-1), 'ponder_loss_weight must be a finite number of at least 0, got -1'),
        (
            dict(share_layers=True, mixer_kwargs=dict(pattern='fixed')),
            "share_layers has no layers to interleave: pattern_mode must be 'union' or 'heads'",
        ),
        (dict(autoencoder='yes'), "autoencoder must be True or False, got 'yes'"),
        (dict(autoencoder_loss_weight=-1), 'autoencoder_loss_weight must be a finite number of at least 0, got -1'),
        (dict(share_attention=1), 'share_attention must be True or False, got 1'),
        (
            dict(share_attention=True, hierarchies=(1, 2), heads=(1, 2)),
            'share_attention needs levels of equal dim, heads, dim_head and kind of window, got [(8, 1, 4, True), ',
        ),
        (dict(share_attention=True, hierarchies=(1, 2), window_sizes=0), 'share_attention needs levels of equal'),
        (dict(share_feed_forward=True), 'share_feed_forward needs levels of equal dim and ff_mult, got [(8, 32)]'),
        (dict(window_sizes='half'), "window_sizes must be integers, None or 'auto', got 'half'"),
        (dict(prophet_loss_weight=-1), 'prophet_loss_weight must be a finite number of at least 0, got -1'),
        (dict(prophet_loss_weight=(1, 1)), 'prophet_loss_weight must be one value or one for each of the 1'),
        (dict(quantized_loss_weight='a'), "quantized_loss_weight must be a finite number of at least 0, got 'a'"),
        (dict(quantize_from='input'), "quantize_from must be one of compressed, output, got 'input'"),
        (dict(quantizer_codebooks=0), 'quantizer_codebooks must be an integer of at least 1, got 0'),
        (dict(quantizer_codebook_size=1), 'quantizer_codebook_size must be an integer of at least 2, got 1'),
        (dict(quantizer_dim=0), 'quantizer_dim must be an integer of at least 1, got 0'),
        (dict(chunk_summarizers=nn.Identity()), 'chunk_summarizers must be a tuple or list, got Identity()'),
        (dict(chunk_summarizers=(None, None)), 'chunk_summarizers must have one module or None for each of the 1'),
        (dict(chunk_summarizers=(3,)), 'chunk_summarizers must be modules or None, got 3'),
        (
            dict(chunk_summarizers=(nn.Identity(),), next_latent_loss_weight=0),
            'chunk_summarizers has a module for hierarchy 1, which has a next_latent_loss_weight of 0',
        ),
        (dict(ngrams=3), 'ngrams must be a tuple or list, got 3'),
        (dict(ngrams=(1, 2)), 'ngrams must be an integer of at least 2, got 1'),
        (dict(ngrams=(2, 2)), 'ngrams must all differ, got (2, 2)'),
        (dict(recall=4), 'recall must be a tuple or list, got 4'),
        (dict(recall=(0,)), 'recall must be an integer of at least 1, got 0'),
        (dict(word_ngrams=(1,)), 'word_ngrams reads ids as bytes: num_tokens must be 256, 257 or 258, got 11'),
        (dict(word_recall=(1,)), 'word_recall reads ids as bytes: num_tokens must be 256, 257 or 258, got 11'),
        (dict(num_tokens=256, word_ngrams=(0,)), 'word_ngrams must be an integer of at least 1, got 0'),
        (dict(recall=(2, 2)), 'recall must all differ, got (2, 2)'),
        (dict(ngrams=(2,), ngram_rows=100), 'ngram_rows must be a power of two, got 100'),
        (dict(ngrams=(2,), ngram_dropout=1), 'ngram_dropout must be at least 0 and below 1, got 1'),
        (dict(ff_activation='relu'), "ff_activation must be one of gelu, relu2, swiglu, got 'relu'"),
        (dict(zero_init=1), 'zero_init must be True or False, got 1'),
        (dict(mixer_kwargs=dict(qk_norm=1)), 'qk_norm must be True or False, got 1'),
        (dict(depth=(0,)), 'depth must be an integer of at least 1, got 0'),
        (dict(depth=(1, 2)), 'depth must be one value or one for each of the 1 hierarchies'),
        (dict(depth=(1, 2), hierarchies=(1, 2)), "depth may differ between hierarchies with arrangement = 'hourglass'"),
        (
            dict(depth=(1, 2), hierarchies=(1, 2), arrangement='hourglass', share_layers=True),
            'depth may differ between hierarchies',
        ),
        (dict(ratio_loss_weight=-1), 'ratio_loss_weight must be a finite number of at least 0, got -1'),
        (dict(surprise_loss_weight=math.nan), 'surprise_loss_weight must be a finite number of at least 0, got nan'),
        (dict(merge='skip', hierarchies=(1, 2)), "merge = 'skip' is for arrangement = 'hourglass', got 'parallel'"),
        (
            dict(hierarchies=(1, 4), boundaries=(None, 'every')),
            "boundaries are for arrangement = 'hourglass', got 'parallel'",
        ),
        *((arguments | dict(arrangement='hourglass'), message) for arguments, message in PLACED),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HierarchicalTransformer(**{**GOOD, **arguments})


def test_constructor_refuses_unknown_arguments() -> None:
    with pytest.raises(TypeError, match='windows'):
        HierarchicalTransformer(**GOOD, windows=3)


HOSTILE: tuple[Any, ...] = (
    math.nan, math.inf, -math.inf, -1, 0, 1e308, 10**30, -(10**30), 10**9, '', 'x', b'x', None, True, 1.5, 1j, [], {},
    {'x': 1}, {1, 2}, [10**30], [1e308, 1], ['x', 1], ...,
)  # fmt: skip


def build_or_refuse(**arguments: Any) -> None:
    """Builds a model on the meta device, which needs no memory. torch refuses sizes that overflow."""
    try:
        with torch.device('meta'):
            HierarchicalTransformer(**arguments)
    except ValueError:
        pass
    except RuntimeError as error:
        if 'overflowed' not in str(error):
            raise


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', inspect.signature(HierarchicalTransformer).parameters)
def test_constructor_builds_or_refuses_any_value(name: str) -> None:
    good = dict(GOOD, dim=(8, 8), hierarchies=(1, 4), hierarchical_stride=(1, 4), merge='attention', merge_window=1)
    placed = good | dict(hierarchical_stride=1, merge_window=0, arrangement='hourglass', boundaries=(None, 'learned'))
    for value in HOSTILE:
        build_or_refuse(**{**good, 'quantized_loss_weight': 0.1, 'ngrams': (2,), name: value})
        build_or_refuse(**{**placed, name: value})


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize(
    ('mixer', 'name'),
    [
        (mixer, name)
        for mixer, kind in MIXERS.items()
        for name in inspect.signature(kind).parameters
        if name not in ('dim', 'dim_head', 'heads', 'window', 'length', 'layer', 'backend', 'placed')
    ],
)
def test_mixers_are_built_or_refuse_any_value(mixer: str, name: str) -> None:
    for value in HOSTILE:
        for others in ({}, {'pattern': 'fixed'}) if mixer == 'attention' else ({},):
            build_or_refuse(**GOOD, mixer=mixer, mixer_kwargs={**others, name: value})
