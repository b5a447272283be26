"""What the table, the sentences and the page of ``flatmin measure`` ask of its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .fields import items, number, numbers, section
from .formatting import count, error_of, printable, signed, significant, supported, total, with_error

LABELS = {
    "one_step": "one-step sharpness", "spectrum": "largest eigenvalues", "trace": "trace of the Hessian",
    "density": "spectral density", "worst_case": "worst case", "adaptive_worst_case": "adaptive worst case",
    "average_case": "average case", "largest_random": "largest random rise", "m_sharpness": "m-sharpness",
    "normalized_flatness": "normalized flatness, Σ w²H", "critical_sharpness": "critical sharpness, 2/η_c",
    "agreement": "agreement, order of remainder", "line": "line", "surface": "surface",
    "comparison": "comparison of the two models", "largest_eigenvalue": "largest eigenvalue",
}
PARTS = {"first_order": "slope, ρ‖g‖", "second_order": "curvature, ½ρ²ĝᵀHĝ", "remainder": "remainder"}


class Row(NamedTuple):
    """A measured number as text: its measure, what it is, its two errors ("" where there is none), how it was found."""

    measure: str
    what: str
    value: str
    computation: str = ""
    data: str = ""
    how: str = ""


class Pair(NamedTuple):
    """An eigenvalue, its residual, its standard error over batches, and whether it converged."""

    value: float
    residual: float
    data: float
    converged: bool


class Compared(NamedTuple):
    """A measure of two models as text."""

    what: str
    first: str
    second: str
    difference: str
    sharper: str
    invariant: bool


class MeasureRecord:
    """A record of ``flatmin measure``; nothing in it is trusted to be there or to be a number."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.settings, self.data, self.model = (section(record, k) for k in ("settings", "data", "model"))
        self.results, self.failed = section(record, "results"), section(record, "failed")
        self.name = printable(self.data.get("name"))
        self.parameters = number(self.model.get("parameters"))
        self.loss = number(self.data.get("loss"))

    def result(self, name: str) -> Mapping[str, Any]:
        return section(self.results, name)

    def get(self, name: str, key: str = "value") -> float:
        return number(self.result(name).get(key))

    @property
    def rho(self) -> float:
        return number(section(self.result("one_step"), "settings").get("rho"))

    def size(self) -> str:
        samples, tokens = (number(self.data.get(k)) for k in ("samples", "predicted_tokens"))
        data = f"{tokens:,.0f} predicted tokens in {samples:,.0f} windows of {number(self.data.get('context')):.0f}" \
            if math.isfinite(tokens) else f"{samples:,.0f} samples"
        return f"{self.parameters:,.0f} parameters, {data}, loss {significant(self.loss, 4)}{self._unit()}"

    def _unit(self) -> str:
        return " nats a token" if self.data.get("units") == "tokens" else ""

    def setting(self) -> str:
        """Which weights and which loss were measured."""
        more = [str(self.data[k]) for k in ("mask", "share") if k in self.data]
        if self.data.get("text") is not None:
            more.insert(0, f"text: {self.data['text']}")
        return printable("; ".join([f"weights {self._origin()}", f"loss: {self.data.get('loss_function')}", *more]))

    def _origin(self) -> str:
        weights = str(self.model.get("weights"))
        return weights if weights.startswith("as ") else f"from {weights}"

    def pairs(self) -> list[Pair]:
        """The eigenvalues with their errors, the largest first."""
        r = self.result("spectrum")
        values, residuals, data = (numbers(r.get(k)) for k in ("eigenvalues", "residuals", "data_stderr"))
        unknown = [math.nan] * len(values)      # the standard errors where there are few batches
        done = [*items(r.get("converged")), *unknown]
        found = [Pair(v, e, s, d is True) for v, e, s, d in zip(values, residuals + unknown, data + unknown, done,
                                                                strict=False)]
        return sorted(found, key=lambda p: -p.value if p.value == p.value else math.inf)

    def parts(self) -> dict[str, float]:
        """The parts of one-step sharpness; none where they are not known."""
        value, first, second = (self.get("one_step", key) for key in ("value", "first_order", "second_order"))
        remainder = value - first - second
        return dict(zip(PARTS, (first, second, remainder), strict=True)) if math.isfinite(remainder) else {}

    def explained(self) -> bool:
        """Whether slope and curvature at the point say how the loss rises over the step."""
        return self.result("one_step").get("expansion_holds") is not False

    def warnings(self) -> list[str]:
        """Each text once, with the measures that gave it."""
        found: dict[str, list[str]] = {}
        for measure, given in section(self.record, "warnings").items():
            for item in items(given):
                found.setdefault(str(section(item).get("text")), []).append(LABELS.get(measure, str(measure)))
        return [f"{text} ({'; '.join(measures)})" for text, measures in found.items()]

    def not_measured(self) -> list[str]:
        return [f"{LABELS.get(name, str(name))}: {why}" for name, why in self.failed.items()]

    def verdict(self, name: str) -> str:
        """The sentence that a measure gives itself."""
        return str(self.result(name).get("sentence", ""))

    def rows(self) -> list[Row]:
        """Every scalar."""
        out: list[Row] = []
        if self.result("one_step"):
            how = total([f"{significant(v)} {PARTS[key].split(',')[0]}" for key, v in self.parts().items()])
            out.append(self._row("one_step", f"= {how}" + "; beyond the range of both" * (not self.explained())))
        for i, (value, residual, data, converged) in enumerate(self.pairs(), 1):
            out.append(Row("spectrum", f"eigenvalue {i}" if i > 1 else "largest eigenvalue",
                           supported(value, residual, data), error_of(residual), error_of(data),
                           "converged" if converged else "NOT CONVERGED"))
        out += [self._row(name, how(self.result(name))) for name, how in HOW.items() if self.result(name)]
        zero = section(self.result("density"), "mass_at_zero")
        if zero:
            nodes = [v for row in items(self.result("density").get("nodes")) for v in numbers(row) if math.isfinite(v)]
            value, error = number(zero.get("value")), number(zero.get("stderr"))
            out.append(Row("density", "share of eigenvalues next to 0", supported(value, error), error_of(error), "",
                           f"nodes from {significant(min(nodes))} to {significant(max(nodes))}" if nodes else ""))
        if self.result("agreement"):
            order = self.get("agreement")
            out.append(Row("agreement", LABELS["agreement"], significant(order) if math.isfinite(order) else "–",
                           how=_agreement(self.result("agreement"))))
        return out

    def _row(self, name: str, how: str) -> Row:
        error, data = self.get(name, "stderr"), self.get(name, "data_stderr")
        error = math.nan if name == "largest_random" else error       # of the mean of the draws, not of the largest
        return Row(name, f"{LABELS[name]}{self._at(name)}", supported(self.get(name), error, data), error_of(error),
                   error_of(data), how)

    def _at(self, name: str) -> str:
        """The settings of a measure that belong to its name."""
        given = section(self.result(name), "settings")
        rho, m = number(given.get("rho")), number(given.get("m"))
        if name == "average_case":
            return f", σ = {rho:.3g} a weight"
        return f", m = {m:g}" * math.isfinite(m) + f", ρ = {rho:g}" * math.isfinite(rho)

    def names(self) -> tuple[str, str]:
        """Of the two models that were compared."""
        first, second, *_ = [*items(section(self.result("comparison"), "settings").get("names")), "A", "B"]
        return printable(first), printable(second)

    def compared(self) -> list[Compared]:
        """The two models side by side, by each measure."""
        rows, (a, b) = section(self.result("comparison"), "rows"), self.names()
        out = []
        for name, row in ((name, section(rows, name)) for name in rows):
            sharper = {1.0: a, -1.0: b}.get(number(row.get("sign")), "undecided")
            if sharper != "undecided" and not math.isfinite(number(row.get("data_stderr"))):
                sharper += ", on these data alone"
            difference = signed(with_error(number(row.get("value")), number(row.get("stderr"))))
            out.append(Compared(printable(LABELS.get(name, name)), significant(number(row.get("a"))),
                                significant(number(row.get("b"))), difference, sharper, row.get("invariant") is True))
        return out


