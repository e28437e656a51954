"""The model: embed, compress, (blocks, merge) x depth, logits and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .ablation import Ablatable, Ablations
from .accounting import Accountable
from .arrangements import Request, arrangement_of, compress_all
from .block import HierarchicalBlock
from .calls import TypedModule
from .checks import check_int
from .compressors import Autoencoder, Compressor
from .config import Config
from .embeddings import Contexts, NGramEmbedding, RecallEmbedding, embed
from .generation.methods import Generative
from .generation.prompts import check_ids
from .halting import AdaptiveHalting
from .layers import build_layers, build_merges, make_buffers, share_between_levels
from .memory import Memory, State
from .merges import Contribution, Merge, concat_levels, zero_columns
from .objectives import Batch, LossParts, build_objectives, quantize, split_counts, total_loss
from .ops.linear import begin_at_zero, chain
from .options import describe, takes_options
from .pretrained import Pretrained
from .published import adapt_published_keys
from .stateful import Stateful, layout_of
from .summary import summary


@dataclass
class Read:
    """What a pass computes from ids `(batch, n)`, up to the logits."""

    embeds: Tensor
    """The embeddings, `(batch, n, max(dim))`."""
    inputs: list[Tensor]
    """Each level's tokens as its first block gets them, `(batch, ceil(n / stride), dim)`."""
    tokens: list[Tensor]
    """Each level's final tokens, likewise."""
    predict_from: Tensor
    """The final tokens of the levels that predict, concatenated at each position: `(batch, n, sum of their dims)`."""
    codes: Tensor | None
    """The autoencoder's coarsest feature map, if there is one."""
    pondered: dict[int, Tensor]
    """The ponder cost of the tokens of levels that halt, `(batch, ceil(n / stride))`, by the index of the level."""
    contributions: list[Contribution]
    """What each level contributed to each merge, if that was asked for."""
    state: State | None
    """The state after these ids, if there was a state before."""


