"""The model: embed, compress, (blocks, merge) x depth, logits and losses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import HierarchicalBlock
from .compress import Compressor
from .generate import Reader, Sampler, Stream, generate
from .levels import Level, build_levels, check_int, check_number, check_sequence, is_int
from .linear import Linear
from .losses import (
    ChunkSummarizer,
    LatentDynamics,
    LossCounts,
    LossParts,
    cross_entropy,
    find_latent_loss,
    next_latent_loss,
    normalise_rollout_weights,
    reconstruction_loss,
    rollout_counts,
    seen_ids,
)
from .merge import Coarse, HierarchicalMerge, concat_levels
from .mixers.attention import BACKENDS
from .pretrained import Pretrained
from .state import BlockState, State

# what the published package's windowed attention calls its rotary frequencies
WINDOWED_FREQS = re.compile(r'(layers\.\d+\.\d+\.attn\.)attn_fn\.rel_pos\.inv_freq')
# parts that exist only where a loss uses them
OPTIONAL_KEYS = re.compile(r'(latent_dynamics\.\d+|chunk_summarizers\.\d+|compressors\.\d+\.to_recon)\.')


class HierarchicalTransformer(
    nn.Module,
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

    `dim`, `dim_head`, `heads`, `ff_mult`, `window_sizes`, `hierarchical_stride` and `next_latent_loss_weight` take
    one value, or a tuple (list) with one for each hierarchy.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the level. Embeddings have the largest of them.
        depth: number of layers.
        seq_len: the longest sequence that one pass reads.
        dim_head: width of an attention head.
        heads: number of attention heads.
        ff_mult: hidden width of the feed-forward, as a multiple of `dim`.
        hierarchies: compression factors, powers of two that differ: `(1, 2, 8)`.
        window_sizes: how many tokens of the level before it a token attends to, besides itself. None is full
            attention, 0 no attention. One that exceeds the level's length `seq_len // c` counts as full.
        hierarchical_stride: how many tokens apart level tokens stand, a power of two up to the compression. The
            level that predicts has stride 1.
        hierarchy_merge_all: merge into all levels, instead of the predicting one alone.
        predict_hierarchy: the compression factor of the level that predicts; the smallest by default.
        predict_use_all_hierarchy: predict from all levels, concatenated.
        recon_loss_weight: weight of the reconstruction loss. 0 builds no part of it.
        next_latent_loss_weight: weight of the next-latent loss. 0 builds no part of it.
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
        ignore_index: the id that neither cross entropy nor the next-latent loss counts as a target.
        recon_ignore_index: the id that the reconstruction loss does not ask for. 0 keeps the published package's
            numbers; take -1 where id 0 is one like any other.
        recon_sample: share of a level's tokens that the reconstruction loss is taken from, drawn anew at each step of
            training; its expectation stays the same.
        use_flash_attn: accepted for the published package's sake. Attention always runs PyTorch's fused kernels.
        attn_backend: what windowed attention runs on: 'sdpa', blocks through PyTorch's fused attention; 'flex',
            PyTorch's compiled FlexAttention; 'local-attention', that library. 'auto' takes 'flex' on CUDA and 'sdpa'
            elsewhere. The numbers are the same.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping what it computed:
            less memory, a third more time.

    Raises:
        ValueError: a value is not allowed, or two contradict each other. The message names them.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int | Sequence[int],
        depth: int,
        seq_len: int = 2048,
        dim_head: int | Sequence[int] = 64,
        heads: int | Sequence[int] = 8,
        ff_mult: float | Sequence[float] = 4,
        hierarchies: int | Sequence[int] = 1,
        window_sizes: int | Sequence[int | None] | None = None,
        hierarchical_stride: int | Sequence[int] = 1,
        hierarchy_merge_all: bool = False,
        predict_hierarchy: int | None = None,
        predict_use_all_hierarchy: bool = False,
        recon_loss_weight: float = 0.1,
        next_latent_loss_weight: float | Sequence[float] = 0.25,
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
        check_int('depth', depth)
        check_int('seq_len', seq_len)
        check_int('num_rollouts', num_rollouts)
        check_int('dynamics_num_layers', dynamics_num_layers)
        check_number('recon_loss_weight', recon_loss_weight)
        check_number('dynamic_loss_decay', dynamic_loss_decay)
        if not 0 < check_number('recon_sample', recon_sample) <= 1:
            raise ValueError(f'recon_sample must be above 0 and at most 1, got {recon_sample!r}')
        if attn_backend not in BACKENDS:
            raise ValueError(f'attn_backend must be one of {", ".join(BACKENDS)}, got {attn_backend!r}')
        if dynamics_hidden_dim is not None:
            check_int('dynamics_hidden_dim', dynamics_hidden_dim)
        for name, value in (('ignore_index', ignore_index), ('recon_ignore_index', recon_ignore_index)):
            if not is_int(value):
                raise ValueError(f'{name} must be an integer, got {value!r}')
        for name, value in (
            ('hierarchy_merge_all', hierarchy_merge_all),
            ('predict_use_all_hierarchy', predict_use_all_hierarchy),
            ('dynamic_rollout_loss_weight', dynamic_rollout_loss_weight),
            ('detach_summaries', detach_summaries),
            ('use_flash_attn', use_flash_attn),
            ('gradient_checkpointing', gradient_checkpointing),
        ):
            if not isinstance(value, bool):
                raise ValueError(f'{name} must be True or False, got {value!r}')

        levels = build_levels(
            hierarchies=hierarchies,
            hierarchical_stride=hierarchical_stride,
            dim=dim,
            dim_head=dim_head,
            heads=heads,
            ff_mult=ff_mult,
            window_sizes=window_sizes,
            next_latent_loss_weight=next_latent_loss_weight,
            seq_len=seq_len,
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

        # parts, in the order in which a sequence passes through them

        dim_embed = max(level.dim for level in levels)
        reconstruct = recon_loss_weight > 0
        self.token_emb = nn.Embedding(num_tokens, dim_embed)
        self.compressors = nn.ModuleList(
            Compressor(level, dim_embed=dim_embed, num_tokens=num_tokens, reconstruct=reconstruct) for level in levels
        )
        self.post_token_emb_norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)

        into = range(len(levels)) if hierarchy_merge_all else [self.predict_level]
        self.layers = nn.ModuleList(
            nn.ModuleList(HierarchicalBlock(level, attn_backend) for level in levels) for _ in range(depth)
        )
        self.hierarchical_merges = nn.ModuleList(
            HierarchicalMerge(levels, into) for _ in range(depth) if len(levels) > 1
        )

        self.norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)
        self.to_logits = Linear(sum(levels[i].dim for i in self.predict_from), num_tokens, bias=False)

        # keyed by the level's index, since a level without the loss has neither

        self.latent_dynamics = nn.ModuleDict()
        self.chunk_summarizers = nn.ModuleDict()
        for i, (level, summarizer) in enumerate(zip(levels, chunk_summarizers, strict=True)):
            if level.next_latent_loss_weight > 0:
                self.latent_dynamics[str(i)] = LatentDynamics(
                    level.dim, hidden_dim=dynamics_hidden_dim, num_layers=dynamics_num_layers
                )
                self.chunk_summarizers[str(i)] = summarizer or ChunkSummarizer(
                    dim_embed=dim_embed, dim=level.dim, compression=level.compression, stride=level.stride
                )

        # a last norm that no loss reads still shapes the embeddings that forward returns, yet cannot be trained

        for i, norm in enumerate(self.norms):
            trained = i in self.predict_from or str(i) in self.latent_dynamics
            if not trained and self.compressors[i].to_recon is None:
                make_buffers(norm)

        self.register_load_state_dict_pre_hook(adapt_published_keys)

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        return_hierarchical_token_embeds: bool = False,
        return_hierarchical_embeds: bool = False,
        return_logits_and_embeds: bool = False,
        ablate_hierarchical_merge: bool = False,
        *,
        labels: Tensor | None = None,
        counts: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
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
            ablate_hierarchical_merge: leave the merges out, to see what they are worth.
            labels: with `return_loss`, the targets `(batch, n)` of all of `ids`, instead of `ids` shifted by one.
                Those equal to `ignore_index` are left out.
            counts: with `return_loss`, what the parts of the loss are divided by, as `count_targets` counts it. With
                the sum over several batches, each batch's loss is its share of the loss of all of them as one.
            state: what was read before, as `return_state` gave it. Without gradients it is consumed: written in
                place and handed back. Auxiliary losses see the chunk alone.
            return_state: return the state after these ids, too. A state is not read without being returned.

        Raises:
            ValueError: ids or labels of the wrong rank, dtype, length or range; more than one thing to return; a
                state of another model, batch size, dtype or device.
        """
        wanted = {
            'return_loss': return_loss,
            'return_hierarchical_token_embeds': return_hierarchical_token_embeds,
            'return_hierarchical_embeds': return_hierarchical_embeds,
            'return_logits_and_embeds': return_logits_and_embeds,
        }
        if sum(map(bool, wanted.values())) > 1:
            raise ValueError(f'forward returns one thing, got {", ".join(name for name in wanted if wanted[name])}')
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
            if not torch.is_grad_enabled() and not state.written and state.requires_grad:
                # what is written over must not be taken for what a graph computed
                state = state.clone().detach()
        elif return_state:
            state = self.initial_state(ids.shape[0])
        elif ids.shape[1] > self.seq_len:
            raise ValueError(f'ids must have at most seq_len = {self.seq_len} tokens in a pass, got {ids.shape[1]}')
        position = 0 if state is None else state.position

        embeds = self.token_emb(ids)
        token_embeds, state = self.compress(embeds, state)
        if return_hierarchical_token_embeds and state is None:
            return token_embeds
        final, predict_from, state = self.run_layers(token_embeds, state, position, ablate_hierarchical_merge)
        if state is not None:
            in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            state = replace(state, position=position + ids.shape[1], written=state.written if in_place else [])
            if in_place:
                state.written[:] = [state.position]

        output: tuple[Any, ...]
        if return_hierarchical_token_embeds:
            output = (token_embeds,)
        elif return_hierarchical_embeds:
            output = (final,)
        elif return_logits_and_embeds:
            output = (self.to_logits(predict_from), final)
        elif labels is None:
            output = (self.to_logits(predict_from),)
        else:
            output = self.losses(predict_from, final, embeds, ids, labels, position, counts)

        if return_state:
            output = (*output, state)
        return output if len(output) > 1 else output[0]

    def compress(self, embeds: Tensor, state: State | None) -> tuple[list[Tensor], State | None]:
        """The levels' tokens from the embeddings `(batch, n, max(dim))`."""
        tokens, kept = [], []
        for i, (compress, norm) in enumerate(zip(self.compressors, self.post_token_emb_norms, strict=True)):
            x, before = compress(embeds, state and state.embeds[i], state.position if state else 0)
            # the stream stays in the dtype of the weights, also where autocast has it multiplied in another
            tokens.append(norm(x.to(norm.weight.dtype)))
            kept.append(before)
        return tokens, state and replace(state, embeds=tuple(kept))

    def run_layers(
        self, tokens: list[Tensor], state: State | None, position: int, ablate_merge: bool
    ) -> tuple[list[Tensor], Tensor, State | None]:
        """The levels' final embeddings, and those of them that predict, side by side at each position."""
        blocks, coarse = [], []
        for i in range(len(self.layers)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                ran = checkpoint(
                    self.run_layer, i, tokens, state, position, ablate_merge,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                ran = self.run_layer(i, tokens, state, position, ablate_merge)
            tokens, kept, last = ran
            blocks.append(kept)
            coarse.append(last)

        tokens = [norm(x) for norm, x in zip(self.norms, tokens, strict=True)]
        predict_from, last = concat_levels(
            [tokens[i] for i in self.predict_from],
            [self.levels[i] for i in self.predict_from],
            None if state is None else state.coarse[-1],
            position,
        )
        if state is not None:
            state = replace(state, blocks=tuple(blocks), coarse=(*coarse, last))  # type: ignore[arg-type]
        return tokens, predict_from, state

    def run_layer(
        self, i: int, tokens: list[Tensor], state: State | None, position: int, ablate_merge: bool
    ) -> tuple[list[Tensor], tuple[BlockState | None, ...], Coarse | None]:
        """Every level's block and the merge of layer `i`; their states, where there is one."""
        mixed = [
            block(x, state and state.blocks[i][j], self.levels[j].length(position))
            for j, (block, x) in enumerate(zip(self.layers[i], tokens, strict=True))  # type: ignore[call-overload]
        ]
        tokens = [x for x, _ in mixed]
        coarse = None if state is None else state.coarse[i]
        if self.hierarchical_merges and not ablate_merge:
            tokens, coarse = self.hierarchical_merges[i](tokens, coarse, position)
        return tokens, tuple(kept for _, kept in mixed), coarse

    def losses(
        self,
        predict_from: Tensor,
        tokens: Sequence[Tensor],
        embeds: Tensor,
        ids: Tensor,
        labels: Tensor,
        position: int,
        counts: Tensor | None,
    ) -> tuple[Tensor, LossParts]:
        """The loss and its parts. What the levels' tokens stand for is sought in `ids`, which begin at `position`."""
        own = LossCounts(*[None] * 3) if counts is None else self.split_counts(counts)
        ce = cross_entropy(predict_from, self.to_logits.weight, labels, self.ignore_index, count=own.ce)
        recon = self.reconstruction_loss(tokens, ids, position, own.recon)
        per_level = self.next_latent_losses(tokens, embeds, ids, position, own.next_latent)
        weights = [level.next_latent_loss_weight for level in self.levels]
        next_latent = torch.stack([weight * loss for weight, loss in zip(weights, per_level, strict=True)]).sum()
        loss = ce + next_latent + self.recon_loss_weight * recon
        return loss, LossParts(ce, next_latent, recon, per_level)

    def count_targets(self, ids: Tensor, labels: Tensor | None = None, *, position: int = 0) -> Tensor:
        """How many targets each part of the loss of these ids `(batch, n)` averages over: `(parts,)`, int64.

        ids and labels are those of `forward`, `position` that of the state they would be read with. Batches that are
        learnt from together, on several devices or one after the other, are given the sum over all of them as
        `counts`: then their losses sum to the loss of one large batch, however unevenly targets are ignored.
        """
        ids, labels = self.check_labels(ids, labels)
        counts = [(labels != self.ignore_index).sum()]
        for level, compressor in zip(self.levels, self.compressors, strict=True):
            if compressor.to_recon is not None:
                seen = seen_ids(ids, **self.recon_windows(level, position))
                counts.append((seen != self.recon_ignore_index).sum())
        for i in self.latent_dynamics:
            counts += rollout_counts(self.latent_targets(self.levels[int(i)], ids, position), len(self.rollout_weights))
        return torch.stack(counts)

    def split_counts(self, counts: Tensor) -> LossCounts:
        """The counts of each part, for each level that has it."""
        with_recon = sum(compressor.to_recon is not None for compressor in self.compressors)
        steps = len(self.rollout_weights)
        expected = 1 + with_recon + steps * len(self.latent_dynamics)
        if not isinstance(counts, Tensor) or counts.shape != (expected,):
            got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
            raise ValueError(f'counts must be what count_targets returns, of shape ({expected},), got {got}')
        each = counts.unbind()
        rollouts = each[1 + with_recon :]
        return LossCounts(
            each[0], each[1 : 1 + with_recon], [rollouts[i : i + steps] for i in range(0, len(rollouts), steps)]
        )

    def recon_windows(self, level: Level, position: int) -> dict[str, int]:
        """Where a level's compressor looks in ids that begin at `position`."""
        return dict(
            compression=level.compression,
            stride=level.stride,
            offset=-position % level.stride,
            ignore_index=self.recon_ignore_index,
        )

    def latent_targets(self, level: Level, ids: Tensor, position: int) -> Tensor:
        """Which of a level's tokens count as targets, `(batch, ceil(n / stride))`."""
        return ids[:, -position % level.stride :: level.stride] != self.ignore_index

    def initial_state(self, batch_size: int) -> State:
        """The state of a model that has read nothing, in the dtype and on the device of its weights.

        A level with a window of w keeps w tokens and the one at hand in each of its phases, one with full attention
        `ceil(seq_len / c)` and the one at hand.
        """
        like = self.token_emb.weight

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        def block_state(level: Level) -> BlockState:
            rows = (level.phases, batch_size)
            shift = (*rows, 1, level.dim // 2)
            if level.window == 0:
                return BlockState(None, zeros(*shift), None, None)
            reach = -(-self.seq_len // level.compression) if level.window is None else level.window
            cache = (*rows, level.heads, reach + 1, level.dim_head)
            return BlockState(zeros(*shift), zeros(*shift), zeros(*cache), zeros(*cache))

        def coarse(levels: Sequence[Level]) -> tuple[Tensor | None, ...]:
            return tuple(zeros(batch_size, 1, level.dim) if level.stride > 1 else None for level in levels)

        return State(
            position=0,
            spec=self._state_spec,
            embeds=tuple(
                zeros(batch_size, level.compression - 1, like.shape[1]) if level.compression > 1 else None
                for level in self.levels
            ),
            blocks=tuple(tuple(block_state(level) for level in self.levels) for _ in self.layers),
            coarse=(
                *(coarse(self.levels) for _ in self.layers),
                coarse([self.levels[i] for i in self.predict_from]),
            ),
        )

    @property
    def _state_spec(self) -> tuple[Any, ...]:
        """What the shape of a state hangs on, and what it means."""
        return (self.seq_len, len(self.layers), tuple(self.predict_from), *self.levels)

    def check_state(self, state: State, ids: Tensor) -> None:
        """Refuses a state that is not of this model, or not for these ids."""
        if not isinstance(state, State):
            raise ValueError(f'state must be what return_state gave, got {type(state).__name__}')
        if state.spec != self._state_spec:
            raise ValueError('state is of another model: its levels, depth, seq_len or predicting levels differ')
        if not torch.compiler.is_compiling() and state.consumed:
            raise ValueError(
                f'state at position {state.position} was consumed by a chunk that came after it: '
                'state.clone() keeps one'
            )
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

    def reconstruction_loss(
        self, tokens: Sequence[Tensor], ids: Tensor, position: int = 0, counts: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The sum over compressed levels of how well their final tokens give back the ids they were made of."""
        loss = tokens[0].new_zeros(())
        given = iter(counts or ())
        for x, level, compressor in zip(tokens, self.levels, self.compressors, strict=True):
            if compressor.to_recon is not None:
                loss = loss + reconstruction_loss(
                    x,
                    compressor.to_recon.weight,  # type: ignore[arg-type, union-attr]
                    ids,
                    **self.recon_windows(level, position),
                    sample=self.recon_sample if torch.is_grad_enabled() else 1.0,
                    count=next(given, None),
                )
        return loss

    def next_latent_losses(
        self,
        tokens: Sequence[Tensor],
        embeds: Tensor,
        ids: Tensor,
        position: int = 0,
        counts: Sequence[Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Each level's next-latent loss before its weight, zero where the weight is."""
        if self.detach_summaries:
            embeds = embeds.detach()

        losses = []
        given = iter(counts or ())
        for i, (x, level) in enumerate(zip(tokens, self.levels, strict=True)):
            if str(i) not in self.latent_dynamics:
                losses.append(x.new_zeros(()))
                continue
            offset = -position % level.stride
            summarizer = self.chunk_summarizers[str(i)]
            if isinstance(summarizer, ChunkSummarizer):
                summaries = summarizer(embeds, offset)
            else:
                # a module from outside knows no offset, so its chunk begins with the first token of its level
                summaries = summarizer(embeds[:, offset:]) if x.shape[1] else x
            if not isinstance(summaries, Tensor) or summaries.shape != x.shape:
                got = tuple(summaries.shape) if isinstance(summaries, Tensor) else type(summaries).__name__
                raise ValueError(
                    f'chunk_summarizers of hierarchy {level.compression} must return shape {tuple(x.shape)}, got {got}'
                )
            loss = next_latent_loss(
                x,
                summaries,
                self.latent_targets(level, ids, position),
                dynamics=self.latent_dynamics[str(i)],
                loss_fn=self.latent_loss_fn,
                rollout_weights=self.rollout_weights,
                decay=self.rollout_decay,
                counts=next(given, None),
            )
            losses.append(loss)
        return tuple(losses)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | Sequence[Tensor],
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        return_state: bool = False,
        state: State | None = None,
    ) -> Any:
        """Samples `seq_len` new ids after `prompt`: `(batch, n)` to `(batch, seq_len)`, without the prompt.

        The prompt is read in one pass, each new id in a step that costs the same however many came before. There
        is no limit to their number.

        Args:
            prompt: ids to go on from, at least one a row; or a list of `(n,)`, prompts of unequal length, each of
                which gets what it would get alone.
            seq_len: how many new ids.
            temperature: divides the logits; 0 takes the likeliest id each time.
            filter_thres: share of the vocabulary, the least likely, that is never drawn; acts only where none of
                the next three is given.
            top_k: draw from that many of the likeliest ids.
            top_p: draw from the likeliest ids that together reach this probability.
            min_p: draw from ids of at least this share of the likeliest one's probability.
            stop_ids: ids that end a row. It is filled up with the one that ended it, and once all rows have ended
                fewer than `seq_len` ids are returned.
            generator: where randomness comes from, for the same ids again.
            use_cache: False reads everything from position 0 at each step: the same ids, slowly.
            return_state: return `(ids, state)`, with a state that has read the prompt and all new ids.
            state: what was read before the prompt. It is consumed.

        Raises:
            ValueError: an empty prompt, or one of the wrong rank, dtype or range; a setting that is not allowed.
        """
        reader, prompts, sampler, stops = self._prepare_generation(
            prompt,
            seq_len,
            temperature=temperature,
            filter_thres=filter_thres,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_ids=stop_ids,
            generator=generator,
            use_cache=use_cache,
            state=state,
        )
        if return_state and len({len(row) for row in prompts}) > 1:
            raise ValueError(
                'prompt must have rows of equal length where return_state is given: a state has one position'
            )

        new = generate(reader, prompts, seq_len, sampler=sampler, stop_ids=stops)
        if not return_state:
            return new
        reader.read(new[:, -1:] if seq_len else torch.stack(prompts))
        return new, reader.state

    def stream(self, prompt: Tensor | Sequence[Tensor], seq_len: int, **settings: Any) -> Stream:
        """The ids of `generate` as they come, `(batch,)` each. Takes its settings but `return_state`.

        What it returns is iterated over; its `state` is the state after the prompt and what came, and ends the stream.

        Raises:
            ValueError: as `generate`; or prompts of unequal length.
        """
        if unknown := sorted(set(settings) - (set(signature(self.generate).parameters) - {'return_state'})):
            raise ValueError(f'stream takes the settings of generate but return_state, got {", ".join(unknown)}')
        reader, prompts, sampler, stops = self._prepare_generation(prompt, seq_len, **settings)
        if len({len(row) for row in prompts}) > 1:
            raise ValueError('prompt must have rows of equal length: stream yields their ids together')
        return Stream(reader, prompts, seq_len, sampler=sampler, stop_ids=stops)

    def _prepare_generation(
        self,
        prompt: Tensor | Sequence[Tensor],
        seq_len: int,
        *,
        stop_ids: Sequence[int] | None = None,
        use_cache: bool = True,
        state: State | None = None,
        **sampling: Any,
    ) -> tuple[Reader, list[Tensor], Sampler, list[int]]:
        """What the generation loop runs on, once all of it is seen to be allowed."""
        if isinstance(prompt, (list, tuple)):
            if not prompt:
                raise ValueError('prompt must hold at least one row, got an empty list')
            prompts = [
                check_ids('prompt', row[None] if isinstance(row, Tensor) else row, self.num_tokens) for row in prompt
            ]
            prompts = [row[0] for row in prompts]
        else:
            prompts = list(check_ids('prompt', prompt, self.num_tokens))

        check_int('seq_len', seq_len, 0)
        stops = list(stop_ids or ())
        for stop in stops:
            if not is_int(stop) or not 0 <= stop < self.num_tokens:
                raise ValueError(f'stop_ids must be in [0, {self.num_tokens}), got {stop!r}')
        if state is not None and not use_cache:
            raise ValueError('use_cache = False reads from position 0, so it takes no state')
        if state is not None:
            self.check_state(state, torch.stack([row[:1] for row in prompts]))

        return Reader(self, state, use_cache=use_cache), prompts, Sampler(**sampling), stops

    @torch.no_grad()
    def score(self, ids: Tensor | bytes, *, chunk_size: int | None = None, return_log_probs: bool = False) -> Any:
        """How many bits the model needs for each id after the first: bits per byte, for a model of bytes.

        One pass with the state carried along, so each id is predicted from all that the model can remember, in
        memory that does not grow with the length.

        Args:
            ids: `(n,)` or `(batch, n)` of any length from 2 up, or bytes.
            chunk_size: how many ids are read at a time, `seq_len` by default. Changes no number.
            return_log_probs: also return the natural logarithm of each id's probability, `(..., n - 1)`.

        Returns a float, or `(float, log_probs)`: the mean over all ids but each row's first and those equal to
        `ignore_index`.

        Raises:
            ValueError: ids of the wrong rank, dtype, length or range, or nothing but ignored ones.
        """
        if isinstance(ids, (bytes, bytearray)):
            ids = torch.frombuffer(bytearray(ids), dtype=torch.uint8) if ids else torch.empty(0, dtype=torch.uint8)
        single = isinstance(ids, Tensor) and ids.ndim == 1
        rows = ids[None] if single else ids
        # chunk by chunk, since a long text of bytes is eight times as large as the ids that are read
        check_ids('ids', rows[:, :2] if isinstance(rows, Tensor) and rows.ndim == 2 else rows, self.num_tokens)
        if rows.shape[1] < 2:
            raise ValueError(f'ids must have at least 2 tokens to predict one from another, got {rows.shape[1]}')
        chunk_size = check_int('chunk_size', self.seq_len if chunk_size is None else chunk_size)

        device = self.token_emb.weight.device
        total, count, state, log_probs = 0.0, 0, None, []
        for begin in range(0, rows.shape[1] - 1, chunk_size):
            window = check_ids('ids', rows[:, begin : begin + chunk_size + 1], self.num_tokens).to(device)
            logits, state = self(window[:, :-1], state=state, return_state=True)
            targets = window[:, 1:]
            picked = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
            picked = picked.gather(-1, targets[..., None])[..., 0]
            counted = targets != self.ignore_index
            # added up on the CPU: not every device has float64
            total -= (picked * counted).cpu().double().sum().item()
            count += int(counted.sum())
            if return_log_probs:
                log_probs.append(picked)

        if not count:
            raise ValueError(f'ids must hold more than ignore_index = {self.ignore_index}, got nothing else to predict')
        bits = total / count / math.log(2)
        if not return_log_probs:
            return bits
        joined = torch.cat(log_probs, dim=1)
        return bits, joined[0] if single else joined


def check_ids(name: str, ids: Any, num_tokens: int, also: int | None = None) -> Tensor:
    """The ids `(batch, n)` as int64, any integer dtype taken. Refuses others than `[0, num_tokens)` and `also`."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f'{name} must be a tensor of integers, got {getattr(ids, "dtype", type(ids).__name__)}')
    if ids.ndim != 2:
        raise ValueError(f'{name} must have shape (batch, seq), got {tuple(ids.shape)}')
    if 0 in ids.shape:
        raise ValueError(f'{name} must hold at least one token, got shape {tuple(ids.shape)}')
    ids = ids.long()

    # reading values would make an accelerator wait, or break a compiled graph
    if ids.device.type == 'cpu' and not torch.compiler.is_compiling():
        allowed = ids if also is None else ids[ids != also]
        if allowed.numel():
            low, high = (int(value) for value in allowed.aminmax())
            if low < 0 or high >= num_tokens:
                raise ValueError(f'{name} must be in [0, {num_tokens}), got values from {low} to {high}')
    return ids


def make_buffers(module: nn.Module) -> None:
    """Turns a module's parameters into buffers: still saved and loaded, no longer trained."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())


def adapt_published_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Makes weights of the published package fit: renames what is named otherwise, leaves out what has no use here."""
    own = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if freqs := WINDOWED_FREQS.fullmatch(name):
            state_dict[f'{prefix}{freqs[1]}rotary_emb.freqs'] = state_dict.pop(key)
        elif (part := OPTIONAL_KEYS.match(name)) and not any(mine.startswith(part[0]) for mine in own):
            del state_dict[key]
