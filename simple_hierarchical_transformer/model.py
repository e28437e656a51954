"""The model: embed, compress, run the levels, logits and losses.

With `arrangement = 'parallel'`, levels run as (block of each level, merge) x depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .ablation import Ablatable, Ablations
from .accounting import Accountable
from .arrangements import Request, arrangement_of, compress_all
from .block import HierarchicalBlock
from .boundaries import OF_SURPRISE
from .calls import TypedModule
from .checks import check_int
from .compressors import Autoencoder, Compressor
from .config import Config
from .embeddings import Contexts, NGramEmbedding, RecallEmbedding, embed
from .generation.methods import Generative
from .generation.prompts import check_ids
from .halting import AdaptiveHalting
from .layers import build_layers, build_merges, build_placements, make_buffers, share_between_levels
from .memory import Memory, State
from .merges import Merge, concat_levels, zero_columns
from .objectives import Batch, LossParts, build_objectives, quantize, quantized_tokens, split_counts, total_loss
from .ops.linear import begin_at_zero, chain
from .options import describe, list_per_level, takes_options
from .pieces import spread_placed
from .pretrained import Pretrained
from .published import adapt_published_keys
from .read import Read
from .segmentation import Segmenting
from .stateful import Stateful, layout_of
from .summary import summary


class HierarchicalTransformer(
    Ablatable,  # ablate
    Accountable,  # roles and costs of weights, for training
    TypedModule,  # nn.Module, with the types of calls
    Stateful,  # initial_state, checks of states
    Generative,  # generate, stream, score
    Segmenting,  # pieces
    Pretrained,  # save_pretrained, from_pretrained
    library_name='simple-hierarchical-transformer',
    license='mit',
    pipeline_tag='text-generation',
    tags=['byte-level', 'hierarchical-transformer'],
):
    __doc__ = f"""A causal language model that reads a sequence at several resolutions at once.

    Each hierarchy level compresses the token embeddings by its factor and runs its own transformer blocks. After
    every layer a merge pools what the levels know into the level that predicts the next token. With one level, the
    model is a plain GPT: `HierarchicalTransformer(num_tokens = 256, dim = 512, depth = 6)`.

    These options take one value, or a tuple with one value for each level:
{list_per_level(Config)}

    Args:
{describe(Config)}

    Raises:
        ValueError: an option is not allowed, or two contradict each other. The message names them.
    """

    @takes_options(Config)
    def __init__(self, config: Config) -> None:
        super().__init__()
        levels = config.levels
        # settings that calls read; the other options only decide what is built
        self.levels = levels
        self.measured_spacing = {}
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

        # modules, roughly in the order in which a sequence passes through them

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
        # the contexts of both embeddings, so that each is hashed once
        self.contexts = Contexts.among((*config.ngrams, *config.recall), (*config.word_ngrams, *config.word_recall))
        self.autoencoder: Autoencoder | None = None
        if config.autoencoder:
            decoder_tokens = config.num_tokens if config.autoencoder_loss_weight > 0 else None
            self.autoencoder = Autoencoder(levels, dim=config.dim_embed, num_tokens=decoder_tokens)
        arrangement = arrangement_of(config)
        # what each compressor reads: embeddings, a finer level's tokens, or a feature map
        sources = arrangement.sources(config) if self.autoencoder is None else self.autoencoder.sources(levels)
        recon_tokens = config.num_tokens if config.recon_loss_weight > 0 else None
        self.compressors = nn.ModuleList(
            Compressor(level, **source._asdict(), module=module, num_tokens=recon_tokens)
            for level, source, module in zip(levels, sources, config.compressor_modules, strict=True)
        )
        # of placed levels: where their tokens are, what they read, and what merges get of them
        self.boundaries, self.downsamplers, self.upsamplers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for i, parts in build_placements(config).items():
            for modules, part in zip((self.boundaries, self.downsamplers, self.upsamplers), parts, strict=True):
                if part is not None:
                    modules[str(i)] = part
        # applied to what the compressors return
        self.post_token_emb_norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)

        # `layers[number][level]`
        self.layers = build_layers(config)
        # layers that share their weights differ by these
        self.step_embeds = nn.ParameterList()
        if config.share_layers:
            self.step_embeds.extend(nn.Parameter(0.02 * torch.randn(config.layers, level.dim)) for level in levels)
        # by level: other levels have no output that halting could average
        self.halting = nn.ModuleDict()
        if config.halting is not None:
            self.halting.update({str(i): AdaptiveHalting(levels[i].dim) for i in self.predict_from})
        share_between_levels(config, self.layers)

        # cross entropy, and the auxiliary losses whose weight is above 0
        self.objectives = build_objectives(config)
        trained = [each.level for each in self.objectives if each.level is not None and each.trains_final_tokens]
        self.final_levels = frozenset((*self.predict_from, *trained))
        """The indices of the levels whose final tokens are used in training."""

        self.hierarchical_merges = nn.ModuleList(build_merges(config, arrangement.merges(config)))

        self.norms = nn.ModuleList(nn.LayerNorm(level.dim) for level in levels)
        self.to_logits = nn.Linear(sum(levels[i].dim for i in self.predict_from), config.num_tokens, bias=False)
        # the modules of objectives, by level. These exist even if they are empty
        self.latent_dynamics, self.chunk_summarizers = nn.ModuleDict(), nn.ModuleDict()
        self.to_prophet, self.to_quantized, self.quantizers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for objective in self.objectives:
            for name, module in objective.modules(config).items():
                if objective.level is None:
                    self.add_module(name, module)
                    continue
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
        """Turns weights that get no gradient into buffers, so that optimizers and DDP skip them.

        These are the last norm of a level whose final tokens no objective reads, and the weights by which the last
        merge adds to that level. They still affect the embeddings that `forward` can return. The head of a rule that
        places tokens by surprise is another, if its loss has no weight.
        """
        unread = [norm for i, norm in enumerate(self.norms) if i not in self.final_levels]
        if config.surprise_loss_weight == 0:
            unread += [
                self.boundaries[str(i)] for i, level in enumerate(self.levels) if level.boundaries in OF_SURPRISE
            ]
        last_merge_is_unshared = config.layers == 1 or not config.share_layers
        if not arrangement_of(self).nested and len(self.hierarchical_merges) and last_merge_is_unshared:
            unread += self.merge(-1).unread_modules(self.final_levels)
        for module in unread:
            make_buffers(module)

    def __repr__(self) -> str:
        """A line for each level and for each part. `nn.Module.__repr__(model)` shows all modules."""
        return summary(self)

    def block(self, layer: int, i: int) -> HierarchicalBlock:
        """The block of a layer and of level i, whose depth must exceed `layer`."""
        # a cast, since users may have wrapped it (LoRA, torch.compile)
        return cast(HierarchicalBlock, cast(nn.ModuleList, self.layers[layer])[i])

    def merge(self, k: int) -> Merge:
        """The merge after layer k. In an hourglass, the merge between the k-th finest and the next coarser level."""
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
        return_read: bool = False,
    ) -> Any:
        """Reads ids `(batch, n)` of any integer dtype and returns next-token logits `(batch, n, num_tokens)`.

        With `return_state`, the state comes last: `logits, state = model(ids, return_state = True)` reads the start
        of a sequence, `model(ids, state = state, return_state = True)` the next chunk. Chunks of any lengths give the
        same result as one pass of up to `seq_len` ids. Their total length is not limited: with a state, full attention
        of a level of compression c keeps the last `ceil(seq_len / c)` tokens of each phase, and drops older ones.

        Args:
            ids: the ids to read, each in `[0, num_tokens)`.
            return_loss: return `(loss, parts)`, a scalar and `LossParts`. Predicts `ids[:, 1:]` from `ids[:, :-1]`.
            return_hierarchical_token_embeds: return each level's tokens as its first block gets them, a list of
                `(batch, ceil(n / stride), dim)` (`Read.inputs`).
            return_hierarchical_embeds: return each level's final embeddings, likewise (`Read.tokens`).
            return_logits_and_embeds: return both logits and final embeddings.
            ablate_hierarchical_merge: skip all merges. The method `ablate` leaves out one level.
            return_quantized_ids: return the discrete ids of each level's tokens, a list of
                `(batch, ceil(n / stride), codebooks)`, or None for a level without a quantized loss.
            return_contributions: return logits, and for each merge the `Contribution` of each level. In an hourglass
                the merge of the finest levels comes first.
            labels: with `return_loss`, the targets `(batch, n)`: `labels[:, t]` is predicted from `ids[:, :t + 1]`.
                Default: `ids` shifted by one. Targets equal to `ignore_index` are skipped.
            counts: with `return_loss`, the divisors of the summed losses, as `count_targets` returns them. With the sum
                of the counts of several batches, each batch's loss is its share of their joint loss.
            state: the state after the ids read before. Without gradients, the call reuses its tensors for the state
                that it returns, so the given state is consumed: another call refuses it, also if this call fails.
                Auxiliary losses see the chunk only.
            return_state: return the state after the ids that were read, too. Required with `state`. With `return_loss`
                and without `labels`, the last id is a target only: begin the next chunk with it.
            logits_to_keep: return the logits of only the last `logits_to_keep` positions. 0 keeps all. Generation uses
                1.
            readings: how often the text was read before (full epochs), a number or a tensor `(batch,)`. It scales
                `ngram_dropout`. Default: 1.
            return_read: return the `Read` of the pass, as `inspect` does.

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
            'return_read': return_read,
        }
        if sum(map(bool, wanted.values())) > 1:
            raise ValueError(f'forward returns one thing, got {", ".join(name for name in wanted if wanted[name])}')
        if return_quantized_ids and not self.quantizers:
            raise ValueError('return_quantized_ids needs a quantized_loss_weight above 0, which no level has')
        for name, given in (('labels', labels), ('counts', counts)):
            if given is not None and not return_loss:
                raise ValueError(f'{name} are for return_loss = True, which was not given')
        check_int('logits_to_keep', logits_to_keep, 0)
        for name, flag in wanted.items():
            if logits_to_keep and flag and name not in ('return_logits_and_embeds', 'return_contributions'):
                raise ValueError(f'logits_to_keep is for logits, got {logits_to_keep} with {name} = True')

        batch = None
        if return_loss:
            # a state of a wrong type is refused below
            batch = self.make_batch(ids, labels, getattr(state, 'position', 0))
            ids = batch.ids
        else:
            ids = check_ids('ids', ids, self.num_tokens)
        memory = self.open_memory(ids, state, return_state)

        wants_inputs = return_hierarchical_token_embeds or (return_quantized_ids and self.quantize_from == 'compressed')
        if wants_inputs and memory.state is None and not arrangement_of(self).nested:
            # without a state given or asked for, only the compressors need to run
            inputs, _ = compress_all(self, embed(self, ids, memory, readings), memory)
            return quantize(self, inputs) if return_quantized_ids else inputs
        # the levels whose final tokens matter, None for all
        all_levels = return_hierarchical_embeds or return_logits_and_embeds or return_contributions or return_read
        final_levels = self.final_levels if return_loss or return_quantized_ids else frozenset(self.predict_from)
        request = Request(
            ablated=self.silent,
            merge=not ablate_hierarchical_merge,
            contributions=[] if return_contributions or return_read else None,
            final_levels=None if all_levels else final_levels,
        )
        read = self.read(ids, memory, request, readings)

        output: tuple[Any, ...]
        if batch is not None:
            output = self.losses(read, batch, counts)
        elif return_read:
            output = (read,)
        elif return_hierarchical_token_embeds:
            output = (read.inputs,)
        elif return_hierarchical_embeds:
            output = (read.tokens,)
        elif return_quantized_ids:
            output = (quantize(self, quantized_tokens(self, read)),)
        else:
            # -0 keeps all
            output = (chain(read.features[:, -logits_to_keep:], self.to_logits),)
            if return_logits_and_embeds:
                output += (read.tokens,)
            elif return_contributions:
                output += (read.contributions,)
        if return_state and not return_read:
            output += (read.state,)
        return output if len(output) > 1 else output[0]

    def inspect(self, ids: Tensor, *, state: State | None = None, return_state: bool = False) -> Read:
        """All that a pass over ids `(batch, n)` computes, up to the logits, as one `Read`.

        `model.to_logits(read.features)` are the logits. `state` and `return_state` are those of `forward`, which raises
        the same errors.
        """
        read: Read = self(ids, state=state, return_state=return_state, return_read=True)
        return read

    def read(self, ids: Tensor, memory: Memory, request: Request, readings: Tensor | float | None = None) -> Read:
        """Runs the model on checked ids, up to the logits."""
        if memory.state is not None and not torch.is_grad_enabled():
            # written in place from here on, so it is refused even if this pass fails
            memory.state.consume()
        embeds = embed(self, ids, memory, readings)
        outputs = arrangement_of(self).run(self, ids, embeds, memory, request)
        tokens = [norm(x) for norm, x in zip(self.norms, outputs.tokens, strict=True)]

        members = [self.levels[i] for i in self.predict_from]
        # each position reads a level's latest token, which is repeated until the next one
        before = memory.features() or (None,) * len(members)
        columns, last = spread_placed([tokens[i] for i in self.predict_from], self.predict_from, outputs.pieces, before)
        features, after = concat_levels(
            columns, [level.stride for level in members], memory.features(), memory.position
        )
        memory.put_features(after and tuple(last.get(k, each) for k, each in enumerate(after)))
        ablated = [k for k, level in enumerate(members) if level.compression in request.ablated]
        return Read(
            embeds=embeds,
            inputs=outputs.inputs,
            tokens=tokens,
            features=zero_columns(features, [level.dim for level in members], ablated),
            codes=outputs.codes,
            pondered=outputs.pondered,
            pieces=outputs.pieces,
            # a copy: gradient checkpointing runs layers again in the backward pass, which append again
            contributions=list(request.contributions or ()),
            state=memory.next_state(ids.shape[1]),
        )

    # objectives

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each part of the loss, by the names of `LossParts.named`."""
        return {each.name: each.weight for each in self.objectives}

    def make_batch(self, ids: Tensor, labels: Tensor | None, position: int = 0) -> Batch:
        """Checks ids and labels. Without labels, `ids[:, :-1]` are read and `ids[:, 1:]` are the labels."""
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
        """The weighted sum of the objectives' losses, a scalar, and its parts."""
        divisors: Sequence[Sequence[Tensor] | None] = [None] * len(self.objectives)
        if counts is not None:
            divisors = split_counts(self.objectives, counts)
        losses = {
            objective.name: objective.loss(self, read, batch, each)
            for objective, each in zip(self.objectives, divisors, strict=True)
        }
        return total_loss(self.objectives, losses, self.levels)

    def count_targets(self, ids: Tensor, labels: Tensor | None = None, *, position: int = 0) -> Tensor:
        """The number of targets that each part of the loss averages over: `(counts,)`, int64.

        ids `(batch, n)` and labels are those of `forward`. `position` is `state.position` of the state that is passed
        with them, 0 without one. To train on several batches as on one, on several devices or one after the other, sum
        their counts and pass the sum as `counts` to each call: their losses then sum to the loss of one large batch,
        however unevenly targets are ignored.
        """
        batch = self.make_batch(ids, labels, position)
        return torch.stack([count for each in self.objectives for count in each.counts(batch)])
