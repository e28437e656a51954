"""The model: embed, compress, (blocks, merge) x depth, logits and losses."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import ACTIVATIONS, HierarchicalBlock
from .calls import TypedModule
from .checks import (
    MOST,
    MOST_IN_TURN,
    MOST_PARTS,
    check_choice,
    check_int,
    check_number,
    check_output,
    check_sequence,
    is_int,
    per_level,
    plain_arguments,
)
from .compressors import Autoencoder, Compressor
from .embeddings import Contexts, NGramEmbedding, RecallEmbedding
from .generation.loop import BYTE_VOCABULARIES, Generative, check_ids
from .halting import AdaptiveHalting
from .levels import Level, build_levels
from .memory import BlockState, State, keep, room_for
from .merges.base import (
    AttentionMerge,
    Contribution,
    HierarchicalMerge,
    LinearMerge,
    MergeState,
    concat_levels,
    without,
)
from .mixers import MIXERS
from .mixers.attention import BACKENDS
from .objectives.base import (
    ChunkSummarizer,
    LatentDynamics,
    LossParts,
    Part,
    RandomProjectionQuantizer,
    coming_ids,
    cross_entropy,
    find_latent_loss,
    next_latent_loss,
    normalise_rollout_weights,
    rollout_counts,
    seen_ids,
)
from .ops.coupling import Coupling, run_couplings, run_plainly
from .ops.linear import begin_at_zero, chain, has_hooks
from .ops.recompute import recompute
from .pretrained import Pretrained, shared_names

# what the published package's windowed attention calls its rotary frequencies
WINDOWED_FREQS = re.compile(r'(layers\.\d+\.\d+\.attn\.)attn_fn\.rel_pos\.inv_freq')
# parts that exist only where a loss uses them
OPTIONAL_KEYS = re.compile(
    r'(latent_dynamics\.\d+|chunk_summarizers\.\d+|compressors\.\d+\.to_recon|to_prophet\.\d+|to_quantized\.\d+'
    r'|quantizers\.\d+|autoencoder\.decoders\.\d+|autoencoder\.to_ids)\.'
)


class Read(NamedTuple):
    """What a pass makes of ids `(batch, n)`, on its way from embeddings to what predicts."""

    embeds: Tensor
    """`(batch, n, max(dim))`"""
    codes: Tensor | None
    """The autoencoder's coarsest map, where there is one."""
    inputs: list[Tensor]
    """Each level's tokens as its blocks get them, `(batch, ceil(n / stride), dim)`."""
    tokens: list[Tensor]
    """Each level's final embeddings, likewise."""
    pondered: Mapping[int, Tensor]
    """What the tokens of levels that halt have pondered, `(batch, ceil(n / stride))`."""
    predict_from: Tensor
    """Those of the levels that predict, side by side at each position: `(batch, n, sum of their dims)`."""


class Pass(NamedTuple):
    """What goes along while a chunk is read: its context, and the state after it in the making."""

    state: State | None
    position: int
    merges: Sequence[nn.Module | None]
    """None for each one that is left out."""
    silent: Collection[int]
    """Compressions of the levels that are not heard."""
    contributions: list[Contribution] | None
    ends: Collection[int] | None
    """Which levels' final tokens are read, by their index; None for all."""
    embeds: list[Tensor | None]
    """Of the next state, as all that follow: filled as levels are run."""
    blocks: list[list[BlockState | None]]
    merge_states: list[MergeState | None]
    pondered: dict[int, Tensor]
    """What tokens have pondered, by level, filled at the end."""


class Ablations(threading.local):
    """Which levels each thread has silenced, by their compressions. In every thread they begin as `silent`.

    Ablations may end in any order. A copy or a pickle has none. It is no context variable, which the compiler cannot
    trace.
    """

    def __init__(self, silent: frozenset[int] = frozenset()) -> None:
        self.begun: tuple[frozenset[int], ...] = (silent,)
        self.silent = silent

    def __reduce__(self) -> tuple[type[Ablations], tuple[()]]:
        return Ablations, ()

    def begin(self, silent: frozenset[int]) -> None:
        self.begun = (*self.begun, silent)
        self.silent = self.silent | silent

    def end(self, silent: frozenset[int]) -> None:
        begun = list(self.begun)
        begun.remove(silent)
        self.begun, self.silent = tuple(begun), frozenset().union(*begun)


