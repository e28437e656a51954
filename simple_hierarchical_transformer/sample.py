"""Text from a checkpoint, in the shell: `python -m simple_hierarchical_transformer.sample CHECKPOINT --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .model import CONFIG_FILE, HierarchicalTransformer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Goes on from a prompt with a byte-level model.')
    parser.add_argument('checkpoint', type=Path, help='a folder that save_pretrained wrote')
    parser.add_argument('--prompt', default='\n', help='text to go on from')
    parser.add_argument('--length', type=int, default=256, help='how many bytes to write')
    parser.add_argument('--temperature', type=float, default=1.0, help='0 takes the likeliest byte each time')
    parser.add_argument('--filter-thres', type=float, default=0.9, help='share of the bytes that is never drawn')
    parser.add_argument('--seed', type=int, help='for the same text again')
    args = parser.parse_args(argv)

    if not (args.checkpoint / CONFIG_FILE).is_file():
        parser.error(f'{args.checkpoint} is no saved model: there is no {CONFIG_FILE} in it')
    if args.seed is not None:
        torch.manual_seed(args.seed)

    model = HierarchicalTransformer.from_pretrained(args.checkpoint)
    prompt = torch.tensor([list(args.prompt.encode())], dtype=torch.long)
    try:
        new = model.generate(prompt, args.length, temperature=args.temperature, filter_thres=args.filter_thres)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(args.prompt + bytes(new[0].tolist()).decode('utf-8', errors='replace') + '\n')


if __name__ == '__main__':
    main()
