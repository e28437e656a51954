"""How well each mixer predicts text: bits per byte after the same training time.

    python benchmarks/quality/mixers.py --data enwiki-articles.xml.bz2

Writes mixers.json after each run, and continues from it. `--report` only makes the table and the figure again. The
docstring of paced.py describes the method. What mixers cost: benchmarks/speed/mixer_costs.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # this checkout in the place of the folder of the script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common.mixers import BASE, DEFAULT, OPTIONS
from benchmarks.common.results import new_parser, write_lines
from benchmarks.quality import comparison, paced

LENGTH, BATCH = 1024, 1


def report(held: dict[str, Any], folder: Path) -> None:
    lines = [
        '# What each mixer is worth',
        '',
        comparison.protocol(held, 'mixers.py', BASE, DEFAULT, length=LENGTH, batch=BATCH),
        '',
        *comparison.table(held, OPTIONS, DEFAULT),
        '',
        '![difference of each mixer to attention](mixers.png)',
    ]
    write_lines(folder / 'mixers.md', lines)
    comparison.draw(folder / 'mixers.png', held, DEFAULT)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    paced.add_arguments(parser, seeds=2, minutes=1.0, options=OPTIONS)
    args = paced.parse(parser, argv, 'mixers')
    options = {name: {**BASE, **changes} for name, changes in OPTIONS.items()}
    held = paced.run_all(args, options, DEFAULT, args.out / 'mixers.json', length=LENGTH, batch=BATCH)
    report(held, args.out)


if __name__ == '__main__':
    main()
