"""What the table, the sentences and the page of ``flatmin compare`` ask of its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .fields import items, number, numbers, section
from .formatting import printable
from .spread import Stat, over_seeds, plus_minus

LABELS = {
    "sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "sam": "SAM", "asam": "ASAM", "esam": "ESAM", "gsam": "GSAM",
    "wsam": "WSAM", "looksam": "LookSAM", "fisher_sam": "Fisher SAM", "friendly_sam": "Friendly SAM",
    "functional_sam": "Functional SAM", "logit_sam": "Logit SAM", "momentum_sam": "Momentum SAM",
    "preconditioned_sam": "Preconditioned SAM", "preconditioned_functional_sam": "Preconditioned functional SAM",
    "random_sam": "Random SAM", "sam_on": "SAM-ON", "layer_sam": "Layer SAM", "unnormalized_sam": "USAM",
}


@dataclass(frozen=True)
class Metric:
    """A measured quantity of a run: where the record has it, its headings, and how it is shown."""

    part: str
    field: str
    heading: str = ""                   # of the page
    short: str = ""                     # of the terminal
    sentence: str = ""                  # "... is higher than"
    scale: float = 1.0
    decimals: int = 0
    higher_is_better: bool = False

    def text(self, stat: Stat) -> str:
        return plus_minus(stat, self.scale, self.decimals)

    def with_unit(self, stat: Stat) -> str:
        return self.text(stat) + " %" * (self.scale == 100)


METRICS = {
    "accuracy": Metric("test", "accuracy", "Accuracy, %", "accuracy %", scale=100, decimals=1, higher_is_better=True),
    "nll": Metric("test", "nll", "Negative log-likelihood", "NLL", "Negative log-likelihood"),
    "ece": Metric("test", "ece", "Calibration error, %", "ECE %",
                  "Calibration got worse: the expected calibration error", scale=100),
    "sharpness": Metric("sharpness", "value", "One-step sharpness", "sharpness", "One-step sharpness"),
    "eigenvalue": Metric("hessian", "eigenvalue", "Largest Hessian eigenvalue", "λ_max",
                         "The largest Hessian eigenvalue"),
    "first_order": Metric("sharpness", "first_order"),
    "second_order": Metric("sharpness", "second_order"),
    "residual": Metric("hessian", "residual"),
}
COLUMNS = ("accuracy", "nll", "ece", "sharpness", "eigenvalue")
PARTS = ("first_order", "second_order")


class CompareRecord:
    """A record of ``flatmin compare``; every question has an answer, if only nan."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.all_runs = [r for r in items(record.get("runs")) if isinstance(r, Mapping)]
        found = dict.fromkeys([*(str(r.get("method")) for r in self.all_runs), *map(str, section(record, "selection"))])
        self.baseline = "sgd" if "sgd" in found else next(iter(found), "")
        self.methods = sorted(found, key=lambda m: m != self.baseline)  # stable: the baseline first, then as they ran
        self.data = section(record, "data")
        self.complete = record.get("status") == "complete"
        self.noisy = number(self.data.get("noise")) > 0
        self.chance = number(self.data.get("chance"))

    @property
    def test_name(self) -> str:
        return "clean-test accuracy" if self.noisy else "test accuracy"

    def label(self, method: str) -> str:
        """A name as the papers write it."""
        return printable(LABELS.get(method, method))

    def runs(self, method: str) -> list[Mapping[str, Any]]:
        return [r for r in self.all_runs if str(r.get("method")) == method]

    def histories(self, method: str, key: str) -> list[list[float]]:
        """A curve over epochs of each run that has it."""
        found = [numbers(section(r, "history").get(key)) for r in self.runs(method)]
        return [curve for curve in found if curve]

    def seeds(self, method: str, metric: str) -> list[float]:
        """The value of each run that has one, non-finite ones included."""
        part, name = METRICS[metric].part, METRICS[metric].field
        return [number(section(r, part)[name]) for r in self.runs(method) if section(r, part).get(name) is not None]

    def stat(self, method: str, metric: str) -> Stat:
        return over_seeds(self.seeds(method, metric))

    def range_of(self, metric: str) -> tuple[float, float]:
        """From the lowest seed of any method to the highest; nan where there is none."""
        every = [v for m in self.methods for v in self.seeds(m, metric) if math.isfinite(v)]
        return min(every, default=math.nan), max(every, default=math.nan)

    def most_seeds(self) -> int:
        """The largest number of seeds behind a mean."""
        return max((self.stat(m, x).n for m in self.methods for x in COLUMNS), default=0)

    def training_loss(self, method: str) -> Stat:
        """Of the last epoch."""
        return over_seeds(curve[-1] for curve in self.histories(method, "train_loss"))

    def learnt(self, method: str) -> bool:
        """Whether the mean test accuracy is above chance by two standard errors; True where this cannot be told.

        Chance is the share of the most frequent class. A method that is no better has learnt nothing, and its flatness
        and calibration say nothing.
        """
        accuracy, n, chance = self.stat(method, "accuracy"), number(self.data.get("test")), self.chance
        if not (accuracy.known and math.isfinite(chance) and n > 0):
            return not any(map(math.isnan, self.seeds(method, "accuracy")))
        return accuracy.mean > chance + 2 * math.sqrt(chance * (1 - chance) / n)

    def not_learnt(self) -> list[str]:
        return [m for m in self.methods if self.stat(m, "accuracy").known and not self.learnt(m)]

    def competes(self, method: str, metric: str) -> bool:
        """Whether a method has a value that can be compared with others'."""
        return self.stat(method, metric).known and self.learnt(method)

    def timing(self, method: str) -> tuple[float, float]:
        """Seconds a step, and its ratio to the baseline's (the record's may be relative to another method)."""
        given = section(self.record, "timing", method)
        unit = number(section(self.record, "timing", self.baseline).get("ratio"))
        return number(given.get("seconds")), number(given.get("ratio")) / unit if unit > 0 else math.nan

    def parts(self, method: str) -> tuple[float, float, float]:
        """Means of the first- and second-order part of one-step sharpness, and of what they leave unexplained."""
        value, first, second = (self.stat(method, m).mean for m in ("sharpness", *PARTS))
        return first, second, value - first - second

    def explained(self, method: str) -> bool:
        """Whether first and second order leave a quarter of one-step sharpness or less; True where it is unknown."""
        parts = self.parts(method)
        return not abs(parts[2]) > 0.25 * sum(map(abs, parts))

    def probe(self) -> float:
        """The ρ with which one-step sharpness was measured."""
        found = (number(section(r, "sharpness").get("rho")) for r in self.all_runs)
        return next(filter(math.isfinite, found), math.nan)

    def next_radius(self, method: str) -> tuple[float, float, str] | None:
        """The ρ of a method, the one to try next and the reason; None where the diagnosis asks for no other one."""
        part = section(self.record, "diagnosis", method)
        now, after = number(part.get("rho")), number(part.get("next_rho"))
        return (now, after, str(part.get("next_rho_because"))) if math.isfinite(after) and after != now else None
