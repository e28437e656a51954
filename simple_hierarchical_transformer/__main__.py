"""The command `simple-hierarchical-transformer`, also run as `python -m simple_hierarchical_transformer`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .terminal import prepare

MODULE = 'python -m simple_hierarchical_transformer'
COMMANDS = {
    'train': 'train a byte-level model, or resume a run; data goes to ./data and runs to ./runs',
    'plan': 'print what a run would cost without starting it',
    'eval': 'score a saved model on a split of its data, in bits per byte',
    'sample': 'continue a text with a saved model',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names.

    Args:
        argv: the command and its arguments. By default, those of the process.
    """
    prepare()
    argv = sys.argv[1:] if argv is None else list(argv)
    program = Path(sys.argv[0]).name
    if program == '__main__.py':
        program = MODULE
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f'{program} COMMAND ...',
        description='Trains and runs byte-level hierarchical transformers.\n\ncommands:\n'
        + '\n'.join(f'  {name:{width}}{text}' for name, text in COMMANDS.items()),
        epilog=f'{program} COMMAND --help lists the options of a command.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help='one of the commands above')
    command, rest = parser.parse_args(argv[:1]).command, argv[1:]
    prog = f'{program} {command}'

    # imported here so that --help is fast
    if command == 'sample':
        from .sample import main as sample

        sample(rest, prog)
        return
    from .training.progress import Workspace
    from .training.run import execute
    from .training.settings import parse_args, parse_eval_args

    if command == 'eval':
        args = parse_eval_args(rest, COMMANDS[command], prog)
    else:
        args = parse_args(rest, COMMANDS[command], prog, task='plan' if command == 'plan' else 'train')
    execute(args, Workspace(Path(), f'{program} train', f'{program} eval', f'{program} sample'))


if __name__ == '__main__':
    main()
