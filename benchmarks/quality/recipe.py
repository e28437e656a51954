"""The value of each part of the cpu preset: bits per byte after the same training time without that part.

    python benchmarks/quality/recipe.py --data enwiki-articles.xml.bz2

Writes recipe.json after each run, and continues from it. `--report` only makes the table and the figure again. The
docstring of paced.py describes the method.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common.results import new_parser
from benchmarks.quality import comparison, paced
from benchmarks.quality.resolutions import BATCH, LENGTH, flat

PRESET = paced.of_preset('cpu')
DEFAULT = 'the preset'


def trained(**changes: Any) -> dict[str, Any]:
    return {'train': {**PRESET['train'], **changes}}


# each option replaces or removes one part
OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    'no n-grams': dict(ngrams=(), word_ngrams=()),
    'no n-grams of words': dict(word_ngrams=()),
    'n-grams of 2 to 4': dict(ngrams=(2, 3, 4)),
    'no recall': dict(recall=(), word_recall=()),
    'no recall of words': dict(word_recall=()),
    'recall of 4, 6 and 10': dict(recall=(4, 6, 10)),
    'AdamW at 3e-3 in place of Muon': trained(optimizer='adamw', lr=3e-3),
    'tables at the rate of matrices': trained(table_lr=PRESET['train']['lr']),
    'a cosine down to a tenth': trained(schedule='cosine'),
    'averaged weights': trained(ema=0.99),
    'no norm of queries and keys': dict(mixer_kwargs=None),
    'GELU': dict(ff_activation='gelu'),
    'random beginnings': dict(zero_init=False),
    'convolutional compressor': dict(compressor='conv'),
    'merge by a feed-forward': dict(merge='concat'),
    'levels side by side': dict(arrangement='parallel', depth=2),
    'fine level with full attention': dict(window_sizes=None),
    'reconstruction and next-latent losses': dict(recon_loss_weight=0.1, next_latent_loss_weight=0.25),
    'one level': flat(),
}


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    paced.add_arguments(parser, seeds=2, minutes=2.5, options=OPTIONS)
    args = paced.parse(parser, argv, 'recipe')
    options = {name: {**PRESET, **changes} for name, changes in OPTIONS.items()}
    held = paced.run_all(args, options, DEFAULT, args.out / 'recipe.json', length=LENGTH, batch=BATCH)
    comparison.draw(args.out / 'recipe.png', held, DEFAULT)
    print('\n'.join(comparison.table(held, OPTIONS, DEFAULT)))


if __name__ == '__main__':
    main()
