"""Numbers with their errors: of random probes, drawn until a stated error is reached, and of the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..progress import Report
from ..results import FEWEST_BATCHES, Scalar, uncertain, weighted_mean
from .checkpoint import Checkpoint, State
from .operator import CurvatureOperator, Forms

ROUNDING = 4
"""Quantities added up from matvecs are known to this many units of rounding, as a standard error."""


def data_stderr(forms: Forms | None) -> float | None:
    """The standard error of λ = Σ n_b q_b / Σ n_b as a sample of batches; None for fewer than 5 of them."""
    if forms is None or len(forms[0]) < FEWEST_BATCHES:
        return None
    n, q = forms
    return weighted_mean(q.tolist(), n.tolist())[1]


def add_forms(a: Forms | None, b: Forms | None, factor: float = 1.0) -> Forms | None:
    """a + factor · b batch by batch, of the same batches; ``a`` is None at the start."""
    return None if b is None else (b[0], b[1] * factor if a is None else a[1] + b[1] * factor)


def about_data(stderr: float | None, batches: int | None) -> str:
    """What a printed number says of its error by the data; nothing where that is unknown."""
    return "" if stderr is None else f", data ± {stderr:.2g} over {batches} batches"


@dataclass(frozen=True, kw_only=True)
class Measured(Scalar):
    """A number with its error by the data beside that of the method.

    ``data_stderr`` is the standard error of ``value`` as an estimate for the distribution that the data were drawn
    from, by its spread over the ``batches``, which must be independent: samples shuffled once, say. It is None for
    fewer than 5 batches and where the matrix is no mean over batches that are seen one by one (differences of
    gradients). It is not an error of the number for these data, and it knows neither of the bias of a largest
    eigenvalue of few samples (upwards) nor of weights trained on the same data.
    """

    data_stderr: float | None = None
    batches: int | None = None

    def __str__(self) -> str:
        return f"{type(self).__name__}({uncertain(self.value, self.stderr)}" \
               f"{about_data(self.data_stderr, self.batches)})"


@dataclass(frozen=True, kw_only=True)
class Estimate(Measured):
    """An estimate from random probes: ``interval`` holds the truth for these data with probability ``confidence``.

    ``stderr`` is over the probes and includes rounding; where ``settings["method"]`` is "exact" it is 0, and the
    interval what rounding leaves open. ``predicted`` is how many matvecs the first samples said it would take,
    ``matvecs`` how many it took.
    """

    matvecs: int
    samples: int
    confidence: float
    interval: tuple[float, float]
    predicted: int
    converged: bool

    def __str__(self) -> str:
        low, high = self.interval
        return f"{super().__str__()[:-1]}, {low:.5g} to {high:.5g} at {self.confidence:.0%})"


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
    n, top = len(samples), max(map(abs, samples))
    unit = 2.0 ** -math.frexp(top)[1] if 0 < top < math.inf else 1.0      # squares must not over- or underflow
    samples = [x * unit for x in samples]
    mean = math.fsum(samples) / n
    if n < 2:
        return mean / unit, math.inf
    return mean / unit, math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1) / n) / unit


def enough(mean: float, stderr: float, rtol: float, confidence: float, n: int) -> bool:
    """Whether the half-width of the interval is at most rtol · |mean|."""
    return n > 1 and quantile(confidence, n - 1) * stderr <= rtol * abs(mean)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What samples gave so far; ``prefer_exact`` where the exact value takes no more matvecs."""

    value: float = math.nan
    stderr: float = 0.0
    samples: int = 0
    magnitude: float = 0.0      # of what was added up: rounding is relative to it
    matvecs: int
    predicted: int
    prefer_exact: bool = False
    exact: bool = False
    forms: Forms | None = None

    def exactly(self, value: float, size: int, magnitude: float, forms: Forms | None = None) -> Drawn:
        """The exact value, for which ``over_coordinates`` took ``size`` matvecs more."""
        return Drawn(value=value, samples=size, magnitude=magnitude, matvecs=self.matvecs + size,
                     predicted=self.predicted, exact=True, forms=forms)


