"""What the command lines take, and what they write, whatever the terminal can show and whoever reads it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
from dataclasses import dataclass
from typing import IO, Any

# the exit code of a process that nobody reads from any more
UNREAD = 128 + getattr(signal, 'SIGPIPE', 13)


@dataclass(frozen=True)
class Number:
    """A number on the command line, from `least` to `most`."""

    kind: type
    least: float
    most: float

    @property
    def __name__(self) -> str:
        # what argparse calls it where the text is no number
        return self.kind.__name__

    def __call__(self, text: str) -> Any:
        value = self.kind(text)
        # nan is in no range
        if not self.least <= value <= self.most:
            raise argparse.ArgumentTypeError(f'must be from {self.least:g} to {self.most:g}, got {text}')
        return value


def prepare() -> None:
    """Has characters that the terminal cannot show written as escapes, where Python would raise."""
    for name in ('stdout', 'stderr'):
        stream: Any = getattr(sys, name)
        if stream is None:
            # closed by whoever began the process
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def printable(text: str) -> str:
    """`text` as UTF-8 can hold it.

    Python reads the name of a file as text with surrogates for bytes that the locale does not know. These bytes are
    read as UTF-8 here, and written as escapes where they are none.
    """
    try:
        raw = text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:
        # surrogates that stand for no byte
        raw = text.encode('utf-8', 'backslashreplace')
    return raw.decode('utf-8', 'backslashreplace')


def unread(error: OSError) -> bool:
    """Whether a write failed since its reader is gone: `| head -1`, or a terminal that was closed."""
    return error.errno in (errno.EPIPE, errno.EIO)


def abandon(stream: IO[str]) -> None:
    """Sends what is still written to `stream` nowhere, or Python would fail on it when it ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        # not a file of the system
        pass
