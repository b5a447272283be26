"""A run record read with care: sections may be missing, numbers may be the strings "nan" and "inf"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LABELS = {
    "sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "sam": "SAM", "asam": "ASAM", "esam": "ESAM", "gsam": "GSAM",
    "wsam": "WSAM", "looksam": "LookSAM", "fisher_sam": "Fisher SAM", "friendly_sam": "Friendly SAM",
    "functional_sam": "Functional SAM", "logit_sam": "Logit SAM", "momentum_sam": "Momentum SAM",
    "preconditioned_sam": "Preconditioned SAM", "preconditioned_functional_sam": "Preconditioned functional SAM",
    "random_sam": "Random SAM", "sam_on": "SAM-ON", "layer_sam": "Layer SAM", "unnormalized_sam": "USAM",
}
METRICS = {
    "accuracy": ("test", "accuracy"), "nll": ("test", "nll"), "ece": ("test", "ece"),
    "sharpness": ("sharpness", "value"), "first_order": ("sharpness", "first_order"),
    "second_order": ("sharpness", "second_order"), "eigenvalue": ("hessian", "eigenvalue"),
    "residual": ("hessian", "residual"),
}


@dataclass(frozen=True)
class Stat:
    """A mean over seeds with its standard deviation, nan where one seed leaves it unknown."""

    mean: float = math.nan
    sd: float = math.nan
    n: int = 0

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)


@dataclass(frozen=True)
class Gap:
    """A difference of two means beside the spread √(sd² + sd²) of a difference between two single runs."""

    difference: float
    spread: float

    @property
    def decided(self) -> bool:
        return math.isfinite(self.difference) and abs(self.difference) > self.spread  # False where the spread is nan


def gap(a: Stat, b: Stat) -> Gap:
    """a − b, with the spread."""
    return Gap(a.mean - b.mean, math.hypot(a.sd, b.sd))


def in_range(first: float, second: float, remainder: float) -> bool:
    """Whether slope and curvature at a point say how the loss rises over a step: they leave a quarter of it or less.

    >>> in_range(0.2, 0.1, 0.01), in_range(0.2, 0.1, -0.3)
    (True, False)
    """
    return not abs(remainder) > 0.25 * (abs(first) + abs(second) + abs(remainder))


def number(value: Any) -> float:
    """A float, whatever the record holds: "inf" and "nan" are read, everything else that is no number is nan."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def numbers(values: Any) -> list[float]:
    return [number(v) for v in values] if isinstance(values, Sequence) and not isinstance(values, str) else []