class HierarchicalTransformer(
    TypedModule,
    Generative,
    Pretrained,
    library_name='simple-hierarchical-transformer',
    license='mit',
    pipeline_tag='text-generation',
    tags=['byte-level', 'hierarchical-transformer'],
):
    """A causal language model that reads a sequence at several resolutions at once.

    Each hierarchy level compresses the token embeddings by its factor and runs its own transformer blocks. After
    every layer a merge pools what the levels know into the level that predicts the next token. With one level it
    is a plain GPT.

    `dim`, `dim_head`, `heads`, `ff_mult`, `window_sizes`, `hierarchical_stride`, `compressor`, `mixer`, `mixer_kwargs`
    and the loss weights `next_latent_loss_weight`, `prophet_loss_weight` and `quantized_loss_weight` take one value, or
    a tuple (list) with one for each hierarchy.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the level. Embeddings have the largest of them; in an hourglass, the finest level's.
        depth: number of layers; with `arrangement = 'hourglass'` it may be another for each hierarchy.
        seq_len: the longest sequence that one pass reads.
        dim_head: width of an attention head.
        heads: number of attention heads.
        ff_mult: hidden width of the feed-forward, as a multiple of `dim`.
        ff_activation: what stands between its two maps: 'gelu'; 'relu2', the square of a ReLU (So et al. 2021, arXiv
            2109.08668); 'swiglu', a gate of a third map (Shazeer 2020, arXiv 2002.05202), at the same hidden width.
        ngrams: n of the n-grams of ids that are embedded beside each id, as `(2, 3, 4)`: what ends there is known
            before any layer has looked back (`NGramEmbedding`).
        word_ngrams: n of the n-grams of words that are embedded likewise, as `(1, 2)`: the word that is being read,
            and with the one before it. Where ids are bytes: `num_tokens` must be 256 to 258.
        ngram_rows: of the table that each of `ngrams` and `word_ngrams` has, a power of two.
        ngram_dropout: share of the n-grams that training leaves out: a text that is read more than once wants it, and
            train.py leaves out so many of what it reads for the second time, and more from then on.
        recall: n of the n-grams that are looked up in the last `seq_len` ids, as `(4, 6, 10)`: the id that followed
            each the last time is embedded, too (`RecallEmbedding`).
        word_recall: n of the n-grams of words that are looked up likewise, as `(1, 2)`. Where ids are bytes.
        zero_init: mixers, feed-forwards, merges and logits begin at zero, so that a model begins as its embeddings
            alone (Bachlechner et al. 2020, arXiv 2003.04887; Yang et al. 2022, arXiv 2203.03466).
        hierarchies: compression factors, powers of two that differ: `(1, 2, 8)`.
        window_sizes: how many tokens of the level before it a token attends to, besides itself. None is full
            attention, 0 no attention, 'auto' half of the level's length `seq_len // c`. One that exceeds it counts as
            full.
        hierarchical_stride: how many tokens apart level tokens stand, a power of two up to the compression. The
            level that predicts has stride 1.
        mixer: what mixes a level's tokens: one of the names in `mixers.MIXERS`, or a class of modules (see
            `mixers.Mixer`). `window_sizes` are those of attention; other mixers take no notice of them.
        mixer_kwargs: what a mixer is built with besides, as a dict.
        hierarchy_merge_all: the older name of `merge_into = 'all'`.
        merge_into: who receives what is merged: 'predict', the level that predicts; 'all'; or a tuple of hierarchies.
        merge: how levels are pooled: 'concat', a feed-forward over all of them, concatenated; 'linear', a linear map of
            each other level; 'attention', where each receiving token attends over the levels' tokens at its position.
        merge_window: with `merge = 'attention'`, how many of each level's tokens before that are attended to as well.
        arrangement: 'parallel', levels side by side that merge after every layer; 'hourglass', one inside the other,
            from the finest: half of its layers, then the next coarser level from what they make, merged back in, then
            the other half (the larger one, where `depth` is odd). Nawrot et al. 2021, arXiv 2110.13711, where
            `hierarchical_stride` equals `hierarchies`.
        compressor: how a level's tokens are made: 'conv', 'linear', 'mean', 'attention' (learned queries pool the
            window), or a module that maps windows `(windows, taps, dim_in)`, oldest token first, to `(windows, dim)`.
            Taps are the `c` embeddings up to the token's position, zeros before the first; in an hourglass, the finer
            level's tokens that stand for them. Levels that sum up one token take no notice of a name. A module is
            given all windows of a batch in a row, and must treat each by itself (no batch norm) for the model to be
            causal.
        autoencoder: a causal convolutional encoder in front, whose feature maps feed the levels in the compressors'
            place, and a decoder that reconstructs the ids from the coarsest.
        share_attention: one set of attention weights a layer for levels of equal `dim`, `heads` and `dim_head` that
            all have a window, or all full attention.
        share_feed_forward: likewise for levels of equal `dim` and `ff_mult`.
        residual: how mixers and feed-forwards add to the stream: 'add', or 'gru', by a gated recurrent unit (GTrXL,
            Parisotto et al. 2019, arXiv 1910.06764).
        reversible: each level has two streams, from which the backward pass finds again what the layers got: in
            training, activations of one layer are in memory, whatever the depth (Gomez et al. 2017, arXiv 1707.04585).
            Segments with a state are trained in the plain form, which keeps them. Not for layers that FSDP shards.
        ff_chunks: in training, feed-forwards have so many pieces of the sequence one after the other: less memory.
        share_layers: one set of weights for all layers, which are told apart by a learned vector each (Universal
            Transformer, Dehghani et al. 2019, arXiv 1807.03819).
        halting: with `share_layers`, 'act' has each token of a level that predicts take as many of the layers as it
            decides: adaptive computation time (Graves 2016, arXiv 1603.08983). Time is saved where all levels predict
            and all tokens of a pass without a state have ended.
        ponder_loss_weight: weight of what tokens ponder, so that they end in time.
        predict_hierarchy: the compression factor of the level that predicts; the smallest by default.
        predict_use_all_hierarchy: predict from all levels, concatenated.
        recon_loss_weight: weight of the reconstruction loss. 0 builds no part of it.
        next_latent_loss_weight: weight of the next-latent loss. 0 builds no part of it.
        prophet_loss_weight: weight of the prophet loss: a level's final token of compression c predicts the next c ids
            (after ProphetNet, Qi et al. 2020, arXiv 2001.04063). 0 builds no part of it, and a level of compression 1
            that predicts has none: that is its cross entropy.
        quantized_loss_weight: weight of the quantized loss: a level's final token predicts the discrete ids of the
            level's next token, by a random projection quantizer. 0 builds no part of it.
        quantize_from: what is quantized: 'compressed', a level's token as its blocks get it, or 'output', as they
            leave it.
        quantizer_codebooks: how many ids a token has.
        quantizer_codebook_size: of how many.
        quantizer_dim: width of a codebook's vectors.
        autoencoder_loss_weight: weight of the autoencoder's reconstruction loss. 0 builds no decoder.
        next_latent_loss_type: 'mse_and_cosine_sim', 'mse', 'smooth_l1', or a callable that maps prediction and
            target, both `(batch, seq, dim)`, to a loss per element of that shape.
        num_rollouts: how many steps ahead latents are predicted.
        rollout_weights: one weight for each rollout step, equal by default; they are normalised.
        dynamic_rollout_loss_weight: weigh later steps down where earlier ones fail.
        dynamic_loss_decay: how fast.
        chunk_summarizers: for each level None or a module that maps token embeddings `(batch, seq, max(dim))` to
            summaries `(batch, ceil(seq / stride), dim)`, causally. None is the mean over the level's chunk.
        detach_summaries: keep the next-latent loss from training the embeddings through the summaries.
        dynamics_hidden_dim: hidden width of the latent dynamics, the level's width by default.
        dynamics_num_layers: number of linear layers of the latent dynamics.
        ignore_index: the id that cross entropy and the prophet loss do not ask for, nor the next-latent and the
            quantized loss where a token ends in it. -1 where every id counts, as with bytes.
        recon_ignore_index: the id that the reconstruction losses do not ask for, the autoencoder's too. 0 keeps the
            published package's numbers; take -1 where id 0 is one like any other.
        recon_sample: share of a level's tokens that the reconstruction loss is taken from in training mode, drawn anew
            at each step; its expectation stays the same. After `eval()` it is taken from all of them.
        use_flash_attn: accepted for the published package's sake. Attention always runs PyTorch's fused kernels.
        attn_backend: what windowed attention runs on: 'sdpa', blocks through PyTorch's fused attention; 'flex',
            PyTorch's compiled FlexAttention; 'local-attention', that library. 'auto' takes 'flex' on CUDA and 'sdpa'
            elsewhere. The numbers are the same.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping what it computed:
            less memory, a third more time.

    Raises:
        ValueError: a value is not allowed, or two contradict each other. The message names them.
    """

    @plain_arguments
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int | Sequence[int],
        depth: int | Sequence[int],
        seq_len: int = 2048,
        dim_head: int | Sequence[int] = 64,
        heads: int | Sequence[int] = 8,
        ff_mult: float | Sequence[float] = 4,
        ff_activation: Literal['gelu', 'relu2', 'swiglu'] = 'gelu',
        ngrams: Sequence[int] = (),
        word_ngrams: Sequence[int] = (),
        ngram_rows: int = 1 << 16,
        ngram_dropout: float = 0.0,
        recall: Sequence[int] = (),
        word_recall: Sequence[int] = (),
        zero_init: bool = False,
        hierarchies: int | Sequence[int] = 1,
        window_sizes: int | Literal['auto'] | Sequence[int | Literal['auto'] | None] | None = None,
        hierarchical_stride: int | Sequence[int] = 1,
        mixer: str | type[nn.Module] | Sequence[str | type[nn.Module]] = 'attention',
        mixer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        hierarchy_merge_all: bool = False,
        merge_into: Literal['predict', 'all'] | Sequence[int] = 'predict',
        merge: Literal['concat', 'linear', 'attention'] = 'concat',
        merge_window: int = 0,
        arrangement: Literal['parallel', 'hourglass'] = 'parallel',
        compressor: str | nn.Module | Sequence[str | nn.Module] = 'conv',
        autoencoder: bool = False,
        share_attention: bool = False,
        share_feed_forward: bool = False,
        residual: Literal['add', 'gru'] = 'add',
        reversible: bool = False,
        ff_chunks: int = 1,
        share_layers: bool = False,
        halting: Literal['act'] | None = None,
        ponder_loss_weight: float = 0.01,
        predict_hierarchy: int | None = None,
        predict_use_all_hierarchy: bool = False,
        recon_loss_weight: float = 0.1,
        next_latent_loss_weight: float | Sequence[float] = 0.25,
        prophet_loss_weight: float | Sequence[float] = 0.0,
        quantized_loss_weight: float | Sequence[float] = 0.0,
        quantize_from: Literal['compressed', 'output'] = 'compressed',
        quantizer_codebooks: int = 1,
        quantizer_codebook_size: int = 1024,
        quantizer_dim: int = 16,
        autoencoder_loss_weight: float = 0.1,
        next_latent_loss_type: Literal['mse_and_cosine_sim', 'mse', 'smooth_l1']
        | Callable[[Tensor, Tensor], Tensor] = 'mse_and_cosine_sim',
        num_rollouts: int = 1,
        rollout_weights: Sequence[float] | None = None,
        dynamic_rollout_loss_weight: bool = True,
        dynamic_loss_decay: float = 1.0,
        chunk_summarizers: Sequence[nn.Module | None] | None = None,
        detach_summaries: bool = True,
        dynamics_hidden_dim: int | None = None,
        dynamics_num_layers: int = 3,
        ignore_index: int = 0,
        recon_ignore_index: int = 0,
        recon_sample: float = 1.0,
        use_flash_attn: bool = False,
        attn_backend: Literal['auto', 'sdpa', 'flex', 'local-attention'] = 'auto',
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()

        check_int('num_tokens', num_tokens)
        check_int('seq_len', seq_len)
        check_int('num_rollouts', num_rollouts, maximum=MOST_PARTS)
        check_int('dynamics_num_layers', dynamics_num_layers, maximum=MOST_PARTS)
        check_int('merge_window', merge_window, 0, MOST_IN_TURN)
        check_int('ff_chunks', ff_chunks, maximum=MOST_IN_TURN)
        check_choice('ff_activation', ff_activation, tuple(ACTIVATIONS))
        contexts = dict(
            ngrams=(ngrams, 2), word_ngrams=(word_ngrams, 1), recall=(recall, 1), word_recall=(word_recall, 1)
        )
        for name, (orders, least) in contexts.items():
            check_sequence(name, orders)
            for order in orders:
                check_int(name, order, least, MOST_IN_TURN)
            if len(set(orders)) != len(orders):
                raise ValueError(f'{name} must all differ, got {orders!r}')
            if orders and name.startswith('word') and num_tokens not in BYTE_VOCABULARIES:
                raise ValueError(f'{name} reads ids as bytes: num_tokens must be 256, 257 or 258, got {num_tokens}')
        if check_number('ngram_dropout', ngram_dropout) >= 1:
            raise ValueError(f'ngram_dropout must be at least 0 and below 1, got {ngram_dropout!r}')
        if check_int('ngram_rows', ngram_rows, 2) & (ngram_rows - 1):
            raise ValueError(f'ngram_rows must be a power of two, got {ngram_rows}')
        check_int('quantizer_codebooks', quantizer_codebooks, maximum=MOST_PARTS)
        check_int('quantizer_codebook_size', quantizer_codebook_size, 2)
        check_int('quantizer_dim', quantizer_dim)
        check_number('recon_loss_weight', recon_loss_weight)
        check_number('autoencoder_loss_weight', autoencoder_loss_weight)
        check_number('dynamic_loss_decay', dynamic_loss_decay)
        check_number('ponder_loss_weight', ponder_loss_weight)
        if not 0 < check_number('recon_sample', recon_sample) <= 1:
            raise ValueError(f'recon_sample must be above 0 and at most 1, got {recon_sample!r}')
        check_choice('attn_backend', attn_backend, BACKENDS)
        check_choice('merge', merge, ('concat', 'linear', 'attention'))
        check_choice('arrangement', arrangement, ('parallel', 'hourglass'))
        check_choice('residual', residual, ('add', 'gru'))
        if halting is not None:
            check_choice('halting', halting, ('act',))
            if not share_layers or arrangement == 'hourglass':
                raise ValueError(
                    f"halting is for share_layers = True and arrangement = 'parallel', got {share_layers} and "
                    f'{arrangement!r}'
                )
        if reversible:
            together: list[tuple[str, Any, Any]] = [
                ('residual', 'add', residual),
                ('halting', None, halting),
                ('arrangement', 'parallel', arrangement),
                ('gradient_checkpointing', False, gradient_checkpointing),
            ]
            for name, allowed, given in together:
                if given != allowed:
                    raise ValueError(f'reversible goes with {name} = {allowed!r}, got {given!r}')
        check_choice('quantize_from', quantize_from, ('compressed', 'output'))
        if dynamics_hidden_dim is not None:
            check_int('dynamics_hidden_dim', dynamics_hidden_dim)
        for name, value in (('ignore_index', ignore_index), ('recon_ignore_index', recon_ignore_index)):
            if not is_int(value):
                raise ValueError(f'{name} must be an integer, got {value!r}')
            check_int(name, value, -MOST)
        for name, value in (
            ('hierarchy_merge_all', hierarchy_merge_all),
            ('predict_use_all_hierarchy', predict_use_all_hierarchy),
            ('dynamic_rollout_loss_weight', dynamic_rollout_loss_weight),
            ('detach_summaries', detach_summaries),
            ('autoencoder', autoencoder),
            ('share_attention', share_attention),
            ('share_feed_forward', share_feed_forward),
            ('share_layers', share_layers),
            ('zero_init', zero_init),
            ('reversible', reversible),
            ('use_flash_attn', use_flash_attn),
            ('gradient_checkpointing', gradient_checkpointing),
        ):
            if not isinstance(value, bool):
                raise ValueError(f'{name} must be True or False, got {value!r}')

        levels = build_levels(
            hierarchies=hierarchies,
            hierarchical_stride=hierarchical_stride,
            dim=dim,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            ff_mult=ff_mult,
            window_sizes=window_sizes,
            next_latent_loss_weight=next_latent_loss_weight,
            prophet_loss_weight=prophet_loss_weight,
            quantized_loss_weight=quantized_loss_weight,
            compressor=compressor,
            mixer=mixer,
            mixer_kwargs=mixer_kwargs,
            mixers=MIXERS,
            seq_len=seq_len,
        )
        layers = max(level.depth for level in levels)
        if any(level.depth < layers for level in levels) and (arrangement != 'hourglass' or share_layers):
            raise ValueError(
                f"depth may differ between hierarchies with arrangement = 'hourglass' and share_layers = False alone, "
                f'got {depth!r} with {arrangement!r} and {share_layers}'
            )
        self.levels = levels
        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.ignore_index = ignore_index
        self.recon_ignore_index = recon_ignore_index

        # which level predicts, and from what

        compressions = [level.compression for level in levels]
        if predict_hierarchy is None:
            predict_hierarchy = min(compressions)
        if not is_int(predict_hierarchy) or predict_hierarchy not in compressions:
            raise ValueError(f'predict_hierarchy must be one of hierarchies {compressions}, got {predict_hierarchy!r}')
        self.predict_level = compressions.index(predict_hierarchy)
        self.predict_from = range(len(levels)) if predict_use_all_hierarchy else [self.predict_level]

        if all(levels[i].stride > 1 for i in self.predict_from):
            strides = {compressions[i]: levels[i].stride for i in self.predict_from}
            raise ValueError(
                'hierarchical_stride must be 1 for the level that predicts (predict_hierarchy), or for one level '
                f'where all predict (predict_use_all_hierarchy), got strides {strides} by hierarchy'
            )

        # how levels meet

        into = find_receivers(
            'all' if hierarchy_merge_all and merge_into == 'predict' else merge_into,
            compressions,
            self.predict_level,
            self.predict_from,
        )
        if hierarchy_merge_all and len(into) < len(levels):
            raise ValueError(f'hierarchy_merge_all merges into all, and merge_into is {merge_into!r}')
        if merge_window and merge != 'attention':
            raise ValueError(f"merge_window is for merge = 'attention', got {merge_window} with {merge!r}")
        # finer levels first
        self.order = sorted(range(len(levels)), key=lambda i: compressions[i])
        if arrangement == 'hourglass':
            check_hourglass([levels[i] for i in self.order], predict_hierarchy)
            if merge_into != 'predict' or hierarchy_merge_all:
                raise ValueError(
                    "merge_into is for arrangement = 'parallel': in an hourglass each level has one to hear"
                )
        if autoencoder:
            if arrangement == 'hourglass':
                raise ValueError("autoencoder feeds levels side by side, and arrangement is 'hourglass'")
            if set(per_level('compressor', compressor, len(levels))) != {'conv'}:
                raise ValueError(f"autoencoder takes the compressors' place, and compressor is {compressor!r}")
            if max(compressions) == 1:
                raise ValueError(f'autoencoder needs a hierarchy that compresses, got {compressions}')
        if share_layers:
            for kwargs in (level.mixer_kwargs for level in levels if level.mixer == 'attention'):
                if 'pattern' in kwargs and kwargs.get('pattern_mode', 'interleave') == 'interleave':
                    raise ValueError(
                        "share_layers has no layers to interleave: pattern_mode must be 'union' or 'heads'"
                    )
        self.arrangement = arrangement
        self.merge_kind = (merge, merge_window, tuple(into))
        self.ablations = Ablations()

        # how the next latent is predicted

        self.latent_loss_fn = find_latent_loss(next_latent_loss_type)
        self.rollout_weights = normalise_rollout_weights(rollout_weights, num_rollouts)
        self.rollout_decay = dynamic_loss_decay if dynamic_rollout_loss_weight else None

        if chunk_summarizers is None:
            chunk_summarizers = (None,) * len(levels)
        check_sequence('chunk_summarizers', chunk_summarizers)
        if len(chunk_summarizers) != len(levels):
            raise ValueError(
                f'chunk_summarizers must have one module or None for each of the {len(levels)} hierarchies, '
                f'got {len(chunk_summarizers)}'
            )
        for level, summarizer in zip(levels, chunk_summarizers, strict=True):
            if summarizer is not None and not isinstance(summarizer, nn.Module):
                raise ValueError(f'chunk_summarizers must be modules or None, got {summarizer!r}')
            if summarizer is not None and level.next_latent_loss_weight == 0:
                raise ValueError(
                    f'chunk_summarizers has a module for hierarchy {level.compression}, which has a '
                    'next_latent_loss_weight of 0 and would never use it'
                )
        self.detach_summaries = detach_summaries
        self.recon_loss_weight = recon_loss_weight
        self.recon_sample = recon_sample
        self.gradient_checkpointing = gradient_checkpointing
        self.reversible = reversible

        # parts, in the order in which a sequence passes through them

        # in an hourglass the finest level alone reads embeddings
        dim_embed = levels[self.order[0]].dim if arrangement == 'hourglass' else max(level.dim for level in levels)
        self.token_emb = nn.Embedding(num_tokens, dim_embed)
        self.ngram_emb = None
        if ngrams or word_ngrams:
            self.ngram_emb = NGramEmbedding(dim_embed, ngrams, ngram_rows, ngram_dropout, word_ngrams)
        self.recall_emb = None
        if recall or word_recall:
            self.recall_emb = RecallEmbedding(num_tokens, dim_embed, recall, seq_len, word_recall)
        # what both look up is found once
        self.contexts = Contexts.among((*ngrams, *recall), (*word_ngrams, *word_recall))
        self.autoencoder = None
        if autoencoder:
            decoded = num_tokens if autoencoder_loss_weight > 0 else None
            self.autoencoder = Autoencoder(levels, dim=dim_embed, num_tokens=decoded)
        self.compressors = nn.ModuleList(
            Compressor(
                level,
                **self.source(i, dim_embed),
                module=module if isinstance(module, nn.Module) else None,
                num_tokens=num_tokens if recon_loss_weight > 0 else None,
            )
            for i, (level, module) in enumerate(
                zip(levels, per_level('compressor', compressor, len(levels)), strict=True)
            )
        )
        self.post_token_emb_norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)

        def make_layer(number: int) -> nn.ModuleList:
            return nn.ModuleList(
                None  # type: ignore[misc]
                if number >= level.depth
                else HierarchicalBlock(
                    level,
                    length=-(-seq_len // level.compression),
                    layer=number,
                    attn_backend=attn_backend,
                    residual=residual,
                    ff_activation=ff_activation,
                    ff_chunks=ff_chunks,
                )
                for level in levels
            )

        self.layers = nn.ModuleList(
            [make_layer(0)] * layers if share_layers else [make_layer(number) for number in range(layers)]
        )
        # what tells layers that share their weights apart
        self.step_embeds = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(layers, level.dim)) for level in levels if share_layers
        )
        # keyed by the level's index: what levels tell others on the way has no halting
        self.halting = nn.ModuleDict(
            {str(i): AdaptiveHalting(levels[i].dim) for i in self.predict_from if halting is not None}
        )

        def shared_layers(*numbers: int) -> Any:
            """Those that all of these levels have."""
            return self.layers[: min(levels[i].depth for i in numbers)]

        if share_attention:
            alike = [
                (level.dim, level.heads, level.dim_head, level.window is None, *sorted(level.mixer_kwargs.items()))
                for level in levels
            ]
            for i, first in find_alike(
                'share_attention',
                'dim, heads, dim_head and kind of window',
                alike,
                [level.mixer == 'attention' and level.mixes for level in levels],
            ):
                for layer in shared_layers(i, first):
                    layer[i].share_attention(layer[first])
        if share_feed_forward:
            sizes = [(level.dim, int(level.dim * level.ff_mult)) for level in levels]
            for i, first in find_alike('share_feed_forward', 'dim and ff_mult', sizes, [True] * len(levels)):
                for layer in shared_layers(i, first):
                    layer[i].ff = layer[first].ff

        # the parts of the loss, and what each takes beside its level's final tokens

        self.parts = [Part('ce', 1.0)]
        for kind, weights in (
            ('recon', [recon_loss_weight if c > 1 else 0.0 for c in compressions]),
            (
                'prophet',
                [
                    level.prophet_loss_weight if level.compression > 1 or i not in self.predict_from else 0.0
                    for i, level in enumerate(levels)
                ],
            ),
            ('quantized', [level.quantized_loss_weight for level in levels]),
            ('next_latent', [level.next_latent_loss_weight for level in levels]),
            ('ponder', [ponder_loss_weight if str(i) in self.halting else 0.0 for i in range(len(levels))]),
        ):
            self.parts += [Part(kind, w, i, compressions[i]) for i, w in enumerate(weights) if w > 0]
        if any(level.prophet_loss_weight for level in levels) and not any(
            part.kind == 'prophet' for part in self.parts
        ):
            warnings.warn(
                'prophet_loss_weight builds nothing: that of level 1x, which predicts, is the cross entropy',
                stacklevel=3,
            )
        if self.autoencoder is not None and self.autoencoder.to_ids is not None:
            self.parts.append(Part('autoencoder', autoencoder_loss_weight))
        # a level whose last tokens are read by nothing is not trained at its end
        trained = [part.level for part in self.parts if part.level is not None and part.kind != 'ponder']
        self.ends = frozenset((*self.predict_from, *trained))

        def make_merge(
            members: Sequence[Level], into: Sequence[int], strides: Sequence[int] | None = None
        ) -> nn.Module:
            if merge == 'attention':
                return AttentionMerge(members, into, strides, window=merge_window)
            return (LinearMerge if merge == 'linear' else HierarchicalMerge)(members, into, strides)

        self.hierarchical_merges = nn.ModuleList()
        if arrangement == 'hourglass':
            for finer, coarser in pairwise(levels[i] for i in self.order):
                self.hierarchical_merges.append(make_merge((finer, coarser), [0], [1, coarser.stride // finer.stride]))
        elif len(levels) > 1:
            if share_layers:
                self.hierarchical_merges.extend([make_merge(levels, into)] * layers)
            else:
                self.hierarchical_merges.extend(make_merge(levels, into) for _ in range(layers))

        self.norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)
        self.to_logits = nn.Linear(sum(levels[i].dim for i in self.predict_from), num_tokens, bias=False)

        # keyed by the level's index, since a level without the loss has none

        self.latent_dynamics = nn.ModuleDict()
        self.chunk_summarizers = nn.ModuleDict()
        self.to_prophet = nn.ModuleDict()
        self.to_quantized = nn.ModuleDict()
        self.quantizers = nn.ModuleDict()
        self.quantize_from = quantize_from
        for kind, _, number, c in self.parts:
            if number is None:
                continue
            key, width = str(number), levels[number].dim
            if kind == 'next_latent':
                self.latent_dynamics[key] = LatentDynamics(
                    width, hidden_dim=dynamics_hidden_dim, num_layers=dynamics_num_layers
                )
                self.chunk_summarizers[key] = chunk_summarizers[number] or ChunkSummarizer(
                    dim_embed=dim_embed, dim=width, compression=c, stride=levels[number].stride
                )
            elif kind == 'prophet':
                self.to_prophet[key] = nn.Linear(width, c * num_tokens, bias=False)
            elif kind == 'quantized':
                self.to_quantized[key] = nn.Linear(width, quantizer_codebooks * quantizer_codebook_size, bias=False)
                self.quantizers[key] = RandomProjectionQuantizer(
                    width, codebooks=quantizer_codebooks, size=quantizer_codebook_size, dim_code=quantizer_dim
                )

        # what no loss reads still shapes the embeddings that forward returns, yet cannot be trained: the last norm, and
        # the last attention of a merge

        alone = arrangement == 'parallel' and len(levels) > 1 and (layers == 1 or not share_layers)
        last = self.hierarchical_merges[-1] if alone else None
        receivers: Any = last.receivers if isinstance(last, AttentionMerge) else {}
        for i, norm in enumerate(self.norms):
            if i not in self.ends:
                make_buffers(norm)
                if str(i) in receivers:
                    make_buffers(receivers[str(i)])

        if zero_init:
            parts: Any = [*(block for layer in self.layers for block in layer if block), *self.hierarchical_merges]  # type: ignore[attr-defined]
            for each in parts:
                each.begin_at_zero()
            begin_at_zero(self.to_logits)

        self.register_load_state_dict_pre_hook(adapt_published_keys)

    def __repr__(self) -> str:
        """A line for each level and for each part. `nn.Module.__repr__(model)` shows all modules."""
        like = self.token_emb.weight
        lines = [
            f'num_tokens={self.num_tokens}, seq_len={self.seq_len}, arrangement={self.arrangement!r}, '
            f'{count_parameters(self)}, {like.dtype}, {like.device}',
            *map(str, self.levels),
            *(
                f'({name}): {describe(part)}, {count_parameters(part)}'
                for name, part in self.named_children()
                if not isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)) or len(part)
            ),
        ]
        return '\n  '.join((f'{type(self).__name__}(', *lines)) + '\n)'

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        return_hierarchical_token_embeds: bool = False,
        return_hierarchical_embeds: bool = False,
        return_logits_and_embeds: bool = False,
        ablate_hierarchical_merge: bool = False,
        *,
        return_quantized_ids: bool = False,
        return_contributions: bool = False,
        labels: Tensor | None = None,
        counts: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        logits_to_keep: int = 0,
    ) -> Any:
        """Reads ids `(batch, n)` of any integer dtype and returns next-token logits `(batch, n, num_tokens)`.

        With `return_state`, the state comes last: `logits, state = model(ids, return_state = True)` reads a
        sequence's beginning, `model(ids, state = state, return_state = True)` what comes next. Chunks of any
        lengths give what one pass gives, and there is no limit to their sum. Full attention then reaches back
        `ceil(seq_len / c)` tokens of its phase, and older ones leave.

        Args:
            ids: what to read, each in `[0, num_tokens)`.
            return_loss: return `(loss, parts)`, a scalar and `LossParts`. Predicts `ids[:, 1:]` from `ids[:, :-1]`.
            return_hierarchical_token_embeds: return the levels' tokens as the blocks get them, one
                `(batch, ceil(n / stride), dim)` for each level.
            return_hierarchical_embeds: return the levels' final embeddings, likewise.
            return_logits_and_embeds: return both logits and final embeddings.
            ablate_hierarchical_merge: leave the merges out, to see what they are worth. `ablate` silences one level.
            return_quantized_ids: return the ids that a quantizer names the levels' tokens by, for each level `(batch,
                ceil(n / stride), codebooks)`, or None where it has no quantized loss.
            return_contributions: return logits, and for each merge what each level gave to it, as `Contribution`s; in
                an hourglass from the finest levels' merge inwards.
            labels: with `return_loss`, the targets `(batch, n)` of all of `ids`, instead of `ids` shifted by one.
                Those equal to `ignore_index` are left out.
            counts: with `return_loss`, what the parts of the loss are divided by, as `count_targets` counts it. With
                the sum over several batches, each batch's loss is its share of the loss of all of them as one.
            state: what was read before, as `return_state` gave it. Without gradients it is consumed: written in
                place and handed back, and refused if it is given again, also after a chunk that failed halfway.
                Auxiliary losses see the chunk alone.
            return_state: return the state after these ids, too. A state is not read without being returned.
            logits_to_keep: return logits of the last so many positions only, `(batch, logits_to_keep, num_tokens)`.
                0 keeps all. Generation asks for one.

        Raises:
            ValueError: ids or labels of the wrong rank, dtype, length or range; more than one thing to return; a
                state that is consumed, or of another model, batch size, dtype or device.
        """
        wanted = {
            'return_loss': return_loss,
            'return_hierarchical_token_embeds': return_hierarchical_token_embeds,
            'return_hierarchical_embeds': return_hierarchical_embeds,
            'return_logits_and_embeds': return_logits_and_embeds,
            'return_quantized_ids': return_quantized_ids,
            'return_contributions': return_contributions,
        }
        if sum(map(bool, wanted.values())) > 1:
            raise ValueError(f'forward returns one thing, got {", ".join(name for name in wanted if wanted[name])}')
        if return_quantized_ids and not self.quantizers:
            raise ValueError('return_quantized_ids needs a quantized_loss_weight above 0, which no level has')
        check_int('logits_to_keep', logits_to_keep, 0)
        if logits_to_keep and return_loss:
            raise ValueError(f'logits_to_keep is for logits, got {logits_to_keep} with return_loss = True')
        for name, given in (('labels', labels), ('counts', counts)):
            if given is not None and not return_loss:
                raise ValueError(f'{name} are for return_loss = True, which was not given')

        if return_loss:
            ids, labels = self.check_labels(ids, labels)
        else:
            ids = check_ids('ids', ids, self.num_tokens)

        if state is not None:
            self.check_state(state, ids)
            if not return_state:
                raise ValueError('state is consumed: return_state = True hands it back, and was not given')
            state = state.writable()
        elif return_state:
            state = self.initial_state(ids.shape[0])
        elif ids.shape[1] > self.seq_len:
            raise ValueError(f'ids must have at most seq_len = {self.seq_len} tokens in a pass, got {ids.shape[1]}')
        contributions: list[Contribution] | None = [] if return_contributions else None
        position = 0 if state is None else state.position
        of_inputs = return_hierarchical_token_embeds or (return_quantized_ids and self.quantize_from == 'compressed')
        if of_inputs and state is None and self.arrangement == 'parallel':
            # levels are compressed before anything else is done
            inputs = self.compress_all(self.embed(ids, None)[0], None, 0)[0]
            return self.quantize(inputs) if return_quantized_ids else inputs
        # the last merge has no need to add to tokens that nothing reads
        ends: Collection[int] | None = self.ends if return_loss or return_quantized_ids else self.predict_from
        if return_hierarchical_embeds or return_logits_and_embeds or return_contributions:
            ends = None
        read, state = self.read(ids, state, position, ablate_hierarchical_merge, contributions, ends)

        output: tuple[Any, ...]
        if return_hierarchical_token_embeds:
            output = (read.inputs,)
        elif return_hierarchical_embeds:
            output = (read.tokens,)
        elif return_quantized_ids:
            output = (self.quantize(self.quantized(read)),)
        elif return_logits_and_embeds:
            output = (chain(read.predict_from[:, -logits_to_keep:], self.to_logits), read.tokens)
        elif return_contributions:
            # a copy: where layers are computed again, they tell again what they gave
            merges = list(contributions or ())
            # an hourglass runs its inner merges first
            logits = chain(read.predict_from[:, -logits_to_keep:], self.to_logits)
            output = (logits, merges[:: -1 if self.arrangement == 'hourglass' else 1])
        elif labels is None:
            output = (chain(read.predict_from[:, -logits_to_keep:], self.to_logits),)
        else:
            output = self.losses(read, ids, labels, position, counts)

        if return_state:
            output = (*output, state)
        return output if len(output) > 1 else output[0]

    def read(
        self,
        ids: Tensor,
        state: State | None,
        position: int,
        ablate_merge: bool,
        contributions: list[Contribution] | None,
        ends: Collection[int] | None,
    ) -> tuple[Read, State | None]:
        """All levels' tokens from ids `(batch, n)` that begin at `position`, and the state after them.

        Final tokens of levels that are not in `ends` lack what the last merge adds to them.
        """
        merges: list[nn.Module | None] = list(self.hierarchical_merges)
        held: list[MergeState | None] = [None] * len(merges)
        if ablate_merge:
            merges = [None] * len(merges)
            held = held if state is None else list(state.merges[:-1])
        layers: Any = self.layers
        blocks = [
            [BlockState() if block is None and state is not None else None for block in layer] for layer in layers
        ]
        nothing: list[Tensor | None] = [None] * len(self.levels)
        now = Pass(state, position, merges, self.silent, contributions, ends, nothing, blocks, held, {})
        run = self.run_hourglass if self.arrangement == 'hourglass' else self.run_parallel
        if state is not None and not torch.is_grad_enabled():
            state.consume()

        embeds, seen, contexts = self.embed(ids, state)
        inputs, tokens, codes = run(embeds, now)
        tokens = [norm(x) for norm, x in zip(self.norms, tokens, strict=True)]

        members = [self.levels[i] for i in self.predict_from]
        predict_from, last = concat_levels(
            [tokens[i] for i in self.predict_from],
            [level.stride for level in members],
            None if state is None else state.merges[-1],
            position,
        )
        unheard = [k for k, level in enumerate(members) if level.compression in now.silent]
        predict_from = without(predict_from, [level.dim for level in members], unheard)

        if state is not None:
            state = replace(
                state,
                position=position + ids.shape[1],
                ids=seen,
                contexts=contexts,
                overwritten=[False],
                embeds=tuple(now.embeds),
                blocks=tuple(map(tuple, now.blocks)),  # type: ignore[arg-type]
                merges=(*now.merge_states, last),  # type: ignore[arg-type]
            )
        return Read(embeds, codes, inputs, tokens, now.pondered, predict_from), state

    def embed(self, ids: Tensor, state: State | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings `(batch, n, dim_embed)`, and the ids and contexts that a state keeps for those to come."""
        embeds = self.token_emb(ids)
        if not len(self.contexts):
            return embeds, None, None
        n, padding = ids.shape[1], self.contexts.padding
        history = ids.long() + 1
        if state is None:
            history = F.pad(history, (padding, 0))
        else:
            state = self.with_room(state, n)
            assert state.ids is not None
            history = torch.cat((state.ids, history), dim=1)
        hashes = self.contexts.hashes(history[:, -n - padding :])
        if self.ngram_emb is not None:
            embeds = embeds + self.ngram_emb(self.ngram_emb.contexts.of(hashes))
        recalled = None
        if self.recall_emb is not None:
            recalled = self.recall_emb.contexts.of(hashes)
            if state is not None:
                assert state.contexts is not None
                recalled = torch.cat((state.contexts, recalled), dim=1)
            embeds = embeds + self.recall_emb(history[:, -recalled.shape[1] :], recalled, n)
        if state is None:
            return embeds, None, None
        kept = None if recalled is None else keep(state.contexts, recalled[:, n:])
        return embeds, keep(state.ids, history[:, n:]), kept

    def with_room(self, state: State, n: int) -> State:
        """`state` with room for `n` more ids, where there is recall. Blocks make room in their own part of it."""
        if self.recall_emb is None:
            return state
        assert state.ids is not None
        assert state.contexts is not None
        room = room_for(state.position + n, self.recall_emb.reach)
        more_ids = max(room, self.contexts.padding) - state.ids.shape[1]
        more_contexts = room - state.contexts.shape[1]
        if more_ids <= 0 and more_contexts <= 0:
            return state
        # the newest stand last
        return replace(
            state,
            ids=F.pad(state.ids, (max(more_ids, 0), 0)),
            contexts=F.pad(state.contexts, (0, 0, max(more_contexts, 0), 0)),
        )

    def reserve(self, state: State, n: int) -> State:
        """`state` with room for `n` more ids in all its parts, which then stay where they are in memory."""
        state = self.with_room(state, n)

        def reserved(level: Level, block: Any, held: BlockState) -> BlockState:
            grows = getattr(block and block.attn, 'with_room', None)
            if grows is None:
                return held
            return replace(held, mixer=grows(held.mixer, -(-level.length(state.position + n) // level.phases)))

        layers: Any = self.layers
        blocks = tuple(
            tuple(reserved(*each) for each in zip(self.levels, layer, held, strict=True))
            for layer, held in zip(layers, state.blocks, strict=True)
        )
        return replace(state, blocks=blocks)

    def run_parallel(self, embeds: Tensor, now: Pass) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Levels side by side: what their first blocks get, what their last ones give, and the coarsest map."""
        inputs, codes, now.embeds[:] = self.compress_all(embeds, now.state, now.position)
        if self.reversible:
            return inputs, self.run_reversible(inputs, now), codes
        tokens = inputs
        halting: Any = self.halting
        pondered = {int(j): halt.begin(inputs[int(j)]) for j, halt in halting.items()}
        for i in range(len(self.layers)):
            before = tokens
            parts = [self.layers[i], *now.merges[i : i + 1], self.step_embeds]
            tokens, now.blocks[i][:], held = self.recomputed(parts, self.run_layer, i, tokens, now)
            if held is not None:
                now.merge_states[i] = held
            for j in pondered:
                tokens[j], pondered[j] = halting[str(j)](before[j], tokens[j], pondered[j], i == len(self.layers) - 1)
            looked_on = now.state is not None or now.contributions is not None or torch.compiler.is_compiling()
            # on 'meta' nothing is known of any token
            looked_on = looked_on or embeds.is_meta
            if looked_on or len(pondered) < len(tokens):
                continue
            if not any(each.running.any() for each in pondered.values()):
                break
        now.pondered.update({j: each.cost for j, each in pondered.items()})
        return inputs, [pondered[j].output if j in pondered else x for j, x in enumerate(tokens)], codes

    def run_layer(
        self, i: int, tokens: list[Tensor], now: Pass
    ) -> tuple[list[Tensor], list[BlockState | None], MergeState | None]:
        """Every level's block and the merge of layer `i`, where there is one; their states, where there are any."""
        mixed = [self.run_block(i, j, x, now) for j, x in enumerate(tokens)]
        tokens, held = [x for x, _ in mixed], None
        # a level by itself has none
        merge = now.merges[i] if now.merges else None
        if merge is not None:
            before = now.state and now.state.merges[i]
            wanted = now.ends if i == len(self.layers) - 1 else None
            tokens, held = merge(tokens, before, now.position, now.silent, now.contributions, wanted)
        return tokens, [after for _, after in mixed], held

    def run_reversible(self, inputs: list[Tensor], now: Pass) -> list[Tensor]:
        """What the last blocks give, where each level has two streams: mixers and merges read the second and add to the
        first, feed-forwards read the first and add to the second. The mean of both is what comes out.
        """
        levels, couplings = range(len(self.levels)), []
        first, second = levels, [len(levels) + j for j in levels]

        def of_block(i: int, j: int, part: Callable[..., Any]) -> Callable[[list[Tensor]], list[Tensor]]:
            def fn(read: list[Tensor]) -> list[Tensor]:
                block: Any = self.layers[i][j]  # type: ignore[index]
                before = now.blocks[i][j] or (now.state and now.state.blocks[i][j])
                x = read[0]
                if self.step_embeds:
                    x = x + self.step_embeds[j][i]
                update, after = block.within_phases(part, x, before, self.levels[j].length(now.position))
                if now.state is not None:
                    now.blocks[i][j] = after
                return [update]

            return fn

        def of_merge(
            i: int, merge: HierarchicalMerge, wanted: Collection[int] | None
        ) -> Callable[[list[Tensor]], list[Tensor]]:
            def fn(read: list[Tensor]) -> list[Tensor]:
                before = None if now.state is None else now.state.merges[i]
                updates, after = merge.found(read, before, now.position, now.silent, now.contributions, wanted)
                if after is not None:
                    now.merge_states[i] = after
                return updates

            return fn

        for i, layer in enumerate(self.layers):
            blocks: Any = layer
            for j, block in enumerate(blocks):
                if block.attn is not None:
                    own = [block.attn, self.step_embeds]
                    couplings.append(Coupling(of_block(i, j, block.mixed), [second[j]], [first[j]], own))
                own = [block.ff, self.step_embeds]
                couplings.append(Coupling(of_block(i, j, block.fed), [first[j]], [second[j]], own))
            merge: Any = now.merges[i] if now.merges else None
            if merge is not None:
                wanted = now.ends if i == len(self.layers) - 1 else None
                fn = of_merge(i, merge, wanted)
                couplings.append(Coupling(fn, second, merge.receiving(wanted), [merge]))

        for name, module in self.named_modules():
            if isinstance(module, (HierarchicalBlock, HierarchicalMerge)) and has_hooks(module):
                raise ValueError(
                    f'reversible layers run the parts of a block or merge by themselves, so hooks on {name} would not '
                    'fire: register them on its parts'
                )
        # what leaves more behind than updates is run once, and replicas of nn.DataParallel do not know their weights
        once = now.state is not None or now.contributions is not None or getattr(self, '_is_replica', False)
        run = run_plainly if once else partial(run_couplings, modules=[self.layers])
        streams = run(couplings, [*inputs, *inputs])
        return [(streams[j] + streams[second[j]]) / 2 for j in levels]

    def run_hourglass(self, embeds: Tensor, now: Pass) -> tuple[list[Tensor], list[Tensor], None]:
        """Levels one inside the other: what their first blocks get, and what their last ones give."""
        inputs, tokens = [embeds] * len(self.levels), [embeds] * len(self.levels)
        self.run_level(0, embeds, now.position, now, inputs, tokens)
        return inputs, tokens, None

    # a method: a closure that calls itself would keep the tokens of each pass until garbage is collected
    def run_level(
        self, k: int, finer: Tensor, start: int, now: Pass, inputs: list[Tensor], tokens: list[Tensor]
    ) -> Tensor:
        """The k-th level in the order of compression and all inside it, from tokens of the one around it."""
        j = self.order[k]
        x, now.embeds[j] = self.compress(j, finer, now.state, start)
        inputs[j] = x
        start = self.levels[j].length(now.position)
        depth = self.levels[j].depth
        for i in range(depth):
            if i == depth // 2 and k + 1 < len(self.order):
                inner, merge = self.run_level(k + 1, x, start, now, inputs, tokens), now.merges[k]
                if merge is not None:
                    before = now.state and now.state.merges[k]
                    (x, _), now.merge_states[k] = self.recomputed(
                        [merge], merge, [x, inner], before, start, now.silent, now.contributions
                    )
            parts = [self.layers[i][j], self.step_embeds]  # type: ignore[index]
            x, now.blocks[i][j] = self.recomputed(parts, self.run_block, i, j, x, now)
        tokens[j] = x
        return x

    def recomputed(self, modules: Sequence[Any], fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, computed again in the backward pass where `gradient_checkpointing` asks for that."""
        return recompute(fn, modules, *args) if self.gradient_checkpointing else fn(*args)

    def compress_all(
        self, embeds: Tensor, state: State | None, position: int
    ) -> tuple[list[Tensor], Tensor | None, list[Tensor | None]]:
        """All levels' tokens of embeddings that begin at `position`, the coarsest map, and the states after them."""
        levels = range(len(self.levels))
        if self.autoencoder is None:
            made = [self.compress(i, embeds, state, position) for i in levels]
            return [x for x, _ in made], None, [after for _, after in made]
        before = [None] * len(levels) if state is None else state.embeds
        maps, after = self.autoencoder(embeds, before, position)
        starts = [-(-position // self.autoencoder.grids[i]) for i in levels]
        return [self.compress(i, maps[i], None, starts[i])[0] for i in levels], maps[self.order[-1]], after

    def compress(self, i: int, finer: Tensor, state: State | None, position: int) -> tuple[Tensor, Tensor | None]:
        """Level i's tokens of finer ones `(batch, n, dim)`, the first of index `position`."""
        norm = self.post_token_emb_norms[i]
        x, after = self.compressors[i](finer, state and state.embeds[i], position)
        # the stream stays in the dtype of the weights, also where autocast multiplies in another
        return norm(x.to(getattr(norm, 'weight', self.token_emb.weight).dtype)), after

    def run_block(self, i: int, j: int, x: Tensor, now: Pass) -> tuple[Tensor, BlockState | None]:
        """Layer `i` of level `j`."""
        if self.step_embeds:
            x = x + self.step_embeds[j][i]
        return self.layers[i][j](x, now.state and now.state.blocks[i][j], self.levels[j].length(now.position))  # type: ignore[index]

    def source(self, i: int, dim_embed: int) -> dict[str, int]:
        """What a level's compressor looks at: of which width, how many of them, how far apart."""
        level = self.levels[i]
        if self.autoencoder is not None:
            # the map has summed up the window
            return dict(dim_in=dim_embed, taps=1, stride=level.stride // self.autoencoder.grids[i])
        place = self.order.index(i)
        if self.arrangement == 'parallel' or place == 0:
            return dict(dim_in=dim_embed)
        finer = self.levels[self.order[place - 1]]
        return dict(
            dim_in=finer.dim,
            taps=level.compression // finer.compression,
            stride=level.stride // finer.stride,
            dilation=finer.compression // finer.stride,
        )

    @contextmanager
    def ablate(self, *hierarchies: int) -> Iterator[HierarchicalTransformer]:
        """Inside, levels of these compressions say nothing: `with model.ablate(8): loss, _ = model(ids, ...)`.

        That holds for calls from the same thread. Other threads hear all levels.

        Merges and logits read zeros in their place (by attention: attend to the others alone), while they go on
        themselves: so the loss shows what their word is worth. In an hourglass a level speaks for all those inside it,
        which fall silent with it, before the logits too.

        Raises ValueError where there is no such level, or none would be left to predict.
        """
        compressions = [level.compression for level in self.levels]
        if not hierarchies or any(not is_int(c) or c not in compressions for c in hierarchies):
            raise ValueError(f'ablate takes one or more of hierarchies {compressions}, got {hierarchies}')
        silent = frozenset(hierarchies)
        if self.arrangement == 'hourglass':
            silent |= {c for c in compressions if c > min(hierarchies)}
        together = self.silent | silent
        if all(compressions[i] in together for i in self.predict_from):
            raise ValueError(f'ablate must leave a level to predict, got {hierarchies}: silent are {sorted(together)}')
        self.ablations.begin(silent)
        try:
            yield self
        finally:
            self.ablations.end(silent)

    @property
    def silent(self) -> frozenset[int]:
        """Compressions of the levels that this thread does not hear at the moment."""
        return self.ablations.silent

    def _replicate_for_data_parallel(self) -> Any:
        # nn.DataParallel runs replicas in threads of their own
        replica: Any = super()._replicate_for_data_parallel()
        replica.ablations = Ablations(self.silent)
        return replica

    # losses

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each part of the loss is multiplied by, by the names of `LossParts.named`."""
        return {part.name: part.weight for part in self.parts}

    def losses(
        self, read: Read, ids: Tensor, labels: Tensor, position: int, counts: Tensor | None
    ) -> tuple[Tensor, LossParts]:
        """The loss and its parts. What the levels' tokens stand for is sought in `ids`, which begin at `position`."""
        own = {} if counts is None else self.split_counts(counts)
        quantized: Any = self.quantize(self.quantized(read))
        named = {}
        for part in self.parts:
            kind, i = part.kind, part.level
            x = read.predict_from if i is None else read.tokens[i]
            count = own.get(part.name)
            targets, ignore_index = self.targets(part, ids, labels, position)
            if i is not None and kind == 'ponder':
                total = max(targets.numel(), 1) if count is None else count[0].clamp(min=1)
                named[part.name] = read.pondered[i].sum() / total
                continue
            if i is not None and kind == 'next_latent':
                named[part.name] = self.next_latent_loss(i, x, read.embeds, targets != ignore_index, position, count)
                continue
            if kind == 'quantized':
                x, targets = x[:, :-1], quantized[i][:, 1:].masked_fill(targets == ignore_index, ignore_index)
            elif kind == 'autoencoder':
                x = self.autoencoder.decode(read.codes, position)  # type: ignore[union-attr, arg-type]
            named[part.name] = cross_entropy(
                x,
                self.head(part),
                targets,
                ignore_index,
                count=None if count is None else count[0],
                sample=self.recon_sample if kind == 'recon' and self.training else 1.0,
            )

        weighted = {part.name: part.weight * named[part.name] for part in self.parts}
        zero = named['ce'].new_zeros(())
        return sum(weighted.values(), zero), LossParts(
            ce=named['ce'],
            next_latent=sum((weighted[part.name] for part in self.parts if part.kind == 'next_latent'), zero),
            recon=sum((named[part.name] for part in self.parts if part.kind == 'recon'), zero),
            next_latent_per_hierarchy=tuple(
                named.get(f'next_latent/{level.compression}x', zero) for level in self.levels
            ),
            named=named,
        )

    def head(self, part: Part) -> Any:
        """The linear map to the logits of a part that is a cross entropy."""
        heads: dict[str, Any] = {'prophet': self.to_prophet, 'quantized': self.to_quantized}
        if part.level is None:
            return self.to_logits if part.kind == 'ce' else self.autoencoder.to_ids  # type: ignore[union-attr]
        return self.compressors[part.level].to_recon if part.kind == 'recon' else heads[part.kind][str(part.level)]

    def targets(self, part: Part, ids: Tensor, labels: Tensor, position: int) -> tuple[Tensor, int]:
        """What a part of the loss asks for, and which id it does not."""
        kind, _, i, c = part
        if kind == 'ce':
            return labels, self.ignore_index
        if i is None:
            # the autoencoder's: all ids, window by window
            c = self.autoencoder.coarsest  # type: ignore[union-attr]
            windows = dict(compression=c, stride=c, offset=-position % c, ignore_index=self.recon_ignore_index)
            return seen_ids(ids, **windows).flatten(1), self.recon_ignore_index
        stride = self.levels[i].stride
        offset = -position % stride
        if kind == 'recon':
            windows = dict(compression=c, stride=stride, offset=offset, ignore_index=self.recon_ignore_index)
            return seen_ids(ids, **windows), self.recon_ignore_index
        if kind == 'prophet':
            windows = dict(compression=c, stride=stride, offset=offset, ignore_index=self.ignore_index)
            return coming_ids(labels, **windows), self.ignore_index
        last = ids[:, offset::stride]
        if kind == 'ponder':
            # every token counts: none is below 0
            return last, -1
        # the others ask for level tokens, of which those do not count that end in an ignored id
        if kind == 'quantized':
            last = last[:, 1:, None].expand(-1, -1, len(self.quantizers[str(i)].codebook))  # type: ignore[arg-type]
            # its ids are of another vocabulary, so that none is the ignored one
            return torch.where(last == self.ignore_index, -1, 0), -1
        return last, self.ignore_index

    def count_targets(self, ids: Tensor, labels: Tensor | None = None, *, position: int = 0) -> Tensor:
        """How many targets each part of the loss of these ids `(batch, n)` averages over: `(counts,)`, int64.

        ids and labels are those of `forward`, `position` that of the state they would be read with. Batches that are
        learnt from together, on several devices or one after the other, are given the sum over all of them as
        `counts`: then their losses sum to the loss of one large batch, however unevenly targets are ignored.
        """
        ids, labels = self.check_labels(ids, labels)
        counts = []
        for part in self.parts:
            targets, ignore_index = self.targets(part, ids, labels, position)
            counted = targets != ignore_index
            # a rollout counts at each of its steps
            counts += (
                rollout_counts(counted, len(self.rollout_weights)) if part.kind == 'next_latent' else [counted.sum()]
            )
        return torch.stack(counts)

    def split_counts(self, counts: Tensor) -> dict[str, Sequence[Tensor]]:
        """The counts of each part: one, or one for each step of a rollout."""
        sizes = [len(self.rollout_weights) if part.kind == 'next_latent' else 1 for part in self.parts]
        if not isinstance(counts, Tensor) or counts.shape != (sum(sizes),):
            got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
            raise ValueError(f'counts must be what count_targets returns, of shape ({sum(sizes)},), got {got}')
        return {part.name: each.unbind() for part, each in zip(self.parts, counts.split(sizes), strict=True)}

    def quantized(self, read: Read) -> list[Tensor]:
        """Each level's tokens that are quantized."""
        return read.inputs if self.quantize_from == 'compressed' else read.tokens

    def quantize(self, tokens: Sequence[Tensor]) -> list[Tensor | None]:
        """The ids of each level's tokens, where it has a quantizer."""
        return [
            self.quantizers[str(i)](x.detach()) if str(i) in self.quantizers else None for i, x in enumerate(tokens)
        ]

    def initial_state(self, batch_size: int) -> State:
        """The state of a model that has read nothing, in the dtype and on the device of its weights.

        Attention with a window of w keeps w tokens and the one at hand in each phase, full attention `ceil(seq_len /
        c)` and the one at hand; other mixers what their docstrings say. `recall` keeps the last `seq_len` ids besides,
        and a number for each context that ended there. Where that is more than `state.ROOM` tokens, what is held grows
        with what was read.

        Raises ValueError where `batch_size` is no integer of at least 1.
        """
        batch_size = check_int('batch_size', batch_size)
        like = self.token_emb.weight

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        def reached(i: int) -> tuple[int, int]:
            """How many tokens a level's compressor reaches back to, and their width."""
            encodes = self.autoencoder is not None and str(i) in self.autoencoder.encoders
            reads: Any = self.autoencoder.encoders[str(i)] if encodes else self.compressors[i]  # type: ignore[union-attr]
            return reads.windows.before, self.compressors[i].dim_in  # type: ignore[return-value]

        predicting = [self.levels[i] for i in self.predict_from]
        layers: Any = self.layers
        recall = self.recall_emb
        recalled = 0 if recall is None else room_for(0, recall.reach)
        before = max(self.contexts.padding, recalled)
        return State(
            position=0,
            spec=self._state_spec,
            ids=zeros(batch_size, before).long() if before else None,
            contexts=None if recall is None else zeros(batch_size, recalled, len(recall.contexts)).long(),
            embeds=tuple(zeros(batch_size, *reached(i)) if reached(i)[0] else None for i in range(len(self.levels))),
            blocks=tuple(
                tuple(BlockState() if block is None else block.initial_state(batch_size, like) for block in layer)
                for layer in layers
            ),
            merges=(
                *(merge.initial_state(batch_size, like) for merge in self.hierarchical_merges),  # type: ignore[operator]
                tuple(zeros(batch_size, 1, level.dim) if level.stride > 1 else None for level in predicting),
            ),
        )

    @property
    def _state_spec(self) -> tuple[Any, ...]:
        """What the shape of a state hangs on, and what it means."""
        layout = (
            self.arrangement,
            *(part and part.contexts for part in (self.ngram_emb, self.recall_emb)),
            self.autoencoder is not None,
            bool(self.halting),
            self.reversible,
            *self.merge_kind,
        )
        # what trains a level is no matter of what it remembers
        untrained = dict(next_latent_loss_weight=0.0, prophet_loss_weight=0.0, quantized_loss_weight=0.0)
        levels = (replace(level, **untrained) for level in self.levels)  # type: ignore[arg-type]
        return (self.seq_len, len(self.layers), tuple(self.predict_from), *layout, *levels)

    def check_state(self, state: State, ids: Tensor) -> None:
        """Refuses a state that is not of this model, or not for these ids."""
        if not isinstance(state, State):
            raise ValueError(f'state must be what return_state gave, got {type(state).__name__}')
        if state.spec != self._state_spec:
            raise ValueError(
                'state is of another model: its n-grams, recall, levels, depth, seq_len, arrangement, merges or '
                'predicting levels differ'
            )
        state.check_valid()
        like = self.token_emb.weight
        for name, got, expected in (
            ('batch size', state.batch_size, ids.shape[0]),
            ('dtype', state.dtype, like.dtype),
            ('device', state.device, like.device),
        ):
            if got != expected:
                raise ValueError(f'state must have {name} {expected}, got {got}')

    def check_labels(self, ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The ids to read and the targets, of the same shape: without labels, ids shifted by one."""
        ids = check_ids('ids', ids, self.num_tokens)
        if labels is None:
            if ids.shape[1] < 2:
                raise ValueError(f'ids must have at least 2 tokens to predict one from another, got {ids.shape[1]}')
            return ids[:, :-1], ids[:, 1:]
        labels = check_ids('labels', labels, self.num_tokens, also=self.ignore_index)
        if labels.shape != ids.shape:
            raise ValueError(f'labels must have the shape of ids {tuple(ids.shape)}, got {tuple(labels.shape)}')
        return ids, labels

    def next_latent_loss(
        self,
        i: int,
        x: Tensor,
        embeds: Tensor,
        valid: Tensor,
        position: int,
        counts: Sequence[Tensor] | None,
    ) -> Tensor:
        """That of level i, whose final tokens are x."""
        if self.detach_summaries:
            embeds = embeds.detach()
        level, summarizer = self.levels[i], self.chunk_summarizers[str(i)]
        offset = -position % level.stride
        if isinstance(summarizer, ChunkSummarizer):
            summaries = summarizer(embeds, offset)
        else:
            # a module from outside knows no offset, so its chunk begins with the first token of its level
            summaries = summarizer(embeds[:, offset:]) if x.shape[1] else x
        return next_latent_loss(
            x,
            check_output(f'chunk_summarizers of hierarchy {level.compression}', summaries, x.shape, embeds),
            valid,
            dynamics=self.latent_dynamics[str(i)],
            loss_fn=self.latent_loss_fn,
            rollout_weights=self.rollout_weights,
            decay=self.rollout_decay,
            counts=counts,
        )


def find_receivers(
    merge_into: Any, compressions: Sequence[int], predict_level: int, predict_from: Collection[int]
) -> list[int]:
    """Which levels merges add to, by their index."""
    if merge_into == 'all':
        return list(range(len(compressions)))
    if merge_into == 'predict':
        return [predict_level]
    named = merge_into if isinstance(merge_into, (tuple, list)) else ()
    if not named or any(not is_int(c) or c not in compressions or named.count(c) > 1 for c in named):
        raise ValueError(
            f"merge_into must be 'predict', 'all' or a tuple of hierarchies {list(compressions)} that differ, got "
            f'{merge_into!r}'
        )
    into = [i for i, c in enumerate(compressions) if c in named]
    if not set(into) & set(predict_from):
        raise ValueError(
            f'merge_into must name a level that predicts, {[compressions[i] for i in predict_from]}: nothing would '
            f'come of what others hear, got {merge_into!r}'
        )
    return into


def check_hourglass(levels: Sequence[Level], predict_hierarchy: int) -> None:
    """Refuses levels, finer ones first, that do not fit into one another."""
    if predict_hierarchy != levels[0].compression:
        raise ValueError(
            f"arrangement = 'hourglass' predicts from its finest level, got predict_hierarchy {predict_hierarchy!r}"
        )
    for finer, coarser in pairwise(levels):
        if coarser.stride < finer.stride:
            raise ValueError(
                "hierarchical_stride must not fall from a level to a coarser one in arrangement = 'hourglass', got "
                f'{finer.stride} for hierarchy {finer.compression} and {coarser.stride} for {coarser.compression}'
            )


def find_alike(name: str, what: str, kinds: Sequence[Any], takes_part: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs of a level and the first that is of the same kind. Raises ValueError where there is none."""
    first: dict[Any, int] = {}
    pairs = [(i, first[kind]) for i, kind in enumerate(kinds) if takes_part[i] and first.setdefault(kind, i) != i]
    if not pairs:
        raise ValueError(f'{name} needs levels of equal {what}, got {list(kinds)}')
    return pairs


def count_parameters(module: nn.Module) -> str:
    return f'{sum(parameter.numel() for parameter in module.parameters()):,} parameters'


def describe(module: nn.Module) -> str:
    """A module in one line: of a container how many parts it has and of which classes, of others without parts all."""

    def kind(part: nn.Module) -> str:
        if not isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            return type(part).__name__
        parts = part.values() if isinstance(part, nn.ModuleDict) else part
        kinds = dict.fromkeys(kind(each) for each in parts if each is not None)
        return f'{len(part)} x {" | ".join(kinds)}'

    return kind(module) if list(module.children()) else str(module).replace('\n', ' ')


def make_buffers(module: nn.Module) -> None:
    """Turns a module's parameters into buffers: still saved and loaded, no longer trained."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


def adapt_published_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Makes weights of the published package fit: renames what is named otherwise, leaves out what has no use here.

    Raises ValueError where the model has one weight for what are several.
    """
    for name, first in shared_names(model).items():
        held, kept = (state_dict.get(f'{prefix}{key}') for key in (name, first))
        if held is not None and kept is not None and not (held.is_meta or torch.equal(held, kept)):
            raise ValueError(f'{name} and {first} are one weight in this model, and differ in the state dict')
    own = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if freqs := WINDOWED_FREQS.fullmatch(name):
            state_dict[f'{prefix}{freqs[1]}rotary_emb.freqs'] = state_dict.pop(key)
        elif (part := OPTIONAL_KEYS.match(name)) and not any(mine.startswith(part[0]) for mine in own):
            del state_dict[key]
