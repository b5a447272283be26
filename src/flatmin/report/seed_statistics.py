"""Means over seeds with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .formatting import minus, significant


@dataclass(frozen=True)
class Stat:
    """A mean over seeds with its standard deviation, nan where one seed leaves it unknown."""

    mean: float = math.nan
    sd: float = math.nan
    n: int = 0

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)


def over_seeds(values: Iterable[float]) -> Stat:
    """The mean and standard deviation of the finite ones."""
    finite = [v for v in values if math.isfinite(v)]
    sd = statistics.stdev(finite) if len(finite) > 1 else math.nan
    return Stat(statistics.fmean(finite), sd, len(finite)) if finite else Stat()


def plus_minus(stat: Stat, scale: float = 1.0, decimals: int = 0) -> str:
    """``mean ± sd`` with the digits that the sd supports, but at least so many ``decimals``.

    >>> plus_minus(Stat(0.83123, 0.0071, 3), 100), plus_minus(Stat(12.0, n=1))
    ('83.1 ± 0.7', '12.0')
    """
    mean, sd = stat.mean * scale, stat.sd * scale
    if not stat.known:
        return "–"
    if not 1e-5 <= sd < 1e5:        # nan with one seed
        return minus(f"{mean:.{decimals}f}") if decimals else significant(mean)
    exponent = math.floor(math.log10(sd))
    decimals = max(decimals, -exponent) if decimals else max(0, -exponent + (sd / 10**exponent < 2))
    return minus(f"{mean:.{decimals}f} ± {sd:.{decimals}f}")
