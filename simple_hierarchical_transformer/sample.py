"""Prints text from a saved model as it is generated:

`python -m simple_hierarchical_transformer.sample CHECKPOINT --prompt TEXT`
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from pathlib import Path

import torch

from .checks import MOST
from .config_file import CONFIG_FILE
from .generation.prompts import BYTE_VOCABULARIES
from .model import HierarchicalTransformer
from .segmentation import MARK, Marker, PieceReader, depths_of
from .terminal import UNREAD, Number, abandon, prepare, unread


def main(argv: list[str] | None = None, prog: str = 'python -m simple_hierarchical_transformer.sample') -> None:
    prepare()
    parser = argparse.ArgumentParser(prog=prog, description='Continues a prompt, byte by byte.')
    parser.add_argument('checkpoint', type=Path, help='folder of a saved model')
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument('--prompt', help='text to continue (default: a new line)')
    prompt.add_argument('--prompt-file', type=Path, help='file with the text to continue')
    lengths = Number(int, 0, MOST)
    parser.add_argument('--length', type=lengths, default=256, help='the maximum number of bytes to write')
    parser.add_argument(
        '--stop', action='append', metavar='TEXT', help='stop after this text; may be given several times'
    )
    parser.add_argument('--temperature', type=float, default=1.0, help='0 always takes the most likely byte')
    parser.add_argument(
        '--filter-thres', type=float, default=0.9, help='share of the least likely bytes, which are never drawn'
    )
    parser.add_argument('--top-k', type=int, help='draw from the K most likely bytes')
    parser.add_argument(
        '--top-p', type=float, help='draw from the most likely bytes that together reach this probability'
    )
    parser.add_argument(
        '--min-p', type=float, help='draw from bytes with at least this share of the highest probability'
    )
    parser.add_argument(
        '--repetition-penalty', type=float, default=1.0, help='above 1, bytes that have occurred become less likely'
    )
    parser.add_argument(
        '--show-boundaries',
        action='store_true',
        help=f'mark the end of each piece of the finest placed level with {MARK}, of the next with {MARK * 2}, and so '
        'on; takes twice the time',
    )
    # the range of torch.Generator.manual_seed
    seeds = Number(int, -(2**63), 2**64 - 1)
    parser.add_argument('--seed', type=seeds, help='random seed, for a reproducible text')
    args = parser.parse_args(argv)

    try:
        if not (args.checkpoint / CONFIG_FILE).is_file():
            raise ValueError(f'{args.checkpoint} is not a saved model: there is no {CONFIG_FILE} in it')
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
        model = HierarchicalTransformer.from_pretrained(args.checkpoint, map_location=str(device))
        if model.num_tokens not in BYTE_VOCABULARIES:
            raise ValueError(f'{args.checkpoint} has num_tokens = {model.num_tokens}: it is not a model of bytes')

        text = (
            args.prompt_file.read_bytes()
            if args.prompt_file
            else os.fsencode('\n' if args.prompt is None else args.prompt)
        )
        stream = model.stream(
            text,
            args.length,
            temperature=args.temperature,
            filter_thres=args.filter_thres,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            stop=[os.fsencode(each) for each in args.stop or ()],
            repetition_penalty=args.repetition_penalty,
            generator=None if args.seed is None else torch.Generator(device).manual_seed(args.seed),
        )

        writer: Text | MarkedText = MarkedText(model) if args.show_boundaries else Text()
        sys.stdout.write(writer.show(text))
        start, count, first = time.perf_counter(), 0, 0.0
        try:
            for new in stream:
                sys.stdout.write(writer.show(new))
                sys.stdout.flush()
                count += len(new)
                first = first or time.perf_counter() - start
        except KeyboardInterrupt:
            pass
        spent = time.perf_counter() - start - first
        sys.stdout.write(writer.finish() + '\n')
        sys.stdout.flush()
        # the time to the first byte is the time to read the prompt
        rate = f', {(count - 1) / spent:.0f} per second' if count > 1 else ''
        sys.stderr.write(f'{count} bytes{rate}, the first after {first:.2f} s\n')
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if not unread(error):
            sys.exit(f'error: {error}')
        abandon(sys.stdout)
        abandon(sys.stderr)
        sys.exit(UNREAD)
    except (ValueError, RuntimeError) as error:
        sys.exit(f'error: {error}')


class Text:
    """Decodes bytes as they come. A character may arrive in parts. Bytes that are not UTF-8 are shown as escapes."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='backslashreplace')

    def show(self, new: bytes) -> str:
        """The characters that end in the next bytes."""
        return self.decoder.decode(new)

    def finish(self) -> str:
        """What remains, after the last byte."""
        return self.decoder.decode(b'', final=True)


class MarkedText:
    """Like `Text`, with marks at the ends of pieces. They have colours on a terminal, unless NO_COLOR is set."""

    def __init__(self, model: HierarchicalTransformer) -> None:
        self.reader = PieceReader(model)
        self.marker = Marker(colours=sys.stdout.isatty() and not os.environ.get('NO_COLOR'))
        self.finish = self.marker.finish

    def show(self, new: bytes) -> str:
        ids = torch.tensor(list(new), device=self.reader.model.token_emb.weight.device)
        return self.marker.show(new, depths_of(self.reader.read(ids)) if new else [])


if __name__ == '__main__':
    main()
