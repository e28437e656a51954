"""The options of the model: each one's default, check and help, and the checks of options against each other.

The constructor's signature and docstring, the check of `config.json`, the help of `train.py --model` and the options
page of the documentation are made from `Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from .arrangements import arrangement_of
from .block import ACTIVATIONS
from .boundaries import BOUNDARIES
from .checks import MOST_IN_TURN, MOST_PARTS, check_number, check_sequence, is_int, per_level, plain
from .config_checks import check_together
from .levels import Level, build_levels
from .merges import MERGES, find_receivers
from .mixers import MIXERS
from .objectives.next_latent import find_latent_loss, normalise_rollout_weights
from .ops.window_attention import BACKENDS
from .options import (
    Check,
    about,
    check_bool,
    check_id,
    check_power_of_two,
    check_sample,
    check_share,
    choice,
    integer,
    option,
    optional,
    orders,
)
from .resampling import DOWNSAMPLERS, UPSAMPLERS


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a `HierarchicalTransformer`. Raises ValueError where one is not allowed or two contradict."""

    # sizes
    num_tokens: int = field(metadata=about(help='Size of the vocabulary.', check=integer()))
    dim: int | Sequence[int] = field(
        metadata=about(
            help='Width of a level. Embeddings have the largest of them; in an hourglass, that of the finest level.',
            # the token shift moves half of the channels
            check=integer(2),
            per_level=True,
        )
    )
    depth: int | Sequence[int] = field(
        metadata=about(
            help="Number of layers. With `arrangement = 'hourglass'` it may differ between hierarchies.",
            check=integer(1, MOST_PARTS),
            per_level=True,
        )
    )
    seq_len: int = option(2048, help='Longest sequence that one pass reads.', check=integer())
    dim_head: int | Sequence[int] = option(
        64, help='Width of an attention head. Even.', check=integer(), per_level=True
    )
    heads: int | Sequence[int] = option(8, help='Number of attention heads.', check=integer(), per_level=True)
    ff_mult: float | Sequence[float] = option(
        4, help='Hidden width of the feed-forward, as a multiple of `dim`.', per_level=True
    )
    ff_activation: Literal['gelu', 'relu2', 'swiglu'] = option(
        'gelu',
        help="Activation of the feed-forward: 'gelu'; 'relu2', the square of a ReLU (So et al. 2021, arXiv "
        "2109.08668); 'swiglu', where a third map gates at the same hidden width (Shazeer 2020, arXiv 2002.05202).",
        check=choice(*ACTIVATIONS),
    )

    # embeddings
    ngrams: Sequence[int] = option(
        (), help='Embed the n-grams of ids that end at each id, for each of these n: `(2, 3, 4)`.', check=orders(2)
    )
    word_ngrams: Sequence[int] = option(
        (),
        help='Embed the n-grams of words that end at each byte: `(1, 2)` is the word so far, and that word with the '
        'one before. Needs `num_tokens` of 256 to 258.',
        check=orders(1),
    )
    ngram_rows: int = option(
        1 << 16,
        help='Rows of the table that each of `ngrams` and `word_ngrams` is hashed to. A power of two.',
        check=check_power_of_two,
    )
    ngram_dropout: float = option(
        0.0,
        help='Share of the n-grams that training leaves out. It grows with how often a text was read before: '
        '`readings`.',
        check=check_share,
    )
    recall: Sequence[int] = option(
        (),
        help='Look up the last n ids among the last `seq_len` ids, for each of these n, and embed the id that followed '
        'there: `(4, 6, 10)`.',
        check=orders(1),
    )
    word_recall: Sequence[int] = option(
        (), help='The same for the last n words: `(1, 2)`. Needs `num_tokens` of 256 to 258.', check=orders(1)
    )
    zero_init: bool = option(
        False,
        help='Initialize the outputs of mixers, feed-forwards, merges and logits with zeros, so that the model '
        'starts as its embeddings alone (Bachlechner et al. 2020, arXiv 2003.04887; Yang et al. 2022, arXiv '
        '2203.03466).',
        check=check_bool,
    )

    # levels
    hierarchies: int | Sequence[int] = option(
        1,
        help='Compression factors: different powers of two, as `(1, 2, 8)`. That of a level with `boundaries` may be '
        'any integer.',
    )
    window_sizes: int | Literal['auto'] | Sequence[int | Literal['auto'] | None] | None = option(
        None,
        help='Number of level tokens before it that a token attends to, besides itself. None: all; 0: no attention; '
        "'auto': half of the level's length `seq_len // c`. A window larger than the level's length counts as None.",
        per_level=True,
    )
    hierarchical_stride: int | Sequence[int] = option(
        1,
        help='Number of positions from one level token to the next: a power of two up to the compression. The level '
        'that predicts has stride 1.',
        per_level=True,
    )
    boundaries: str | nn.Module | Sequence[str | nn.Module | None] | None = option(
        None,
        help='Where a level of an hourglass has its tokens. None: at a fixed stride. Otherwise a rule places them, and '
        "the level's number in `hierarchies` is the intended mean distance: 'words', at the first byte after each word "
        "(SpaceByte, Slagle 2024, arXiv 2404.14408); 'sentences'; 'learned' (H-Net, Hwang et al. 2025, arXiv "
        "2507.07955); 'surprise', where the entropy of the next id exceeds a threshold, or 'rise', where it rises by "
        "more than that (BLT, Pagnoni et al. 2024, arXiv 2412.09871); 'every', at a fixed number of finer tokens; or "
        'a module (`boundaries.Boundaries`). Levels inside a placed one are placed too. The finest level has None, and '
        'one value is that of all others.',
        per_level=True,
    )
    max_piece: int | Sequence[int | None] | None = option(
        None,
        help='Largest number of finer tokens in a piece of a placed level. After so many without a boundary, there is '
        'one. None: four times the intended number, and at least 32.',
        check=optional(integer()),
        per_level=True,
    )
    downsample: Literal['token', 'attention'] | Sequence[Literal['token', 'attention']] = option(
        'token',
        help="What a placed level reads: 'token', the finer token at the boundary; 'attention', also what learned "
        'queries find in the piece that ends there.',
        check=choice(*DOWNSAMPLERS),
        per_level=True,
    )
    upsample: (
        Literal['repeat', 'boundary', 'offset', 'smooth'] | Sequence[Literal['repeat', 'boundary', 'offset', 'smooth']]
    ) = option(
        'repeat',
        help="What a merge gets of a placed level: 'repeat', its latest token at each finer token; 'boundary', its "
        "tokens at the boundaries alone; 'offset', its latest token plus one of 16 linear maps of it, by the distance "
        "from the boundary (AU-Net, Videau et al. 2025, arXiv 2506.14761); 'smooth', a moving average of its tokens, "
        'for rules with probabilities (H-Net).',
        check=choice(*UPSAMPLERS),
        per_level=True,
    )
    mixer: str | type[nn.Module] | Sequence[str | type[nn.Module]] = option(
        'attention',
        help='Token mixer of a level: a name in `mixers.MIXERS`, or a class of modules (`mixers.Mixer`). Only '
        'attention uses `window_sizes`.',
        per_level=True,
    )
    mixer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = option(
        None, help='Further arguments of the mixer, as a dict.', per_level=True
    )
    compressor: str | nn.Module | Sequence[str | nn.Module] = option(
        'conv',
        help="How a level's tokens are made: 'conv', 'linear', 'mean', 'attention' (learned queries pool the window), "
        'or a module that maps windows `(windows, taps, dim_in)`, oldest token first, to `(windows, dim)`. The '
        'module gets all windows of a batch as rows and must treat each row by itself (no batch norm). Levels with '
        '`boundaries` have `downsample` instead.',
        per_level=True,
    )
    autoencoder: bool = option(
        False,
        help='Put a causal convolutional encoder in front. Its feature maps replace the compressors, and a decoder '
        'reconstructs the ids from the coarsest map.',
        check=check_bool,
    )

    # how levels exchange
    hierarchy_merge_all: bool = option(False, help="Older name of `merge_into = 'all'`.", check=check_bool)
    merge_into: Literal['predict', 'all'] | Sequence[int] = option(
        'predict',
        help="Levels that merges add to: 'predict', the level that predicts; 'all'; or a tuple of hierarchies.",
    )
    merge: Literal['concat', 'linear', 'attention', 'skip'] = option(
        'concat',
        help="How levels are pooled: 'concat', a feed-forward over all levels' tokens; 'linear', one linear map of "
        "each other level; 'attention', where each receiving token attends to the levels' tokens at its position; "
        "'skip', for an hourglass, where the coarser token replaces the finer one, of which a linear map that starts "
        'at zero is added (H-Net).',
        check=choice(*MERGES),
    )
    merge_window: int = option(
        0,
        help="With `merge = 'attention'`: number of earlier tokens of each level that are attended to as well.",
        check=integer(0, MOST_IN_TURN),
    )
    arrangement: Literal['parallel', 'hourglass'] = option(
        'parallel',
        help="'parallel': levels run side by side and merge after every layer. 'hourglass': levels run one inside the "
        'other (Nawrot et al. 2021, arXiv 2110.13711, where `hierarchical_stride` equals `hierarchies`). The finest '
        'level runs half of its layers, then the next coarser level runs on its tokens and is merged back, then the '
        'other half runs (the larger one where `depth` is odd).',
        check=choice('parallel', 'hourglass'),
    )

    # weights that are shared, and memory
    share_attention: bool = option(
        False,
        help='Share attention weights between levels of equal `dim`, `heads`, `dim_head` and kind of window, in each '
        'layer.',
        check=check_bool,
    )
    share_feed_forward: bool = option(
        False,
        help='Share feed-forwards between levels of equal `dim` and `ff_mult`, in each layer.',
        check=check_bool,
    )
    residual: Literal['add', 'gru'] = option(
        'add',
        help="How mixers and feed-forwards add to the residual stream: 'add', or 'gru', a gated recurrent unit (GTrXL, "
        'Parisotto et al. 2019, arXiv 1910.06764).',
        check=choice('add', 'gru'),
    )
    reversible: bool = option(
        False,
        help='Recompute the input of each layer from its output in the backward pass, so that training keeps the '
        'activations of one layer only (Gomez et al. 2017, arXiv 1707.04585). Segments with a state keep activations. '
        'Not for layers that FSDP shards.',
        check=check_bool,
    )
    ff_chunks: int = option(
        1,
        help='Number of pieces of the sequence that feed-forwards process one after the other in training: less '
        'memory.',
        check=integer(1, MOST_IN_TURN),
    )
    share_layers: bool = option(
        False,
        help='Share one set of weights between all layers, which differ by a learned vector each (Universal '
        'Transformer, Dehghani et al. 2019, arXiv 1807.03819).',
        check=check_bool,
    )
    halting: Literal['act'] | None = option(
        None,
        help="With `share_layers`, 'act': each token of a level that predicts decides how many layers it takes "
        '(adaptive computation time, Graves 2016, arXiv 1603.08983). Saves time where all levels predict and '
        'all tokens of a pass without a state have halted.',
        check=optional(choice('act')),
    )
    gradient_checkpointing: bool = option(
        False,
        help='Recompute each layer in the backward pass: less memory, up to a third more time.',
        check=check_bool,
    )

    # prediction
    predict_hierarchy: int | None = option(None, help='Compression of the level that predicts. None: the smallest.')
    predict_use_all_hierarchy: bool = option(False, help='Predict from all levels, concatenated.', check=check_bool)

    # objectives
    recon_loss_weight: float = option(
        0.1, help='Weight of the reconstruction loss. 0 builds none of its modules.', check=check_number
    )
    next_latent_loss_weight: float | Sequence[float] = option(
        0.25,
        help='Weight of the next-latent loss. 0 builds none of its modules.',
        check=check_number,
        per_level=True,
    )
    prophet_loss_weight: float | Sequence[float] = option(
        0.0,
        help="Weight of the prophet loss: a level's final token predicts the next c ids (after ProphetNet, Qi et al. "
        '2020, arXiv 2001.04063). 0 builds none of its modules. A level of compression 1 that predicts has none: there '
        'it is the cross entropy.',
        check=check_number,
        per_level=True,
    )
    quantized_loss_weight: float | Sequence[float] = option(
        0.0,
        help="Weight of the quantized loss: a level's final token predicts the discrete ids of the level's next token, "
        'which a random projection quantizer gives. 0 builds none of its modules.',
        check=check_number,
        per_level=True,
    )
    autoencoder_loss_weight: float = option(
        0.1, help="Weight of the autoencoder's reconstruction loss. 0 builds no decoder.", check=check_number
    )
    ratio_loss_weight: float = option(
        0.03,
        help="Weight of the ratio loss, which keeps the share of 'learned' boundaries near the intended one (Hwang et "
        'al. 2025, arXiv 2507.07955).',
        check=check_number,
    )
    surprise_loss_weight: float = option(
        1.0,
        help="Weight of the cross entropy of the head that 'surprise' and 'rise' boundaries read. Its gradient does "
        'not reach the rest of the model.',
        check=check_number,
    )
    ponder_loss_weight: float = option(
        0.01, help='Weight of the number of layers that tokens take with `halting`.', check=check_number
    )
    quantize_from: Literal['compressed', 'output'] = option(
        'compressed',
        help="Tokens that are quantized: 'compressed', a level's tokens as its first block gets them; 'output', as its "
        'last block returns them.',
        check=choice('compressed', 'output'),
    )
    quantizer_codebooks: int = option(1, help='Number of discrete ids of a token.', check=integer(1, MOST_PARTS))
    quantizer_codebook_size: int = option(1024, help='Number of values of such an id.', check=integer(2))
    quantizer_dim: int = option(16, help='Width of the vectors of a codebook.', check=integer())
    next_latent_loss_type: Literal['mse_and_cosine_sim', 'mse', 'smooth_l1'] | Callable[[Tensor, Tensor], Tensor] = (
        option(
            'mse_and_cosine_sim',
            help="'mse_and_cosine_sim', 'mse', 'smooth_l1', or a callable that maps prediction and "
            'target, both `(batch, seq, dim)`, to a loss per element.',
            check=lambda name, value: find_latent_loss(value),
        )
    )
    num_rollouts: int = option(1, help='Number of latents ahead that are predicted.', check=integer(1, MOST_PARTS))
    rollout_weights: Sequence[float] | None = option(
        None, help='Weight of each rollout step. None: equal. They are normalised to a sum of 1.'
    )
    dynamic_rollout_loss_weight: bool = option(
        True, help='Reduce the weight of later rollout steps where earlier ones fail.', check=check_bool
    )
    dynamic_loss_decay: float = option(1.0, help='Rate of that reduction.', check=check_number)
    chunk_summarizers: Sequence[nn.Module | None] | None = option(
        None,
        help='For each level None (the mean over the chunk) or a causal module that maps token embeddings `(batch, '
        'seq, max(dim))` to summaries `(batch, ceil(seq / stride), dim)`.',
        check=optional(check_sequence),
    )
    detach_summaries: bool = option(
        True, help='Stop gradients of the next-latent loss at the summaries.', check=check_bool
    )
    dynamics_hidden_dim: int | None = option(
        None, help="Hidden width of the latent dynamics. None: the level's width.", check=optional(integer())
    )
    dynamics_num_layers: int = option(
        3, help='Number of linear layers of the latent dynamics.', check=integer(1, MOST_PARTS)
    )
    ignore_index: int = option(
        0,
        help='Id that cross entropy and prophet loss skip as a target. Next-latent and quantized loss skip tokens that '
        'end in it. -1 where every id counts, as with bytes.',
        check=check_id,
    )
    recon_ignore_index: int = option(
        0,
        help="Id that the reconstruction losses skip, the autoencoder's too. 0 keeps the numbers of the published "
        'package. -1 where every id counts.',
        check=check_id,
    )
    recon_sample: float = option(
        1.0,
        help="Share of a level's tokens that the reconstruction loss is computed from in training mode, drawn anew "
        'each step. Its expectation stays the same.',
        check=check_sample,
    )

    # kernels
    use_flash_attn: bool = option(
        False,
        help="Accepted for compatibility. Attention always runs PyTorch's fused kernels.",
        check=check_bool,
    )
    attn_backend: Literal['auto', 'sdpa', 'flex', 'local-attention'] = option(
        'auto',
        help="Kernels of windowed attention: 'sdpa', blocks through PyTorch's fused attention; 'flex', PyTorch's "
        "compiled FlexAttention; 'local-attention', that library. 'auto' is 'flex' on CUDA and 'sdpa' elsewhere. The "
        'numbers are the same.',
        check=choice(*BACKENDS),
    )

    def __post_init__(self) -> None:
        options = fields(self)
        for each in options:
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        for each in options:
            check: Check | None = each.metadata['check']
            if check is not None and not each.metadata['per_level']:
                check(each.name, getattr(self, each.name))
        check_together(self)

    # what follows from the options

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The hierarchy levels, in the order of `hierarchies`."""
        return build_levels(self, MIXERS, BOUNDARIES)

    def values(self, name: str) -> tuple[Any, ...]:
        """The value of a per-level option for each level."""
        return per_level(name, getattr(self, name), len(self.levels))

    @cached_property
    def compressions(self) -> list[int]:
        return [level.compression for level in self.levels]

    @cached_property
    def order(self) -> list[int]:
        """The indices of the levels, finest first."""
        return sorted(range(len(self.levels)), key=self.compressions.__getitem__)

    @cached_property
    def layers(self) -> int:
        """The largest depth of a level."""
        return max(level.depth for level in self.levels)

    @cached_property
    def predict_level(self) -> int:
        """The index of the level that predicts."""
        chosen = min(self.compressions) if self.predict_hierarchy is None else self.predict_hierarchy
        if not is_int(chosen) or chosen not in self.compressions:
            raise ValueError(f'predict_hierarchy must be one of hierarchies {self.compressions}, got {chosen!r}')
        return self.compressions.index(chosen)

    @cached_property
    def predict_from(self) -> Sequence[int]:
        """The indices of the levels that logits are computed from."""
        return range(len(self.levels)) if self.predict_use_all_hierarchy else [self.predict_level]

    @cached_property
    def receivers(self) -> list[int]:
        """The indices of the levels that merges add to."""
        merge_all = self.hierarchy_merge_all and self.merge_into == 'predict'
        return find_receivers(
            'all' if merge_all else self.merge_into, self.compressions, self.predict_level, self.predict_from
        )

    @cached_property
    def dim_embed(self) -> int:
        """The width of embeddings. Of nested levels, only the finest one reads them."""
        if arrangement_of(self).nested:
            return self.levels[self.order[0]].dim
        return max(level.dim for level in self.levels)

    @cached_property
    def compressor_modules(self) -> tuple[nn.Module | None, ...]:
        """The user's compressor of each level, None where the level names one."""
        return tuple(each if isinstance(each, nn.Module) else None for each in self.values('compressor'))

    @cached_property
    def rules(self) -> tuple[nn.Module | None, ...]:
        """The user's rule that places each level, None where the level names one or has a fixed stride."""
        return tuple(each if isinstance(each, nn.Module) else None for each in self.values('boundaries'))

    @cached_property
    def summarizers(self) -> tuple[nn.Module | None, ...]:
        """The user's chunk summarizer of each level."""
        return tuple(self.chunk_summarizers or (None,) * len(self.levels))

    @cached_property
    def rollouts(self) -> tuple[float, ...]:
        """The normalised weight of each rollout step."""
        return normalise_rollout_weights(self.rollout_weights, self.num_rollouts)

    @property
    def rollout_decay(self) -> float | None:
        return self.dynamic_loss_decay if self.dynamic_rollout_loss_weight else None
