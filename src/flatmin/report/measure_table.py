"""The results of ``flatmin measure`` as aligned plain text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .measure_findings import sentence
from .measure_record import LABELS, MeasureRecord, Row

NOTES = {3: "computation: the residual of an eigenvalue, else the standard error over random draws",
         4: "data: the standard error over batches"}


def table(record: Mapping[str, Any]) -> str:
    """Each number with its errors, what they say together, and what to know before reading on."""
    m = MeasureRecord(record)
    rows = [Row("", "", "value", "computation", "data"), *m.rows()]
    shown = [i for i in range(1, 6) if i in (1, 2) or any(row[i] for row in rows[1:])]
    numbers = aligned([[row[i] for i in shown] for row in rows])
    pictures = [LABELS[name] for name in ("density", "line", "surface") if m.result(name)]
    return "\n".join([
        f"{m.name} · {m.size()}", *textwrap.wrap(m.setting(), 100), "─" * max(40, *map(len, numbers[:1])), *numbers,
        *textwrap.wrap("; ".join(NOTES[i] for i in shown if i in NOTES), 100), *_two_models(m),
        *([f"pictures in the report: {', '.join(pictures)}"] if pictures else []),
        "", *textwrap.wrap(f"{sentence(m)} {m.verdict('agreement')}", 100),
        *(f"warning: {text}" for text in m.warnings()), *(f"not measured: {text}" for text in m.not_measured())])


def _two_models(m: MeasureRecord) -> list[str]:
    rows = m.compared()
    if not rows:
        return []
    head = ("", *m.names(), "difference ± standard error", "sharper")
    return ["", *aligned([head, *((*row[:4], row.sharper + " (invariant)" * row.invariant) for row in rows)]),
            *textwrap.wrap(m.verdict("comparison"), 100)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
