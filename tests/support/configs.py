"""Random configurations and small models for tests."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.boundaries import Surprise
from simple_hierarchical_transformer.levels import COMPRESSORS, Level
from simple_hierarchical_transformer.memory import State
from simple_hierarchical_transformer.ops.pattern_attention import PATTERNS

SEQ_LEN = 48
# small models of one level, of three levels, and of two levels with a stride
SMALL: dict[str, Any] = dict(num_tokens=11, dim=8, depth=2, seq_len=SEQ_LEN, dim_head=4, heads=2)
THREE: dict[str, Any] = dict(SMALL, hierarchies=(1, 2, 8), hierarchical_stride=(1, 1, 4), window_sizes=(4, None, 3))
STRIDED: dict[str, Any] = dict(SMALL, hierarchies=(1, 4), hierarchical_stride=(1, 4), window_sizes=(4, None))
TWO_LEVELS: dict[str, Any] = dict(
    SMALL, dim=(8, 12), hierarchies=(1, 4), hierarchical_stride=(1, 2), window_sizes=(4, None), ignore_index=-1
)
# three levels of different widths, given out of order
UNEVEN: dict[str, Any] = dict(
    SMALL, dim=(8, 12, 8), heads=(2, 1, 2), ff_mult=2, hierarchies=(1, 8, 4), hierarchical_stride=(1, 4, 2),
    window_sizes=(3, None, 2), ignore_index=-1, recon_ignore_index=-1,
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draws constructor arguments of a small model. Every kind of option can appear."""
    hierarchies = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3, unique=True))
    count = len(hierarchies)

    strides = [draw(st.sampled_from([s for s in (1, 2, 4, 8) if s <= c])) for c in hierarchies]
    predict_all = draw(st.booleans())
    # the level that predicts has stride 1
    fine = draw(st.integers(0, count - 1))
    arrangement = draw(st.sampled_from(['hourglass', 'parallel']))
    if arrangement == 'hourglass':
        fine = hierarchies.index(min(hierarchies))
    strides[fine] = 1
    if arrangement == 'hourglass':
        order = sorted(range(count), key=hierarchies.__getitem__)
        for finer, coarser in pairwise(order):
            strides[coarser] = max(strides[coarser], strides[finer])
    placed = draw(placements(hierarchies, strides)) if arrangement == 'hourglass' and count > 1 else {}
    rules = placed.get('boundaries', (None,) * count)
    strides = [1 if rule else stride for rule, stride in zip(rules, strides, strict=True)]

    def each(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(values, st.tuples(*[values] * count)))

    def either(*settings: dict[str, Any]) -> dict[str, Any]:
        """Draws one group of settings, or none in half of the examples, so that plain models are tested too."""
        return draw(st.one_of(st.just({}), st.sampled_from(settings)))

    extra: dict[str, Any] = placed
    if arrangement == 'parallel':
        receivers = draw(st.lists(st.sampled_from(hierarchies), unique=True))
        extra |= either(
            {'merge_into': 'all'}, {'merge_into': (hierarchies[fine], *set(receivers) - {hierarchies[fine]})}
        )
    if arrangement == 'parallel' and max(hierarchies) > 1:
        extra |= either({'autoencoder': True})
    if 'autoencoder' not in extra:
        extra |= {'compressor': each(st.sampled_from(COMPRESSORS))}
        if isinstance(extra['compressor'], tuple):
            kinds = zip(extra['compressor'], rules, strict=True)
            extra['compressor'] = tuple('conv' if rule else kind for kind, rule in kinds)
    if count > 1:
        nested = sum(map(bool, rules)) > 1
        extra |= either(
            {'merge': 'linear'},
            *({'merge': 'attention', 'merge_window': window} for window in ((0,) if nested else (0, 2))),
            *([{'merge': 'skip'}] if arrangement == 'hourglass' else []),
        )
        alike = dict(dim=8, dim_head=2, heads=2, ff_mult=1)
        shared = {'share_feed_forward': True, **alike}
        windows = [{'share_attention': True, 'window_sizes': window, **alike} for window in (None, 3, 'auto')]
        extra |= either(shared, *windows, *(shared | window for window in windows))
    if 'share_attention' not in extra:
        # only mixers whose outputs do not depend on later tokens even by rounding
        extra |= either(
            {'mixer': each(st.sampled_from(['attention', 'gateloop', 'simple-gateloop']))},
            {'mixer_kwargs': {'kv_heads': 1}},
            {'mixer_kwargs': {'qk_norm': True}, 'mixer': 'attention'},
            {
                'mixer_kwargs': {
                    'pattern': draw(st.sampled_from(PATTERNS)),
                    'pattern_mode': draw(st.sampled_from(['interleave', 'union'])),
                    'stride': draw(st.integers(1, 7)),
                },
                'window_sizes': None,
            },
        )
    extra |= either(
        {'residual': 'gru'}, {'ff_chunks': 2}, *([{'reversible': True}] if arrangement == 'parallel' else [])
    )
    if extra.get('mixer_kwargs', {}).get('pattern_mode') != 'interleave':
        extra |= either(
            {'share_layers': True},
            *(
                [{'share_layers': True, 'halting': 'act'}]
                if arrangement == 'parallel' and 'reversible' not in extra
                else []
            ),
        )
    if arrangement == 'hourglass' and 'share_layers' not in extra:
        extra |= {'depth': each(st.integers(1, 3))}
    orders = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True))
    rows = draw(st.sampled_from([2, 64]))
    extra |= either(
        {'ngrams': tuple(orders), 'ngram_rows': rows}, {'word_ngrams': (1, 3), 'num_tokens': 256, 'ngram_rows': rows}
    )
    extra |= either(
        {'recall': tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2, unique=True)))},
        {'word_recall': (1, 2), 'num_tokens': 256},
    )
    extra |= either({'ff_activation': draw(st.sampled_from(['relu2', 'swiglu']))}, {'zero_init': True})
    extra |= either(
        {'prophet_loss_weight': each(st.sampled_from([0.0, 0.2]))},
        {
            'quantized_loss_weight': each(st.sampled_from([0.0, 0.2])),
            'quantize_from': draw(st.sampled_from(['compressed', 'output'])),
            'quantizer_codebooks': draw(st.integers(1, 2)),
            'quantizer_codebook_size': 5,
            'quantizer_dim': 3,
        },
    )

    return (
        dict(
            num_tokens=11,
            dim=each(st.sampled_from([4, 7, 8])),
            depth=draw(st.integers(1, 2)),
            seq_len=SEQ_LEN,
            dim_head=each(st.sampled_from([2, 4])),
            heads=each(st.integers(1, 2)),
            ff_mult=each(st.sampled_from([1, 2.5])),
            hierarchies=tuple(hierarchies),
            hierarchical_stride=tuple(strides),
            window_sizes=each(st.sampled_from([None, 0, 1, 3, 6, 'auto'])),
            hierarchy_merge_all=arrangement == 'parallel' and 'merge_into' not in extra and draw(st.booleans()),
            predict_hierarchy=hierarchies[fine],
            predict_use_all_hierarchy=predict_all,
            recon_loss_weight=draw(st.sampled_from([0.0, 0.1])),
            next_latent_loss_weight=each(st.sampled_from([0.0, 0.25])),
            next_latent_loss_type=draw(st.sampled_from(['mse_and_cosine_sim', 'mse', 'smooth_l1'])),
            num_rollouts=draw(st.integers(1, 3)),
            dynamic_rollout_loss_weight=draw(st.booleans()),
            detach_summaries=draw(st.booleans()),
            dynamics_num_layers=draw(st.integers(1, 3)),
            ignore_index=draw(st.sampled_from([0, -1])),
            recon_ignore_index=draw(st.sampled_from([0, -1])),
            attn_backend=draw(st.sampled_from(['auto', 'local-attention'])),
            arrangement=arrangement,
        )
        | extra
    )


