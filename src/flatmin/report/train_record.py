"""What the table and the page of ``flatmin train`` ask of its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .fields import items, number, section
from .formatting import error_of, printable, significant, supported

SPLITS = {"train": "training data", "tune": "held-out data", "test": "test data"}
METRICS = {"loss": "loss", "accuracy": "accuracy", "bits_per_byte": "bits per byte",
           "entropy": "entropy of predictions"}


class Final(NamedTuple):
    """A metric at the end as text: its data, its name, its value, its standard error ("" where it is not known).

    ``weight``: of how many samples or tokens; ``higher_is_better``: whether it should be large.
    """

    split: str
    metric: str
    value: str
    error: str
    weight: str
    higher_is_better: bool


class Curve(NamedTuple):
    """Finite numbers by step."""

    steps: list[float]
    values: list[float]


class TrainRecord:
    """A record of ``flatmin train``, with the rows of its log; nothing in it is trusted to be there."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.settings, self.recipe, self.model, self.place = (
            section(record, k) for k in ("settings", "recipe", "model", "place"))
        rows = [row for row in items(record.get("log")) if isinstance(row, Mapping)]
        self.steps = [row for row in rows if "loss" in row]
        self.evaluations = [section(row, "evaluation") for row in rows if "evaluation" in row]
        self.monitored = [row for row in rows if "sharpness" in row]
        self.live = [{**section(row, "finding"), "step": row.get("step")} for row in rows if "finding" in row]
        self.name = printable(self.recipe.get("name"))
        self.method = printable(self.settings.get("method"))

    @property
    def done(self) -> int:
        """Steps that the log knows of."""
        last = [number(row.get("step")) + 1 for row in self.steps[-1:]]
        last += [number(row.get("step")) for row in self.evaluations[-1:]]
        return int(max([v for v in last if math.isfinite(v)], default=0))

    @property
    def rho(self) -> str:
        """The radius, or "" for the base optimizer and for a method's own."""
        value = number(self.settings.get("rho"))
        return f"{value:g}" if math.isfinite(value) else ""

    def column(self, name: str) -> Curve:
        """A quantity of the logged steps."""
        return _finite([(number(row.get("step")), number(row.get(name))) for row in self.steps])

    def evaluated(self, name: str, split: str | None = None) -> Curve:
        """A quantity of the evaluations, with its standard errors in :meth:`errors`."""
        rows = ((row, section(row, split) if split else row) for row in self.evaluations)
        return _finite([(number(row.get("step")), number(part.get(name))) for row, part in rows])

    def errors(self, name: str, split: str) -> list[float]:
        return [number(section(row, "stderr", split).get(name)) for row in self.evaluations
                if math.isfinite(number(section(row, split).get(name)))]

    def measures(self) -> dict[str, Curve]:
        """What the monitor followed, without the time that it took."""
        names = dict.fromkeys(name for row in self.monitored for name in section(row, "sharpness"))
        return {str(name): _finite([(number(row.get("step")), number(section(row, "sharpness").get(name)))
                                    for row in self.monitored])
                for name in names if not str(name).endswith("/overhead")}

    def finals(self) -> list[Final]:
        """The metrics at the end."""
        return [Final(SPLITS.get(split, printable(split)), label(metric),
                      supported(number(found.get("value")), number(found.get("stderr"))),
                      error_of(number(found.get("stderr"))), f"{number(found.get('weight')):,.0f}",
                      found.get("higher_is_better") is True)
                for split in section(self.record, "metrics") for metric, found in
                ((m, section(self.record, "metrics", split, m)) for m in section(self.record, "metrics", split))]

    def findings(self) -> list[tuple[Mapping[str, Any], float]]:
        """Of the whole run, each with the step after which it was said while the run went on (nan: it was not); then
        those that were said and are no longer true."""
        last = [f for f in items(self.record.get("diagnosis")) if isinstance(f, Mapping)]
        said = {f.get("name"): number(f.get("step")) + 1 for f in reversed(self.live)}
        gone = [f for f in self.live if f.get("name") not in {g.get("name") for g in last}]
        return [(f, said.get(f.get("name"), math.nan)) for f in (*last, *gone)]

    def size(self) -> str:
        ranks = number(self.place.get("ranks"))
        return (f"{number(self.model.get('parameters')):,.0f} parameters, {printable(self.place.get('device'))}"
                + (f", {ranks:.0f} processes" if ranks > 1 else ""))

    def speed(self) -> str:
        """Samples or tokens a second."""
        found = section(self.record, "throughput")
        value = number(found.get("value"))
        return f"{significant(value)} {printable(found.get('unit'))}" if math.isfinite(value) else ""


def label(metric: object) -> str:
    return METRICS.get(str(metric), printable(metric).replace("_", " "))


def sentence(finding: Mapping[str, Any], step: float = math.nan) -> str:
    """A finding as one would say it, and the step after which it was said while the run went on."""
    evidence = ", ".join(f"{printable(k)} {significant(number(v))}" for k, v in section(finding, "evidence").items())
    symptom, cause, solution = (printable(finding.get(k) or "") for k in ("symptom", "cause", "solution"))
    return f"{symptom[:1].upper()}{symptom[1:]} ({evidence}): {cause}. {solution[:1].upper()}{solution[1:]}." \
        + (f" Said after step {step:,.0f} of the run." if math.isfinite(step) else "")


def _finite(pairs: list[tuple[float, float]]) -> Curve:
    kept = [(step, value) for step, value in pairs if math.isfinite(step) and math.isfinite(value)]
    return Curve([step for step, _ in kept], [value for _, value in kept])
