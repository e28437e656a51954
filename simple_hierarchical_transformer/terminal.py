"""Numbers on command lines, and output that works on any terminal and in any pipe."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
from dataclasses import dataclass
from typing import IO, Any

# the exit code of a process whose output was closed
UNREAD = 128 + getattr(signal, 'SIGPIPE', 13)


@dataclass(frozen=True)
class Number:
    """A number on the command line, from `least` to `most`."""

    kind: type
    least: float
    most: float

    @property
    def __name__(self) -> str:
        # argparse shows this name in errors
        return self.kind.__name__

    def __call__(self, text: str) -> Any:
        value = self.kind(text)
        # this comparison is also false for nan
        if not self.least <= value <= self.most:
            raise argparse.ArgumentTypeError(f'must be from {self.least:g} to {self.most:g}, got {text}')
        return value


def prepare() -> None:
    """Makes stdout and stderr write escapes for characters that the terminal cannot show. Python would raise."""
    for name in ('stdout', 'stderr'):
        stream: Any = getattr(sys, name)
        if stream is None:
            # the parent process closed this stream
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def printable(text: str) -> str:
    """Converts a text to one that UTF-8 can encode.

    In file names, Python represents bytes that the locale cannot decode by surrogates. This function decodes these
    bytes as UTF-8, and writes escapes for invalid ones.
    """
    try:
        raw = text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:
        # surrogates that do not represent a byte
        raw = text.encode('utf-8', 'backslashreplace')
    return raw.decode('utf-8', 'backslashreplace')


def unread(error: OSError) -> bool:
    """Whether a write failed because its reader has ended, such as `| head -1` or a closed terminal."""
    return error.errno in (errno.EPIPE, errno.EIO)


def abandon(stream: IO[str]) -> None:
    """Redirects `stream` to the null device, so that Python does not fail on it at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        # the stream has no file descriptor
        pass
