"""A line that says how far a long computation is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = bool | Callable[[int, str], None]


@contextmanager
def reporter(progress: Progress, title: str) -> Iterator[Callable[[int, str], None]]:
    """A function of (products so far, text): the caller's own, a line on standard error, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, text: None
        return
    start = last = time.monotonic()

    def show(done: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            pace = (now - start) / max(done, 1)
            sys.stderr.write(f"\r{title}: {done} products, {text}, {pace:.2g} s a product\x1b[K")
            sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write(f"\r{title}: done in {time.monotonic() - start:.1f} s\x1b[K\n")