@st.composite
def placements(draw: st.DrawFn, hierarchies: list[int], strides: list[int]) -> dict[str, Any]:
    """Draws the options of placed levels of an hourglass, or none in a third of the examples."""
    order = sorted(range(len(hierarchies)), key=hierarchies.__getitem__)
    if not draw(st.integers(0, 2)):
        return {}
    first = draw(st.integers(1, len(order) - 1))
    options: dict[str, list[Any]] = dict(
        boundaries=[None] * len(order), downsample=['token'] * len(order), upsample=['repeat'] * len(order),
        max_piece=[None] * len(order),
    )  # fmt: skip
    for place in range(first, len(order)):
        i = order[place]
        rules = ['every', 'learned', 'surprise', 'rise', 'sentences']
        if place == first and strides[order[place - 1]] == 1:
            rules.append('words')
        rule = options['boundaries'][i] = draw(st.sampled_from(rules))
        options['downsample'][i] = draw(st.sampled_from(['token', 'attention']))
        ways = ['repeat', 'boundary', 'offset', *(['smooth'] if rule == 'learned' else [])]
        options['upsample'][i] = draw(st.sampled_from(ways))
        options['max_piece'][i] = draw(st.sampled_from([None, 8]))
    weights = dict(
        ratio_loss_weight=draw(st.sampled_from([0.0, 0.05])), surprise_loss_weight=draw(st.sampled_from([0.0, 0.5]))
    )
    of_bytes = {'num_tokens': 256} if {'words', 'sentences'} & {*options['boundaries']} else {}
    return {name: tuple(values) for name, values in options.items()} | weights | of_bytes


