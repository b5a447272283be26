"""Progress of a long computation: the caller's own function, tqdm at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

Progress = bool | Callable[[int, str], None]
"""True shows the progress on standard error; a function is called with (matvecs so far, a short text)."""


class Report(Protocol):
    def __call__(self, done: int, text: str, left: int = 0) -> None:
        """``done`` matvecs so far; ``left``: about how many more, 0 where that is unknown."""
        ...


@contextmanager
def reporter(progress: Progress, title: str) -> Iterator[Report]:
    """Where an algorithm reports to: the caller's own function, standard error, or nowhere."""
    if isinstance(progress, Display):
        yield progress
        return
    if callable(progress):
        yield lambda done, text, left=0: progress(done, text + (f", about {left} matvecs left" if left else ""))
        return
    display = Display(title, quiet=not progress)
    try:
        yield display
    finally:
        display.end(f"done in {clock(display.elapsed)}")


class Display:
    """How far a computation is, on standard error: a tqdm bar at a terminal, a line every few ``seconds`` elsewhere.

    Args:
        title: what is computed.
        unit: what is counted.
        total: how many there will be, for :meth:`step`.
        quiet: show nothing.
        seconds: between two lines where there is no terminal, or no tqdm.
        resumed: how many an earlier session has done, which count for neither the number shown nor the pace; None:
            not known, and then the first that is reported is the first of this session.
    """

    def __init__(self, title: str, *, unit: str = "matvec", total: int = 0, quiet: bool = False,
                 seconds: float = 20.0, resumed: int | None = None):
        self.title, self.unit, self.total, self.quiet, self.seconds = title, unit, total, quiet, seconds
        self.done, self._first, self.resumed = 0, -1, resumed
        self._start = self._last = time.monotonic()
        self._bar = None if quiet else _bar(title, unit)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def __call__(self, done: int, text: str = "", left: int = 0) -> None:
        """``done`` so far, and about how many are left (0: unknown)."""
        self.done = done
        if self._first < 0:
            self._first = done - 1 if self.resumed is None or self.resumed >= done else self.resumed
            if self._bar is not None:
                self._bar.initial = self._bar.n = self._first
        if self._bar is not None:
            self._bar.total = done + left if left else None
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self.quiet or now - self._last <= self.seconds:
            return
        self._last, pace = now, (now - self._start) / max(done - self._first, 1)
        ahead = f", about {clock(left * pace)} left" if left else ""
        before = f" after {self.resumed} of an earlier session" if self.resumed else ""
        _write(f"{self.title}: {done - (self.resumed or 0)} {self.unit}s{before}{text and f', {text}'}, {pace:.2g} s a "
               f"{self.unit}{ahead}")

    def step(self) -> None:
        """One more of ``total``."""
        self(self.done + 1, left=max(0, self.total - self.done - 1))

    def say(self, title: str) -> None:
        """What is computed from here on."""
        self.title = title
        if self._bar is not None:
            self._bar.set_description(title)

    def line(self, text: str) -> None:
        """A line of its own, which stays."""
        if self._bar is not None:
            self._bar.clear()
        if not self.quiet:
            _write(text)

    def end(self, text: str = "") -> None:
        """The end, with a last line where there is a text."""
        if self._bar is not None:
            self._bar.close()
        if text and not self.quiet:
            _write(f"{self.title}: {text}")


def left(history: list[tuple[int, float, float]]) -> int:
    """Matvecs left if an error keeps falling as in the later half of a history of (matvecs, error, wanted)."""
    if not history or history[-1][1] <= history[-1][2] or history[-1][2] <= 0:
        return 0
    (before, high, _), (now, low, target) = history[len(history) // 2 - 1 if len(history) > 1 else 0], history[-1]
    return 0 if high <= low else math.ceil(math.log(low / target) * (now - before) / math.log(high / low))


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours before them where there are any.

    >>> clock(0.4), clock(61.4), clock(7200)
    ('0:00', '1:01', '2:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(title: str, unit: str) -> Any:
    """A bar of tqdm at a terminal; None elsewhere, and where tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=title, unit=unit, smoothing=0.1, dynamic_ncols=True, leave=False)


def _write(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
