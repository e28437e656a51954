"""The models of the GPU benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common.models import Settings, one_level
from benchmarks.gpu.peers import PlainTransformer
from simple_hierarchical_transformer import HierarchicalTransformer
from simple_hierarchical_transformer.training import cost
from simple_hierarchical_transformer.training.compiled import compile_blocks
from simple_hierarchical_transformer.training.settings import BYTES, PRESETS

PRESET = PRESETS['gpu']
CONTEXT, ROWS = PRESET['seq_len'], PRESET['batch_size']
WIDTH, HEAD = PRESET['model']['dim'], 64
WINDOW = PRESET['model']['window_sizes'][0]
TABLES = ('ngrams', 'word_ngrams', 'ngram_dropout', 'recall', 'word_recall')
# what H-Net, Hwang et al. 2025, arXiv 2507.07955, does with learned boundaries
HNET = dict(upsample='smooth', merge='skip')
MODES = ('eager', 'compiled', 'whole')
PLAIN = 'plain transformer'


def preset(width: int = WIDTH) -> Settings:
    """The `gpu` preset, with another width."""
    return {**PRESET['model'], 'dim': width, 'heads': width // HEAD}


def flat(window: int | None, width: int = WIDTH, depth: int | None = None) -> Settings:
    """The recipe of the preset in one level. By default it has as many layers, and so about as many parameters."""
    return one_level(preset(width), depth or sum(PRESET['model']['depth']), window)


def placed(rule: str, width: int = WIDTH, **options: Any) -> Settings:
    """The recipe of the preset with coarse tokens placed by a rule: six fine layers, and six of twice the width.

    With a coarse token for every six bytes, which is about the length of English words, a layer of the coarse level
    costs two thirds of a fine one. So the model costs about as much per byte as ten fine layers.
    """
    return dict(
        preset(width), dim=(width, 2 * width), heads=(width // HEAD, 2 * width // HEAD), depth=(6, 6),
        hierarchies=(1, 8), hierarchical_stride=1, boundaries=(None, rule), **options,
    )  # fmt: skip


def without_tables(settings: Settings) -> Settings:
    """The same model without n-grams and recall."""
    return {name: value for name, value in settings.items() if name not in TABLES}


# each function takes the width
MODELS: dict[str, Callable[[int], Settings]] = {
    'preset': preset,
    'flat, window 64': lambda width: flat(WINDOW, width),
    'flat, full': lambda width: flat(None, width),
    'words': lambda width: placed('words', width),
    'learned': lambda width: placed('learned', width, **HNET),
    PLAIN: lambda width: dict(dim=width, depth=sum(PRESET['model']['depth']), heads=width // HEAD, dim_head=HEAD),
    'preset, no tables': lambda width: without_tables(preset(width)),
    'flat, window 64, no tables': lambda width: without_tables(flat(WINDOW, width)),
    'flat, full, no tables': lambda width: without_tables(flat(None, width)),
}


def small(settings: Settings) -> Settings:
    """The same options in a toy size."""
    depth: int | tuple[int, ...] = (1,) * len(settings['depth']) if isinstance(settings['depth'], tuple) else 1
    rows = dict(ngram_rows=256) if 'ngrams' in settings else {}
    return {**settings, 'dim': 32, 'heads': 2, 'dim_head': 16, 'depth': depth, **rows}


def build(name: str, context: int, width: int = WIDTH, toy: bool = False) -> nn.Module:
    """One of MODELS on the default device. It always has the same weights."""
    settings = MODELS[name](width)
    settings = small(settings) if toy else settings
    torch.manual_seed(0)
    if name == PLAIN:
        return PlainTransformer(num_tokens=BYTES['num_tokens'], seq_len=context, **settings)
    return HierarchicalTransformer(**BYTES, seq_len=context, **settings)


def step_flops(model: nn.Module, length: int) -> float:
    """Operations of a forward and backward pass on one sequence."""
    return model.step_flops(length) if isinstance(model, PlainTransformer) else cost.step_flops(model, length)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters in tables, of which a step reads a few rows, and all other parameters."""
    tables = sum(p.numel() for name, p in model.named_parameters() if name.startswith(('ngram_emb', 'recall_emb')))
    return dict(parameters=sum(p.numel() for p in model.parameters()) - tables, table_parameters=tables)


def compile_model(model: nn.Module, how: str, mode: str, toy: bool = False) -> Any:
    """The model compiled for one shape.

    `how='compiled'` compiles each block, as train.py does, and 'whole' compiles the model as one graph. A toy is traced
    but not compiled, which is faster.
    """
    settings: dict[str, Any] = dict(dynamic=False, **(dict(backend='eager') if toy else dict(mode=mode)))
    if how == 'compiled' and isinstance(model, HierarchicalTransformer):
        compile_blocks(model, **settings)
        return model
    return torch.compile(model, **settings)
