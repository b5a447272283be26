"""A line that says how far a long computation is."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Progress = bool | Callable[[int, str], None]


class Report(Protocol):
    def __call__(self, done: int, text: str, left: int = 0) -> None:
        """``done`` products so far; ``left``: about how many more, 0 where nobody knows."""
        ...


@contextmanager
def reporter(progress: Progress, title: str) -> Iterator[Report]:
    """Where to report to: the caller's own function of (products so far, text), a line on standard error, or nobody."""
    start = last = time.monotonic()
    first: int | None = None

    def show(done: int, text: str, left: int = 0) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = done - 1 if first is None else first    # a resumed run has done some before
        if now - last > 0.2:
            last = now
            pace = (now - start) / max(done - first, 1)
            ahead = f", about {_clock(left * pace)} left" if left else ""
            sys.stderr.write(f"\r{title}: {done} products, {text}, {pace:.2g} s a product{ahead}\x1b[K")
            sys.stderr.flush()

    def told(done: int, text: str, left: int = 0) -> None:
        assert callable(progress)
        progress(done, text + (f", about {left} products left" if left else ""))

    if callable(progress):
        yield told
    elif not progress:
        yield lambda done, text, left=0: None
    else:
        try:
            yield show
        finally:
            sys.stderr.write(f"\r{title}: done in {time.monotonic() - start:.1f} s\x1b[K\n")


def left(history: list[tuple[int, float, float]]) -> int:
    """Products left if an error falls on as in the later half of a history of (products, error, wanted)."""
    if not history or history[-1][1] <= history[-1][2] or history[-1][2] <= 0:
        return 0
    (before, high, _), (now, low, target) = history[len(history) // 2 - 1 if len(history) > 1 else 0], history[-1]
    return 0 if high <= low else math.ceil(math.log(low / target) * (now - before) / math.log(high / low))


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else \
        f"{seconds / 3600:.1f} h"
