"""Progress bars on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

from .report import duration

Item = TypeVar('Item')

# seconds between two updates: on a terminal, and in a log file
LIVE, LOGGED = 0.5, 60.0


def counted(items: Iterable[Item], total: int, name: str, unit: str) -> Iterable[Item]:
    """Iterates over `items` with a progress bar."""
    return tqdm(items, total=total, desc=name, unit=unit, mininterval=LIVE if sys.stderr.isatty() else LOGGED)


class Bar:
    """A progress bar from 0 to 1 with the score, bytes per second, share of the peak and remaining time.

    Args:
        done: where the bar starts.
        flops: operations per byte. A caller may change the attribute.
        peak: operations per second that the devices could reach.
        shown: whether this process shows the bar.
    """

    def __init__(self, done: float, *, flops: float, peak: float, shown: bool) -> None:
        self.flops, self.peak = flops, peak
        self.first, self.began = done, time.monotonic()
        self.size, self.seconds = 0, 0.0
        live = sys.stderr.isatty()
        self.logs = shown and not live
        self.line, self.logged = '', self.began
        self.bar = tqdm(
            total=1.0,
            initial=done,
            disable=not (shown and live),
            mininterval=LIVE,
            bar_format='{percentage:3.0f}%|{bar:16}| {desc}',
        )

    def add(self, size: int, seconds: float) -> None:
        """Adds a step of `size` bytes that took `seconds`."""
        self.size += size
        self.seconds += seconds

    def show(self, done: float, step: int, bits: float, skipped: int, pieces: Sequence[float] = ()) -> dict[str, float]:
        """Shows the steps added since the last call, and returns their speed.

        `pieces` are the mean lengths of the pieces of placed levels in bytes.
        """
        speed = self.size / max(self.seconds, 1e-9)
        self.size, self.seconds = 0, 0.0
        share = speed * self.flops / self.peak
        left = (time.monotonic() - self.began) * max(1 - done, 0.0) / max(done - self.first, 1e-9)
        text = (
            f'step {step:,}, {bits:.3f} bits per byte, '
            + (f'pieces of {" and ".join(f"{each:.1f}" for each in pieces)} bytes, ' if pieces else '')
            + f'{speed:,.0f} bytes/s, {share:.0%} of peak, {duration(left)} left'
            + (f', {skipped:,} skipped' if skipped else '')
        )
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(max(min(done, 1.0) - self.bar.n, 0.0))
        self.line = f'{min(done, 1.0):4.0%} {text}'
        if time.monotonic() - self.logged >= LOGGED:
            self.log()
        return dict(bytes_per_second=speed, share_of_peak=share)

    def log(self) -> None:
        """Writes the last line to a log file, once."""
        if self.logs and self.line:
            try:
                print(self.line, file=sys.stderr, flush=True)
            except OSError:
                # stderr is closed
                self.logs = False
        self.line, self.logged = '', time.monotonic()

    def close(self) -> None:
        self.bar.close()
        self.log()