def section(parent: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at ``path``, empty where any part of it is missing."""
    for name in path:
        parent = parent.get(name) if isinstance(parent, Mapping) else None
    return parent if isinstance(parent, Mapping) else {}


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, in plain notation where that is readable.

    >>> [significant(v) for v in (0.012345, 1234.5, 2e-7, float("nan"))]
    ['0.0123', '1234', '2.00e-07', 'nan']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return "0" if value == 0 else f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def plus_minus(stat: Stat, scale: float = 1.0, digits: int = 0) -> str:
    """``mean ± sd``, cut where the sd stops to mean anything, but not before so many ``digits`` after the point.

    >>> plus_minus(Stat(0.83123, 0.0071, 3), 100), plus_minus(Stat(12.0, n=1))
    ('83.1 ± 0.7', '12.0')
    """
    mean, sd = stat.mean * scale, stat.sd * scale
    if not stat.known:
        return str(stat.mean) if stat.n else "–"
    if not math.isfinite(sd) or sd == 0 or not 1e-5 <= sd < 1e5:
        return f"{mean:.{digits}f}" if digits else significant(mean)
    exponent = math.floor(math.log10(sd))
    digits = max(digits, -exponent) if digits else max(0, -exponent + (sd / 10**exponent < 2))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


class Reading:
    """What the report asks of a record; every question has an answer, if only nan."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        runs = record.get("runs")
        self.all_runs = [r for r in runs if isinstance(r, Mapping)] if isinstance(runs, Sequence) else []
        named = [str(r.get("method")) for r in self.all_runs]
        found = dict.fromkeys([*named, *map(str, section(record, "summary")), *map(str, section(record, "selection"))])
        self.baseline = "sgd" if "sgd" in found else next(iter(found), "")
        self.methods = sorted(found, key=lambda m: m != self.baseline)  # stable: the baseline first, then as they ran
        self.data = section(record, "data")
        self.complete = record.get("status", "complete") == "complete"
        self.noisy = number(self.data.get("noise")) > 0

    @property
    def test_name(self) -> str:
        return "clean-test accuracy" if self.noisy else "test accuracy"

    def label(self, method: str) -> str:
        """A name as the papers write it; control characters removed."""
        shown = LABELS.get(method, method)
        return "".join(c if c.isprintable() else "�" for c in shown)

    def runs(self, method: str) -> list[Mapping[str, Any]]:
        return [r for r in self.all_runs if str(r.get("method")) == method]

    def seeds(self, method: str, metric: str) -> list[float]:
        """The value of each seed that has one, non-finite ones included."""
        part, name = METRICS[metric]
        return [number(section(r, part)[name]) for r in self.runs(method) if section(r, part).get(name) is not None]

    def stat(self, method: str, metric: str) -> Stat:
        """From the record's summary; from its runs where that is missing."""
        given = section(self.record, "summary", method, metric)
        values = self.seeds(method, metric)
        if given.get("mean") is not None:
            n = number(given.get("n"))
            n = int(n) if math.isfinite(n) else max(len(values), 1)
            return Stat(number(given["mean"]), number(given.get("sd")) if n > 1 else math.nan, n)
        if not values:
            return Stat()
        finite = all(map(math.isfinite, values))
        spread = statistics.stdev(values) if finite and len(values) > 1 else math.nan
        return Stat(sum(values) / len(values), spread, len(values))

    def training_loss(self, method: str) -> Stat:
        """Of the last epoch."""
        curves = [numbers(section(r, "history").get("train_loss")) for r in self.runs(method)]
        values = [c[-1] for c in curves if c and math.isfinite(c[-1])]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return Stat(statistics.fmean(values), spread, len(values)) if values else Stat()

    def learnt(self, method: str) -> bool:
        """Whether the mean test accuracy is above chance by two standard errors; True where this cannot be told.

        Chance is the share of the most frequent class; a method that is no better has learnt nothing, and how flat or
        well calibrated it is says nothing.
        """
        accuracy, n = self.stat(method, "accuracy"), number(self.data.get("test"))
        chance = self.chance
        if not (accuracy.known and math.isfinite(chance) and n > 0):
            return not any(map(math.isnan, self.seeds(method, "accuracy")))
        return accuracy.mean > chance + 2 * math.sqrt(chance * (1 - chance) / n)

    @property
    def chance(self) -> float:
        classes = number(self.data.get("classes"))
        return number(self.data.get("chance", 1 / classes if classes > 0 else math.nan))

    def competes(self, method: str, metric: str) -> bool:
        """Whether a method has a value that can be compared with others'."""
        return self.stat(method, metric).known and self.learnt(method)

    def timing(self, method: str) -> tuple[float, float]:
        """Seconds a step, and its ratio to the baseline's (the record's may be relative to another method)."""
        given = section(self.record, "timing", method)
        unit = number(section(self.record, "timing", self.baseline).get("ratio", 1.0))
        return number(given.get("seconds")), number(given.get("ratio")) / unit if unit > 0 else math.nan

    def parts(self, method: str) -> tuple[float, float, float]:
        """Means of the first- and second-order part of one-step sharpness, and of what they leave unexplained."""
        value, first, second = (self.stat(method, m).mean for m in ("sharpness", "first_order", "second_order"))
        return first, second, value - first - second

    def probe(self) -> float:
        """The ρ with which one-step sharpness was measured."""
        return next((number(section(r, "sharpness")["rho"]) for r in self.all_runs if section(r, "sharpness").get("rho")
                     is not None), math.nan)