def adaptive(sample: Callable[[], float], saver: Checkpoint, operator: CurvatureOperator, *, rtol: float,
             confidence: float, spent: int, most: int, report: Report, offset: float = 0.0, pilot: int = 10) -> Drawn:
    """Samples until the interval of ``offset`` + their mean is narrow enough.

    A pilot gives the variance, which gives the number of samples; these are drawn in at least one round more and at
    most a few, rather than by looking after every sample, since stopping at the first lucky look would make the stated
    error too small.
    """
    samples: list[float] = saver.saved.get("samples", [])
    predicted, goal = saver.saved.get("predicted", 0), saver.saved.get("goal", pilot)

    def state() -> State:
        return {"samples": list(samples), "predicted": predicted, "goal": goal, "matvecs": spent + len(samples)}

    while True:
        goal = max(1, min(goal, most - spent))
        while len(samples) < goal:
            samples.append(sample())
            saver.tick(state)
            report(spent + len(samples), f"of about {spent + goal}", goal - len(samples))
        mean, stderr = moments(samples)
        good, done = enough(offset + mean, stderr, rtol, confidence, len(samples)), spent + len(samples)
        target = rtol * abs(offset + mean) / max(quantile(confidence, len(samples) - 1), 1e-300)
        needed = len(samples) if good else len(samples) * (stderr / target) ** 2 if target > 0 else math.inf
        needed *= 1 if good else 1.1
        if stderr > 0 and len(samples) <= pilot:        # whatever the variance of so few says
            good, needed = False, max(needed, 2 * len(samples), 30)
        predicted = predicted or int(min(spent + needed, 2**62))
        prefer_exact = not good and exact_is_cheaper(operator, needed - len(samples), most - done)
        if good or prefer_exact or done + 1 > most:
            return Drawn(value=offset + mean, stderr=stderr, samples=len(samples), matvecs=done, predicted=predicted,
                         magnitude=math.fsum(map(abs, samples)) / len(samples), prefer_exact=prefer_exact)
        goal = int(min(max(needed, len(samples) + 2), 4 * len(samples)))


def exact_is_cheaper(operator: CurvatureOperator, needed: float, left: int) -> bool:
    """Whether one matvec a coordinate, which gives all exactly, is no more than ``needed`` and than what is left.

    Not where vectors are sharded over ranks.
    """
    return operator.length == operator.size <= min(needed, left)


def draw_if_cheaper(draw: Callable[[], Drawn], operator: CurvatureOperator, saver: Checkpoint, *, least: int,
                 most: int) -> Drawn:
    """What ``draw`` gives, where its ``least`` matvecs are fewer than those of the exact value."""
    if "found" in saver.saved:      # stopped on the way to the exact value
        return Drawn(matvecs=saver.saved["spent"], predicted=saver.saved["predicted"], prefer_exact=True)
    return Drawn(matvecs=0, predicted=least, prefer_exact=True) if exact_is_cheaper(operator, least, most) else draw()


def over_coordinates(operator: CurvatureOperator, take: Callable[[Tensor, int], Any], saver: Checkpoint, report: Report,
                     *, spent: int, predicted: int = 0) -> tuple[list[Any], Forms | None]:
    """``take``(Aeᵢ, i) for each unit vector eᵢ, and Σᵢ eᵢᵀA_b eᵢ = tr A_b of each batch b."""
    found, forms, n = saver.saved.get("found", []), saver.saved.get("traces"), operator.size
    saver.fixed = {"spent": spent, "predicted": predicted}

    def state() -> State:
        return {"found": list(found), "traces": forms, "matvecs": spent + len(found)}

    for i in range(len(found), n):
        e = operator.empty().zero_()
        e[i] = 1
        w, here = operator.matvec_with_forms(e)
        forms = add_forms(forms, here)
        found.append(take(w, i))
        saver.tick(state)
        report(spent + i + 1, f"of {spent + n}, which give it exactly", n - i - 1)
    return found, forms


def estimate(drawn: Drawn, operator: CurvatureOperator, *, rtol: float, confidence: float, settings: dict[str, Any],
             name: str) -> Estimate:
    """The record of an estimate, rounding included, with a warning where its error is larger than asked for."""
    rounding = ROUNDING * torch.finfo(operator.dtype).eps * drawn.magnitude
    if drawn.exact:
        stderr, half, converged, settings = 0.0, 2 * rounding, True, settings | {"method": "exact"}
    else:
        stderr = math.hypot(drawn.stderr, rounding)
        half = quantile(confidence, drawn.samples - 1) * stderr if stderr else 0.0
        converged = enough(drawn.value, stderr, rtol, confidence, drawn.samples)
    if not converged:
        warnings.warn(f"{name} is known to ±{stderr:.2g} only, of {drawn.value:.4g}, after {drawn.matvecs} matvecs; "
                      f"{rtol:g} would take about {drawn.predicted}: raise max_matvecs= or rtol=", stacklevel=3)
    return Estimate(value=drawn.value, stderr=stderr, matvecs=drawn.matvecs, samples=drawn.samples,
                    confidence=confidence, interval=(drawn.value - half, drawn.value + half), predicted=drawn.predicted,
                    converged=converged, settings=settings, data_stderr=data_stderr(drawn.forms),
                    batches=None if drawn.forms is None else len(drawn.forms[0]))