def level(
    compression: int = 1, stride: int = 1, dim: int = 6, window: int | None = None, compressor: str = 'conv'
) -> Level:
    """A level with two heads of 4 channels."""
    return Level(compression, stride, dim, 4, 2, 2, window, compressor=compressor)


def build(config: dict[str, Any], seed: int = 0) -> HierarchicalTransformer:
    """Builds a float64 model and moves every parameter away from its initial zeros and ones."""
    torch.manual_seed(seed)
    # the model gets its own copies of modules among the arguments
    model = HierarchicalTransformer(**deepcopy(config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    let_surprise_cut(model)
    return model


@torch.no_grad()
def let_surprise_cut(model: HierarchicalTransformer) -> None:
    """Sets thresholds of 'surprise' and 'rise' that two in five tokens exceed. Training mode does not move them."""
    rules = [rule for rule in model.boundaries.values() if isinstance(rule, Surprise)]
    if not rules:
        return

    def set_threshold(rule: Any, args: tuple[Tensor, ...]) -> None:
        x, _, index = args
        entropy = rule.entropy(x)
        measure = entropy[:, 1:] - entropy[:, :-1] if rule.rise else entropy[:, 1:]
        # between two values: a tie would be decided by rounding
        rule.threshold.copy_(measure[index > 0].quantile(0.6) + 1e-5)

    # inner rules see the pieces of outer ones
    hooks = [rule.register_forward_pre_hook(set_threshold) for rule in rules]
    model(torch.randint(0, min(model.num_tokens, 128), (4, min(model.seq_len, 40))))
    for rule, hook in zip(rules, hooks, strict=True):
        hook.remove()
        rule.eval()


def in_chunks(model: HierarchicalTransformer, ids: Tensor, splits: list[int]) -> tuple[Tensor, State]:
    """Reads ids in chunks whose lengths cycle through `splits`. Returns the logits and the last state."""
    outs, state, at, turn = [], None, 0, 0
    while at < ids.shape[1]:
        chunk = ids[:, at : at + splits[turn % len(splits)]]
        out, state = model(chunk, state=state, return_state=True)
        outs.append(out)
        at, turn = at + chunk.shape[1], turn + 1
        assert state.position == at
    return torch.cat(outs, dim=1), state


def loss_of_a_copy(model: HierarchicalTransformer, steps: int) -> Tensor:
    """Trains a model to repeat the first of 22 ids at the end, beyond a fine window. Returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = torch.randint(1, 8, (32, 22))
        ids[:, -1] = ids[:, 0]
        labels = torch.zeros_like(ids)
        labels[:, -2] = ids[:, -1]
        loss, _ = model(ids, return_loss=True, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss
