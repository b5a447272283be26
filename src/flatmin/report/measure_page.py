"""What the page of ``flatmin measure`` shows, as plain data; ``templates/measure.html`` lays it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import measure_figures as draw
from .fields import details, items, number, numbers, section
from .formatting import count, error_of, printable, significant, supported, with_error
from .measure_findings import headline, sentence
from .measure_record import MeasureRecord, Row
from .surface import turnable
from .table import Table

LONGEST = 200                           # rows of eigenvalues
FIRST = ("one_step", "spectrum", "trace", "density", "worst_case")       # what stands beside the headline
OTHERS = ("worst_case", "adaptive_worst_case", "average_case", "largest_random", "m_sharpness", "normalized_flatness",
          "critical_sharpness", "agreement")
ERRORS = "error of the computation", "standard error over batches"
STEP = {"loss": "loss", "perturbed_loss": "loss after the step", "gradient_norm": "norm of the gradient",
        "radius": "length of the step"}


def contents(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of the page shows of a record."""
    m = MeasureRecord(record)
    rows, surface, status = m.rows(), m.result("surface"), str(record.get("status"))
    first = [next((row for row in rows if row.measure == name), None) for name in FIRST]
    names = [printable(n) for n in items(surface.get("names"))]
    turn = turnable(surface, "values", "Loss surface", names if len(names) == 2 else ["", ""])
    return {
        "name": m.name, "unfinished": "" if status in ("complete", "failed") else status, "headline": headline(m),
        "sentence": sentence(m),
        "setting": f"{m.size()}; {m.model.get('name')}; {m.setting()}; evaluated in mode “{m.data.get('mode')}”.",
        "first": [row for row in first if row], "warnings": m.warnings(), "not_measured": m.not_measured(),
        "rho": f"{m.rho:g}", "step": draw.parts(m),
        "step_facts": [(words, significant(m.get("one_step", key), 5)) for key, words in STEP.items()],
        "eigenvalues": _eigenvalues(m, rows), "trace": _trace(m), "density": draw.density(m),
        "density_facts": _density(m), "exact": section(m.result("density"), "settings").get("method") == "exact",
        "others": _table("Other measures", ["measure", "value", *ERRORS, "how it was found"],
                         [row[1:] for row in rows if row.measure in OTHERS]),
        "average": bool(m.result("average_case")), "agreement": m.verdict("agreement"), "two_models": _two_models(m),
        "line": draw.loss_line(m), "surfaces": [turn] if turn else [],
        "directions": count(len(items(m.result("line").get("samples"))), "random filter-normalised direction"),
        "points": f"{len(numbers(surface.get('x')))} × {len(numbers(surface.get('y')))}",
        "details": details(
            ("Settings", m.settings), ("Settings of each measure", {k: section(m.result(k), "settings")
                                                                    for k in m.results}),
            ("Model", m.model), ("Data", m.data), ("Seconds", record.get("timing")),
            ("Versions", record.get("versions"))),
    }


def _eigenvalues(m: MeasureRecord, rows: list[Row]) -> dict[str, Any] | None:
    pairs, shown = m.pairs(), [row for row in rows if row.measure == "spectrum"][:LONGEST]
    table = _table("Largest eigenvalues", ["eigenvalue", "value", "residual", ERRORS[1], ""],
                   [(*row[1:5], "✓ converged" if pair.converged else "✗ not converged")
                    for row, pair in zip(shown, pairs, strict=False)])
    return {"table": table, "svg": draw.eigenvalues(pairs),
            "products": _products(m.result("spectrum"))} if table else None


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | None:
    """Without columns that are empty."""
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return Table(title, [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else None


def _trace(m: MeasureRecord) -> dict[str, Any] | None:
    r, size = m.result("trace"), m.parameters or math.nan
    value, error, data = (m.get("trace", k) for k in ("value", "stderr", "data_stderr"))
    low, high, *_ = [*numbers(r.get("interval")), math.nan, math.nan]
    facts = [("standard error over random probes", error_of(error)), (ERRORS[1], error_of(data)),
             ("mean eigenvalue, trace / d", supported(value / size, error / size)),
             (f"interval, {100 * number(r.get('confidence')):.0f} %", f"{supported(low, error)} to "
              f"{supported(high, error)}"),
             ("Hessian-vector products", _products(r)),
             ("relative error asked for", str(section(r, "settings").get("rtol", "")))]
    return {"value": supported(value, error, data), "converged": bool(r.get("converged")),
            "facts": [(k, v) for k, v in facts if v]} if r else None


def _density(m: MeasureRecord) -> list[tuple[str, str]]:
    r = m.result("density")
    zero, trace = (with_error(number(part.get("value")), number(part.get("stderr"))) for part in
                   (section(r, "mass_at_zero"), section(r, "trace")))
    return [("share of eigenvalues next to zero", zero),
            ("counted as zero", f"|λ| ≤ {significant(number(r.get('zero')), 2)}"),
            ("trace from this density", trace), ("Hessian-vector products", _products(r))]


def _products(r: Mapping[str, Any]) -> str:
    return f"{number(r.get('matvecs')):.0f}"


def _two_models(m: MeasureRecord) -> dict[str, Any] | None:
    scale, names = m.get("comparison", "scale"), m.names()
    heads = ["measure", *names, "difference ± standard error", "sharper", "invariant to rescaling"]
    table = _table("Two models", heads, [(*row[:5], "yes" if row.invariant else "no") for row in m.compared()])
    return {"names": names, "sentence": m.verdict("comparison"), "table": table,
            "scale": f"{scale:.3g}" if math.isfinite(scale) else "", "svg": draw.loss_between(m)} if table else None
