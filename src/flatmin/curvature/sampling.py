"""Means of random samples, drawn until a stated error is reached."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from ..results import Scalar
from .checkpoint import Checkpoint, State
from .progress import Report


@dataclass(frozen=True, kw_only=True)
class Estimate(Scalar):
    """A random estimate: ``interval`` holds the truth with probability ``confidence``.

    ``foretold`` is how many products the first samples said it would take, ``matvecs`` how many it took.
    """

    matvecs: int
    samples: int
    confidence: float
    interval: tuple[float, float]
    foretold: int
    converged: bool


def quantile(confidence: float, degrees: int) -> float:
    """The t for which a Student variable lies in [−t, t] with this probability, to about 1 %.

    G. W. Hill, CACM 13 (1970) 619-620, first terms; exact for 1 and 2 degrees of freedom.
    """
    p = (1 + confidence) / 2
    if degrees < 1:
        return math.inf
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, n = NormalDist().inv_cdf(p), degrees
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) \
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)


def moments(samples: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    n = len(samples)
    mean = math.fsum(samples) / n
    if n < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1) / n)


def enough(mean: float, stderr: float, rtol: float, confidence: float, n: int) -> bool:
    """Whether the half-width of the interval is at most rtol · |mean|."""
    return n > 1 and quantile(confidence, n - 1) * stderr <= rtol * abs(mean)


def adaptive(sample: Callable[[], float], cost: int, keep: Checkpoint, *, rtol: float, confidence: float, spent: int,
             most: int, report: Report, offset: float = 0.0, pilot: int = 10
             ) -> tuple[list[float], int]:
    """Samples until the interval of ``offset`` + their mean is narrow enough, and the products foretold.

    A pilot gives the variance, which gives the number of samples; these are drawn in at most a few rounds rather than
    by looking after every sample, since stopping at the first lucky look would make the stated error too small.
    """
    samples: list[float] = keep.saved.get("samples", [])
    foretold, goal = keep.saved.get("foretold", 0), keep.saved.get("goal", pilot)

    def state() -> State:
        return {"samples": list(samples), "foretold": foretold, "goal": goal, "matvecs": spent + cost * len(samples)}

    while True:
        goal = max(1, min(goal, (most - spent) // cost))
        while len(samples) < goal:
            samples.append(sample())
            keep.tick(state)
            report(spent + cost * len(samples), f"of about {spent + cost * goal}", cost * (goal - len(samples)))
        mean, stderr = moments(samples)
        if enough(offset + mean, stderr, rtol, confidence, len(samples)):
            return samples, foretold or spent + cost * len(samples)
        target = rtol * abs(offset + mean) / max(quantile(confidence, len(samples) - 1), 1e-300)
        needed = len(samples) * (stderr / target) ** 2 if target > 0 else math.inf
        foretold = foretold or int(min(spent + cost * needed, 2**62))
        if spent + cost * (len(samples) + 1) > most:
            return samples, foretold
        goal = int(min(max(1.1 * needed, len(samples) + 2), 4 * len(samples)))


def estimate(value: float, stderr: float, samples: int, *, matvecs: int, foretold: int, rtol: float,
             confidence: float, settings: dict, name: str) -> Estimate:
    """The record of an estimate, with a warning where its error is larger than asked for."""
    converged = enough(value, stderr, rtol, confidence, samples)
    if not converged:
        warnings.warn(f"{name} is known to ±{stderr:.2g} only, of {value:.4g}, after {matvecs} products; {rtol:g} "
                      f"would take about {foretold}: raise max_matvecs= or rtol=", stacklevel=3)
    half = quantile(confidence, samples - 1) * stderr if stderr else 0.0
    return Estimate(value=value, stderr=stderr, matvecs=matvecs, samples=samples, confidence=confidence,
                    interval=(value - half, value + half), foretold=foretold, converged=converged, settings=settings)
