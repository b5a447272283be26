"""Differences between two methods, paired over seeds: their confidence interval, and whether they are decided.

Runs of one seed share their initial weights and the order of their batches, so the difference is taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .fields import number, section

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """A mean over seeds of a − b, with its 95 % confidence interval.

    ``p`` is that of the two-sided t test of 0, ``adjusted`` the same after Holm's correction over the comparisons that
    are made together. ``seeds_needed`` would decide a difference of this mean and spread with a power of 80 % at the
    level 5 % over the number of comparisons; inf: more than a thousand. nan where one seed leaves it unknown.
    """

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    adjusted: float = math.nan
    seeds: float = 0
    seeds_needed: float = math.nan

    @property
    def decided(self) -> bool:
        return self.adjusted < LEVEL        # False for nan


def differences(a: Mapping[str, Mapping[str, float]], b: Mapping[str, float]) -> dict[str, Difference]:
    """Each of ``a`` minus ``b``, values by seed; corrected for as many comparisons as there are (Holm 1979).

    >>> found = differences({"x": {"0": 2.0, "1": 2.1, "2": 1.9}, "y": {"0": 1.2, "1": 0.9, "2": 0.8}},
    ...                     {"0": 1.0, "1": 1.0, "2": 1.0})
    >>> [(name, round(d.mean, 3), round(d.adjusted, 4), d.decided) for name, d in found.items()]
    [('x', 1.0, 0.0066, True), ('y', -0.033, 0.8075, False)]
    """
    pairs = {name: [v - b[seed] for seed, v in values.items() if math.isfinite(v - b.get(seed, math.nan))]
             for name, values in a.items()}
    count = sum(len(d) > 1 for d in pairs.values())
    found = {name: _difference(d, max(count, 1)) for name, d in pairs.items()}
    adjusted = holm([d.p for d in found.values()])
    return {name: replace(d, adjusted=p) for (name, d), p in zip(found.items(), adjusted, strict=True)}


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's correction: max over the smaller ones of min(1, (m − i) p_(i)); nan ones do not count."""
    known = sorted((v, i) for i, v in enumerate(p) if not math.isnan(v))
    out, highest = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        out[i] = highest
    return out


def against_references(runs: Iterable[Mapping[str, Any]], metric: str, base: str,
                       twice: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the record of a comparison holds: of each other method, the difference of a metric to each reference.

    Args:
        runs: of the record.
        metric: a field of their test results.
        base: the plain optimizer, against which all others are compared.
        twice: of each sharpness-aware method, its plain optimizer with twice the steps, which it is compared with too.
    """
    values: dict[str, dict[str, float]] = {}
    for run in runs:
        values.setdefault(str(run["method"]), {})[str(run["seed"])] = number(section(run, "test").get(metric))
    out = []
    for reference in dict.fromkeys((base, *twice.values())):
        others = {m: v for m, v in values.items() if m != reference and reference in (base, twice.get(m))}
        if reference in values:
            out += [{"method": m, "minus": reference, "metric": metric} | asdict(d)
                    for m, d in differences(others, values[reference]).items()]
    return out


def _difference(d: Sequence[float], comparisons: int) -> Difference:
    n = len(d)
    if n < 2:
        return Difference(d[0] if d else math.nan, seeds=n)
    from scipy import stats

    mean, sd = statistics.fmean(d), statistics.stdev(d)
    if sd <= 1e-12 * abs(mean):     # the same in every seed
        return Difference(mean, mean, mean, float(mean == 0), seeds=n, seeds_needed=math.inf if mean == 0 else 2)
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Difference(mean, mean - half, mean + half, p, seeds=n,
                      seeds_needed=seeds_needed(mean / sd, LEVEL / comparisons))


def seeds_needed(effect: float, level: float) -> float:
    """The smallest number of seeds n with P(|t| > t_crit) ≥ 80 %, t noncentral with n − 1 degrees and δ = √n · effect.

    Args:
        effect: mean over standard deviation of the difference.
        level: of the two-sided test.

    Source: J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 2nd ed., 1988, section 2.
    """
    from scipy import stats

    def power(n: int) -> float:
        critical = stats.t.ppf(1 - level / 2, n - 1)
        shift = math.sqrt(n) * abs(effect)
        upper = float(stats.nct.sf(critical, n - 1, shift))
        return upper if math.isfinite(upper) else float(shift > critical)

    low, high = 2, MOST_SEEDS
    if power(high) < POWER:
        return math.inf
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low
