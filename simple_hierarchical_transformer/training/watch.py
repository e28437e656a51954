"""How a run gets on, on the terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .report import duration


class Bar:
    """A bar from 0 to 1 with the score, bytes a second, the share of the peak, and the time left.

    `flops` are those of a byte, `peak` is what the devices could do in a second.
    """

    def __init__(self, done: float, *, flops: float, peak: float, shown: bool) -> None:
        self.flops, self.peak = flops, peak
        self.first, self.began = done, time.monotonic()
        self.size, self.seconds = 0, 0.0
        self.bar = tqdm(
            total=1.0,
            initial=done,
            disable=not shown,
            # a file of what was said should not fill up with bars
            mininterval=0.5 if sys.stderr.isatty() else 60,
            bar_format='{percentage:3.0f}%|{bar:16}| {desc}',
        )

    def add(self, size: int, seconds: float) -> None:
        """A step of that many bytes took so long."""
        self.size += size
        self.seconds += seconds

    def show(self, done: float, step: int, bits: float, skipped: int) -> dict[str, float]:
        """Shows the steps added since the last time, and returns their speed."""
        speed = self.size / max(self.seconds, 1e-9)
        self.size, self.seconds = 0, 0.0
        share = speed * self.flops / self.peak
        left = (time.monotonic() - self.began) * max(1 - done, 0.0) / max(done - self.first, 1e-9)
        self.bar.set_description_str(
            f'step {step:,}, {bits:.3f} bits per byte, {speed:,.0f} bytes/s, {share:.0%} of peak, {duration(left)} left'
            + (f', {skipped:,} skipped' if skipped else ''),
            refresh=False,
        )
        self.bar.update(max(min(done, 1.0) - self.bar.n, 0.0))
        return dict(bytes_per_second=speed, share_of_peak=share)

    def close(self) -> None:
        self.bar.close()
