"""What each part of the cpu preset is worth: bits per byte at equal time with that part left out.

python benchmarks/recipe.py --data enwiki-articles.xml.bz2

Writes recipe.json run by run, and goes on from it; --report makes the table and the picture of what it holds. How runs
are compared: paced.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import paced
from resolutions import BATCH, LENGTH, flat

PRESET = paced.of_preset('cpu')
DEFAULT = 'the preset'


def trained(**changes: Any) -> dict[str, Any]:
    return {'train': {**PRESET['train'], **changes}}


# what stands in the place of what is left out
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paced.add_arguments(parser, seeds=2, minutes=2.5, options=OPTIONS)
    args = parser.parse_args(argv)
    options = {name: {**PRESET, **changes} for name, changes in OPTIONS.items()}
    held = paced.run_all(args, options, DEFAULT, args.out / 'recipe.json', length=LENGTH, batch=BATCH)
    paced.draw(args.out / 'recipe.png', held, DEFAULT)
    print('\n'.join(paced.table(held, OPTIONS, DEFAULT)))


if __name__ == '__main__':
    main()
