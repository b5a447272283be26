"""What the table, the sentences and the page of ``flatmin compare`` ask of its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..training.methods import TWICE
from .differences import Difference, differences
from .fields import items, number, numbers, section
from .formatting import minus, printable, significant
from .seed_statistics import Stat, over_seeds, plus_minus

LABELS = {
    "base": "Base optimizer",
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

    def size(self, difference: float) -> str:
        """How large a difference is."""
        return f"{abs(100 * difference):.1f} points" if self.scale == 100 else significant(abs(difference))

    def interval(self, difference: Difference) -> str:
        """The ends of the confidence interval of a difference."""
        ends = [f"{100 * v:.1f}" if self.scale == 100 else significant(v) for v in (difference.low, difference.high)]
        return " to ".join(minus(v) for v in ends)

    @property
    def sign(self) -> int:
        """+1 where higher is better, −1 where lower is."""
        return 1 if self.higher_is_better else -1


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
CLASSIFIER = ("accuracy", "nll", "ece")
MEASURED = ("sharpness", "eigenvalue")
PARTS = ("first_order", "second_order")


class CompareRecord:
    """A record of ``flatmin compare``; every question has an answer, if only nan."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.all_runs = [r for r in items(record.get("runs")) if isinstance(r, Mapping)]
        found = dict.fromkeys([*(str(r.get("method")) for r in self.all_runs), *map(str, section(record, "selection"))])
        base = next((m for m in (str(record.get("base")), "sgd") if m in found), "")
        self.baseline = base or next(iter(found), "")
        self.metrics = METRICS | self._own_metrics()
        self.first = next(iter(self.tests))
        self._differences: dict[tuple[str, str], dict[str, Difference]] = {}
        self.methods = sorted(found, key=lambda m: m != self.baseline)  # stable: the baseline first, then as they ran
        self.data = section(record, "data")
        self.complete = record.get("status") == "complete"
        self.noisy = number(self.data.get("noise")) > 0
        self.chance = number(self.data.get("chance"))

    def _own_metrics(self) -> dict[str, Metric]:
        """Those of the recipe; a classifier's where the record names none."""
        given = section(self.record, "metrics")
        self.tests = tuple(map(str, given)) or CLASSIFIER
        return {name: Metric("test", name, _words(name).capitalize(), _words(name), f"Test {_words(name)}",
                             higher_is_better=bool(section(given, name).get("higher_is_better")))
                for name in self.tests if name not in CLASSIFIER}

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.tests, *MEASURED)

    @property
    def test_name(self) -> str:
        """Of the recipe's first metric, by which methods are ranked."""
        return f"clean-test {_words(self.first)}" if self.noisy else f"test {_words(self.first)}"

    @property
    def test_label(self) -> str:
        """The same with its unit, for an axis."""
        return self.test_name + ", %" * (self.metrics[self.first].scale == 100)

    @property
    def time_axis(self) -> str:
        """What the history is over."""
        return "tenths of the run" if "epochs" in self.data and self.data["epochs"] is None else "epoch"

    def label(self, method: str) -> str:
        """A name as the papers write it."""
        if method.endswith(TWICE):
            return f"{self.label(method.removesuffix(TWICE))} (2× steps)"
        return printable(LABELS.get(method, method))

    def by_seed(self, method: str, metric: str) -> dict[str, float]:
        """The value of each run that has one; of "training_loss" the last."""
        if metric == "training_loss":
            found = {str(x.get("seed")): numbers(section(x, "history").get("train_loss")) for x in self.runs(method)}
            return {seed: curve[-1] for seed, curve in found.items() if curve}
        part, name = self.metrics[metric].part, self.metrics[metric].field
        return {str(x.get("seed")): number(section(x, part)[name]) for x in self.runs(method)
                if section(x, part).get(name) is not None}

    def difference(self, metric: str, a: str, b: str) -> Difference:
        """a − b, paired over seeds; corrected for the comparisons of all methods with b."""
        if (metric, b) not in self._differences:
            others = {m: self.by_seed(m, metric) for m in self.methods if m != b}
            self._differences[metric, b] = differences(others, self.by_seed(b, metric))
        return self._differences[metric, b].get(a, Difference())

    def recorded_differences(self) -> list[tuple[str, str, Difference]]:
        """(method, reference, difference of the first metric) of each comparison in the record."""
        kept = [d for d in items(self.record.get("differences")) if isinstance(d, Mapping)]
        names: list[Any] = [f.name for f in fields(Difference)]
        return [(str(d.get("method")), str(d.get("minus")), Difference(*(number(d.get(n)) for n in names)))
                for d in kept]

    def runs(self, method: str) -> list[Mapping[str, Any]]:
        return [r for r in self.all_runs if str(r.get("method")) == method]

    def histories(self, method: str, key: str) -> list[list[float]]:
        """A curve over epochs of each run that has it."""
        found = [numbers(section(r, "history").get(key)) for r in self.runs(method)]
        return [curve for curve in found if curve]

    def seeds(self, method: str, metric: str) -> list[float]:
        """The value of each run that has one, non-finite ones included."""
        part, name = self.metrics[metric].part, self.metrics[metric].field
        return [number(section(r, part)[name]) for r in self.runs(method) if section(r, part).get(name) is not None]

    def stat(self, method: str, metric: str) -> Stat:
        return over_seeds(self.seeds(method, metric))

    def range_of(self, metric: str) -> tuple[float, float]:
        """From the lowest seed of any method to the highest; nan where there is none."""
        every = [v for m in self.methods for v in self.seeds(m, metric) if math.isfinite(v)]
        return min(every, default=math.nan), max(every, default=math.nan)

    def most_seeds(self) -> int:
        """The largest number of seeds behind a mean."""
        return max((self.stat(m, x).n for m in self.methods for x in self.columns), default=0)

    def training_loss(self, method: str) -> Stat:
        """Of the last epoch."""
        return over_seeds(curve[-1] for curve in self.histories(method, "train_loss"))

    def learnt(self, method: str) -> bool:
        """Whether the mean test accuracy is above chance by two standard errors; True where this cannot be told.

        Chance is the share of the most frequent class. A method that is no better has learnt nothing, and its flatness
        and calibration say nothing.
        """
        accuracy, n, chance = self.stat(method, self.first), number(self.data.get("test")), self.chance
        if not (self.first == "accuracy" and accuracy.known and math.isfinite(chance) and n > 0):
            return not any(map(math.isnan, self.seeds(method, self.first)))
        return accuracy.mean > chance + 2 * math.sqrt(chance * (1 - chance) / n)

    def not_learnt(self) -> list[str]:
        return [m for m in self.methods if self.stat(m, self.first).known and not self.learnt(m)]

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


def _words(name: str) -> str:
    return printable(name).replace("_", " ")