def _evaluations(r: Mapping[str, Any]) -> str:
    return f"{number(r.get('evaluations')):.0f} evaluations"


def _agreement(r: Mapping[str, Any]) -> str:
    if math.isinf(number(r.get("value"))):
        return "all rounding: quadratic along the gradient, as far as this precision tells"
    if not isinstance(r.get("third_order"), bool):
        return "too near rounding to be tested"
    return "falls as ρ³, as it must" if r["third_order"] else "does not fall as ρ³"


HOW: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "trace": lambda r: f"{number(r.get('matvecs')):.0f} Hessian-vector products"
                       + ", NOT to the error asked for" * (not r.get("converged")),
    "worst_case": lambda r: f"a lower bound, {_evaluations(r)}",
    "adaptive_worst_case": lambda r: f"a lower bound, {_evaluations(r)}",
    "average_case": _evaluations,
    "largest_random": lambda r: f"of {count(len(numbers(r.get('draws'))), 'random direction')}, "
                                f"mean {significant(number(r.get('mean')))}",
    "m_sharpness": lambda r: count(len(numbers(r.get("chunks"))), "chunk"),
    "normalized_flatness": lambda r: "exact" if r.get("exact") is True
    else f"{number(r.get('matvecs', r.get('products'))):.0f} Hessian-vector products",
    "critical_sharpness": lambda r: "the loss falls along −g up to η_c = "
                                    + significant(number(r.get("critical_rate"))),
}
"""How each measure was found, from its result."""