class HierarchicalTransformer(
    Ablatable,
    Accountable,
    TypedModule,
    Stateful,
    Generative,
    Pretrained,
    library_name='simple-hierarchical-transformer',
    license='mit',
    pipeline_tag='text-generation',
    tags=['byte-level', 'hierarchical-transformer'],
):
    __doc__ = f"""A causal language model that reads a sequence at several resolutions at once.

    Each hierarchy level compresses the token embeddings by its factor and runs its own transformer blocks. After
    every layer a merge pools what the levels know into the level that predicts the next token. With one level, the
    model is a plain GPT.

    Options that list `Sequence` beside a single type take one value, or a tuple with one value for each hierarchy:
    `dim`, `depth`, `dim_head`, `heads`, `ff_mult`, `window_sizes`, `hierarchical_stride`, `compressor`, `mixer`,
    `mixer_kwargs` and the weights of the next-latent, prophet and quantized losses.

    Args:
{describe(Config)}

    Raises:
        ValueError: an option is not allowed, or two contradict each other. The message names them.
    """

    @takes_options(Config)
    def __init__(self, config: Config) -> None:
        super().__init__()
        levels = config.levels
        self.levels = levels
        self.num_tokens = config.num_tokens
        self.seq_len = config.seq_len
        self.ignore_index = config.ignore_index
        self.recon_ignore_index = config.recon_ignore_index
        self.arrangement = config.arrangement
        self.reversible = config.reversible
        self.gradient_checkpointing = config.gradient_checkpointing
        self.quantize_from = config.quantize_from
        self.recon_sample = config.recon_sample
        self.predict_level = config.predict_level
        self.predict_from = config.predict_from
        self.order = config.order
        self.layout = layout_of(config)
        self.ablations = Ablations()

        # modules, in the order in which a sequence passes through them

        self.token_emb = nn.Embedding(config.num_tokens, config.dim_embed)
        self.ngram_emb: NGramEmbedding | None = None
        if config.ngrams or config.word_ngrams:
            self.ngram_emb = NGramEmbedding(
                config.dim_embed, config.ngrams, config.ngram_rows, config.ngram_dropout, config.word_ngrams
            )
        self.recall_emb: RecallEmbedding | None = None
        if config.recall or config.word_recall:
            self.recall_emb = RecallEmbedding(
                config.num_tokens, config.dim_embed, config.recall, config.seq_len, config.word_recall
            )
        # hashed once for both
        self.contexts = Contexts.among((*config.ngrams, *config.recall), (*config.word_ngrams, *config.word_recall))
        self.autoencoder: Autoencoder | None = None
        if config.autoencoder:
            decoded = config.num_tokens if config.autoencoder_loss_weight > 0 else None
            self.autoencoder = Autoencoder(levels, dim=config.dim_embed, num_tokens=decoded)
        arrangement = arrangement_of(self)
        sources = arrangement.sources(config) if self.autoencoder is None else self.autoencoder.sources(levels)
        reconstructed = config.num_tokens if config.recon_loss_weight > 0 else None
        self.compressors = nn.ModuleList(
            Compressor(level, **source._asdict(), module=module, num_tokens=reconstructed)
            for level, source, module in zip(levels, sources, config.compressor_modules, strict=True)
        )
        self.post_token_emb_norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)

        self.layers = build_layers(config)
        # layers that share their weights differ by these
        self.step_embeds = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(config.layers, level.dim)) for level in levels if config.share_layers
        )
        self.halting = nn.ModuleDict(
            {str(i): AdaptiveHalting(levels[i].dim) for i in self.predict_from if config.halting is not None}
        )
        share_between_levels(config, self.layers)

        self.objectives = build_objectives(config)
        trained = [each.level for each in self.objectives if each.level is not None and each.trains_tokens]
        self.ends = frozenset((*self.predict_from, *trained))
        """The indices of the levels whose final tokens are used in training."""

        self.hierarchical_merges = nn.ModuleList(build_merges(config, arrangement.merges(config)))

        self.norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)
        self.to_logits = nn.Linear(sum(levels[i].dim for i in self.predict_from), config.num_tokens, bias=False)
        self.latent_dynamics, self.chunk_summarizers = nn.ModuleDict(), nn.ModuleDict()
        self.to_prophet, self.to_quantized, self.quantizers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for objective in self.objectives:
            for name, module in objective.modules(config).items():
                if not hasattr(self, name):
                    self.add_module(name, nn.ModuleDict())
                cast(nn.ModuleDict, self.get_submodule(name))[str(objective.level)] = module

        self.freeze_unread_modules(config)
        if config.zero_init:
            for layer in cast('list[list[HierarchicalBlock | None]]', self.layers):
                for block in layer:
                    if block is not None:
                        block.zero_init()
            for k in range(len(self.hierarchical_merges)):
                self.merge(k).zero_init()
            begin_at_zero(self.to_logits)
        self.register_load_state_dict_pre_hook(adapt_published_keys)

    def freeze_unread_modules(self, config: Config) -> None:
        """Turns weights that no objective reads into buffers.

        They still shape the embeddings that `forward` returns: the last norm of a level that is not trained at its end,
        and what the last merge adds to it.
        """
        unread = [norm for i, norm in enumerate(self.norms) if i not in self.ends]
        is_own = config.layers == 1 or not config.share_layers
        if self.arrangement == 'parallel' and len(self.hierarchical_merges) and is_own:
            unread += self.merge(-1).unread_modules(self.ends)
        for module in unread:
            make_buffers(module)

    def __repr__(self) -> str:
        """A line for each level and for each part. `nn.Module.__repr__(model)` shows all modules."""
        return summary(self)

    def block(self, layer: int, i: int) -> HierarchicalBlock:
        """The block of a layer and of level i."""
        # a cast, since the module may be wrapped
        return cast(HierarchicalBlock, cast(nn.ModuleList, self.layers[layer])[i])

    def merge(self, k: int) -> Merge:
        """The k-th merge: that of layer k, or in an hourglass of the k-th and the next coarser level."""
        return cast(Merge, self.hierarchical_merges[k])

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
        readings: Tensor | float | None = None,
    ) -> Any:
        """Reads ids `(batch, n)` of any integer dtype and returns next-token logits `(batch, n, num_tokens)`.

        With `return_state`, the state comes last: `logits, state = model(ids, return_state = True)` reads the start
        of a sequence, `model(ids, state = state, return_state = True)` the next chunk. Chunks of any lengths give the
        same result as one pass, and there is no limit to their sum. Full attention then reaches back `ceil(seq_len /
        c)` tokens of its phase, and drops older ones.

        Args:
            ids: the ids to read, each in `[0, num_tokens)`.
            return_loss: return `(loss, parts)`, a scalar and `LossParts`. Predicts `ids[:, 1:]` from `ids[:, :-1]`.
            return_hierarchical_token_embeds: return each level's tokens as its first block gets them, a list of
                `(batch, ceil(n / stride), dim)`.
            return_hierarchical_embeds: return each level's final embeddings, likewise.
            return_logits_and_embeds: return both logits and final embeddings.
            ablate_hierarchical_merge: skip the merges. `ablate` leaves out one level.
            return_quantized_ids: return the discrete ids of each level's tokens, `(batch, ceil(n / stride),
                codebooks)`, None for a level without a quantized loss.
            return_contributions: return logits, and for each merge the `Contribution` of each level. In an hourglass
                the merge of the finest levels comes first.
            labels: with `return_loss`, the targets `(batch, n)` of all ids, instead of `ids` shifted by one. Targets
                equal to `ignore_index` are skipped.
            counts: with `return_loss`, the numbers that the sums of losses are divided by, as `count_targets` returns
                them. With the sum of the counts of several batches, each batch's loss is its share of their joint loss.
            state: the state after the ids read before. Without gradients the call consumes it: it writes it in place
                and returns it. A consumed state is refused, also after a call that failed. Auxiliary losses see the
                chunk only.
            return_state: return the state after these ids, too. Required with `state`.
            logits_to_keep: return the logits of the last so many positions, `(batch, logits_to_keep, num_tokens)`. 0
                keeps all. Generation asks for one.
            readings: how often the text was read before, a number or a tensor `(batch,)`, for `ngram_dropout`.

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
        for name, given in (('labels', labels), ('counts', counts)):
            if given is not None and not return_loss:
                raise ValueError(f'{name} are for return_loss = True, which was not given')
        if check_int('logits_to_keep', logits_to_keep, 0) and return_loss:
            raise ValueError(f'logits_to_keep is for logits, got {logits_to_keep} with return_loss = True')

        batch = None
        if return_loss:
            batch = self.shift(ids, labels, getattr(state, 'position', 0))
            ids = batch.ids
        else:
            ids = check_ids('ids', ids, self.num_tokens)
        memory = self.open_memory(ids, state, return_state)

        of_inputs = return_hierarchical_token_embeds or (return_quantized_ids and self.quantize_from == 'compressed')
        if of_inputs and memory.state is None and self.arrangement == 'parallel':
            # nothing but the compressors need run
            inputs, _ = compress_all(self, embed(self, ids, memory, readings), memory)
            return quantize(self, inputs) if return_quantized_ids else inputs
        if return_hierarchical_embeds or return_logits_and_embeds or return_contributions:
            ends = None
        else:
            ends = self.ends if return_loss or return_quantized_ids else frozenset(self.predict_from)
        request = Request(self.silent, not ablate_hierarchical_merge, [] if return_contributions else None, ends)
        read = self.read(ids, memory, request, readings)

        output: tuple[Any, ...]
        if batch is not None:
            output = self.losses(read, batch, counts)
        elif return_hierarchical_token_embeds:
            output = (read.inputs,)
        elif return_hierarchical_embeds:
            output = (read.tokens,)
        elif return_quantized_ids:
            output = (quantize(self, read.inputs if self.quantize_from == 'compressed' else read.tokens),)
        else:
            output = (chain(read.predict_from[:, -logits_to_keep:], self.to_logits),)
            if return_logits_and_embeds:
                output += (read.tokens,)
            elif return_contributions:
                output += (read.contributions,)
        if return_state:
            output += (read.state,)
        return output if len(output) > 1 else output[0]

    def inspect(self, ids: Tensor, *, state: State | None = None, return_state: bool = False) -> Read:
        """All that a pass over ids `(batch, n)` computes, up to the logits, as one `Read`.

        `model.to_logits(read.predict_from)` are the logits. `state` and `return_state` are those of `forward`, and it
        raises the same errors.
        """
        ids = check_ids('ids', ids, self.num_tokens)
        memory = self.open_memory(ids, state, return_state)
        return self.read(ids, memory, Request(self.silent, contributions=[]))

    def read(self, ids: Tensor, memory: Memory, request: Request, readings: Tensor | float | None = None) -> Read:
        """Runs the model on checked ids, up to the logits."""
        if memory.state is not None and not torch.is_grad_enabled():
            memory.state.consume()
        embeds = embed(self, ids, memory, readings)
        outputs = arrangement_of(self).run(self, embeds, memory, request)
        tokens = [norm(x) for norm, x in zip(self.norms, outputs.tokens, strict=True)]

        members = [self.levels[i] for i in self.predict_from]
        predict_from, last = concat_levels(
            [tokens[i] for i in self.predict_from],
            [level.stride for level in members],
            memory.merge(-1),
            memory.position,
        )
        memory.put_merge(-1, last)
        ablated = [k for k, level in enumerate(members) if level.compression in request.ablated]
        return Read(
            embeds=embeds,
            inputs=outputs.inputs,
            tokens=tokens,
            predict_from=zero_columns(predict_from, [level.dim for level in members], ablated),
            codes=outputs.codes,
            pondered=outputs.pondered,
            # a copy: layers that are recomputed append again
            contributions=list(request.contributions or ()),
            state=memory.next_state(ids.shape[1]),
        )

    # objectives

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each part of the loss, by the names of `LossParts.named`."""
        return {each.name: each.weight for each in self.objectives}

    def shift(self, ids: Tensor, labels: Tensor | None, position: int = 0) -> Batch:
        """The checked ids to read and their labels. Without labels, these are the ids shifted by one."""
        ids = check_ids('ids', ids, self.num_tokens)
        if labels is None:
            if ids.shape[1] < 2:
                raise ValueError(f'ids must have at least 2 tokens to predict one from another, got {ids.shape[1]}')
            ids, labels = ids[:, :-1], ids[:, 1:]
        else:
            labels = check_ids('labels', labels, self.num_tokens, also=self.ignore_index)
            if labels.shape != ids.shape:
                raise ValueError(f'labels must have the shape of ids {tuple(ids.shape)}, got {tuple(labels.shape)}')
        return Batch(ids, labels, position, self.ignore_index, self.recon_ignore_index)

    def losses(self, read: Read, batch: Batch, counts: Tensor | None) -> tuple[Tensor, LossParts]:
        """The loss, a scalar, and its parts."""
        given: Sequence[Sequence[Tensor] | None] = [None] * len(self.objectives)
        if counts is not None:
            given = split_counts(self.objectives, counts)
        losses = {
            each.name: each.loss(self, read, batch, own) for each, own in zip(self.objectives, given, strict=True)
        }
        return total_loss(self.objectives, losses, self.levels)

    def count_targets(self, ids: Tensor, labels: Tensor | None = None, *, position: int = 0) -> Tensor:
        """The number of targets that each part of the loss averages over: `(counts,)`, int64.

        ids `(batch, n)` and labels are those of `forward`. `position` is that of the state which they will be read
        with. To train on several batches as on one, on several devices or one after the other, sum their counts and
        pass the sum as `counts` to each call: their losses then sum to the loss of one large batch, however unevenly
        targets are ignored.
        """
        batch = self.shift(ids, labels, position)
        return torch.stack([count for each in self.objectives for count in each.counts(each.targets(batch))])
