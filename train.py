"""Trains a byte-level hierarchical transformer.

python train.py                                       enwik8, or the Python standard library where it is not available
python train.py --data notes.txt --minutes 30         any file, folder or glob, plain or compressed
python train.py --data a.txt=0.7 b.jsonl=0.3          several sources with weights
python train.py --segment-length 128                  short segments that remember the ones before
python train.py --resume                              continue the run that stopped last
python train.py --resume runs/x --minutes 20          train a finished run longer: 20 minutes in all
python train.py --dry-run                             print what a run would cost
python train.py --eval runs/x/final --split test      score a saved model
"""

from __future__ import annotations

from pathlib import Path

from simple_hierarchical_transformer.terminal import prepare
from simple_hierarchical_transformer.training.progress import Workspace
from simple_hierarchical_transformer.training.run import execute
from simple_hierarchical_transformer.training.settings import parse_args

# downloads go to data/ and runs to runs/, beside this file
WORKSPACE = Workspace(Path(__file__).resolve().parent)


def main(argv: list[str] | None = None) -> None:
    prepare()
    execute(parse_args(argv, __doc__), WORKSPACE)


if __name__ == '__main__':
    main()
