"""Progress of a long job: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Counts steps of a known total."""

    def __init__(self, total: int, quiet: bool = False, every: float = 20.0):
        self._total, self._quiet, self._every = max(1, total), quiet, every
        self._done, self._start, self._last, self._text = 0, time.monotonic(), time.monotonic(), ""
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=self._total, unit="step", smoothing=0.1, dynamic_ncols=True, leave=False)

    def tick(self, steps: int = 1) -> None:
        """Some steps were done."""
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif not self._quiet and time.monotonic() - self._last > self._every:
            self._last = time.monotonic()
            gone = self._last - self._start
            left = gone * (self._total - self._done) / max(1, self._done)
            print(f"{100 * self._done / self._total:3.0f} %  {self._text}  {clock(gone)} gone, {clock(left)} left",
                  file=sys.stderr, flush=True)

    def announce(self, text: str) -> None:
        """A line of its own, said once."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """What is going on now."""
        self._text = text
        if self._bar is not None:
            self._bar.set_description(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(61.4), clock(7200)
    ('1:01', '120:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
