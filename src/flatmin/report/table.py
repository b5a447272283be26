"""The results as an aligned table for the terminal, and as an HTML table whose cells also draw their seeds."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .reading import Reading, plus_minus, significant


@dataclass(frozen=True)
class Column:
    """A measured quantity: its key, its heading, what to multiply it by, whether large is good (None: neither)."""

    metric: str
    heading: str
    long: str
    scale: float = 1.0
    up: bool | None = False


COLUMNS = (
    Column("accuracy", "accuracy %", "Accuracy, %", 100.0, True),
    Column("nll", "NLL", "Negative log-likelihood"),
    Column("ece", "ECE", "Calibration error"),
    Column("sharpness", "sharpness", "One-step sharpness"),
    Column("first_order", "1st order", "first-order part", up=None),
    Column("second_order", "2nd order", "second-order part", up=None),
    Column("eigenvalue", "λ_max", "Largest Hessian eigenvalue"),
)


def table(record: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over seeds, one method a line, as plain text.

    A residual stands behind its eigenvalue in parentheses; "× SGD" is the time a step costs in units of SGD's.
    """
    r = Reading(record)
    head = ["", *(c.heading for c in COLUMNS), "ms/step", f"× {r.label(r.baseline)}"]
    rows = [[r.label(m), *(_cell(r, m, c) for c in COLUMNS), *_time(r, m)] for m in r.methods]
    keep = [0, *(i for i in range(1, len(head)) if any(row[i] != "–" for row in rows))]
    lines = [[row[i] for i in keep] for row in [head, *rows]]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(keep))]
    text = ["  ".join([_pad(line[0], widths[0], left=True), *(_pad(c, w) for c, w in zip(line[1:], widths[1:],
                                                                                       strict=True))]).rstrip()
            for line in lines]
    return "\n".join([text[0], "─" * max(map(_width, text)), *text[1:], *_note(r)])


def html_table(record: Mapping[str, Any]) -> str:
    """The same numbers; under each, a strip with one tick a seed and a dot at the mean, on its column's common scale."""
    r = Reading(record)
    best = {c.metric: _best(r, c) for c in COLUMNS if c.up is not None}
    shown = [c for c in COLUMNS if any(r.stat(m, c.metric).n for m in r.methods)]
    timed = any(math.isfinite(x) for m in r.methods for x in r.timing(m))
    head = "".join(f'<th scope="col"{_part(c)}>{escape(c.long)}{_arrow(c)}</th>' for c in shown)
    if timed:
        head += f'<th scope="col">Time a step<small>ms, and times {escape(r.label(r.baseline))}’s</small></th>'
    body = []
    for i, m in enumerate(r.methods):
        cells = "".join(_html_cell(r, m, c, i, best.get(c.metric) == m) for c in shown)
        if timed:
            ms, ratio = _time(r, m)
            cells += f"<td><b>{escape(ms)}</b><small>{escape(ratio)} ×</small></td>"
        body.append(f'<tr class="s{i}"><th scope="row"><i></i>{escape(r.label(m))}</th>{cells}</tr>')
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="Results"><table><thead><tr><th scope="col">'
            f'Method</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def _cell(r: Reading, method: str, column: Column) -> str:
    text = plus_minus(r.stat(method, column.metric), column.scale)
    residual = r.stat(method, "residual") if column.metric == "eigenvalue" else None
    return f"{text} ({residual.mean:.0e})" if residual is not None and residual.known else text


def _time(r: Reading, method: str) -> tuple[str, str]:
    seconds, ratio = r.timing(method)
    return (significant(1e3 * seconds) if math.isfinite(seconds) else "–",
            f"{ratio:.2f}" if math.isfinite(ratio) else "–")


def _note(r: Reading) -> list[str]:
    counts = {r.stat(m, "accuracy").n for m in r.methods}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts) if counts else "no"
    spread = "mean ± sd over" if counts and max(counts) > 1 else "no spread:"
    probe = f", one-step sharpness at ρ = {r.probe():g}" if math.isfinite(r.probe()) else ""
    residual = ", eigenvalue (residual)" if any(r.stat(m, "residual").known for m in r.methods) else ""
    return [f"{spread} {seeds} seed{'' if seeds == '1' else 's'}{probe}{residual}"]


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int, left: bool = False) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text


def _best(r: Reading, column: Column) -> str | None:
    known = [m for m in r.methods if r.stat(m, column.metric).known]
    pick = max if column.up else min
    return pick(known, key=lambda m: r.stat(m, column.metric).mean) if len(known) > 1 else None


def _part(column: Column) -> str:
    return ' class="part"' if column.up is None else ""


def _arrow(column: Column) -> str:
    return {True: "<small>higher is better</small>", False: "<small>lower is better</small>", None: ""}[column.up]


def _html_cell(r: Reading, method: str, column: Column, index: int, best: bool) -> str:
    stat = r.stat(method, column.metric)
    text = escape(plus_minus(stat, column.scale))
    value, _, spread = text.partition(" ± ")
    value = f"<b>{value}</b>" + (f" <span>± {spread}</span>" if spread else "")
    residual = r.stat(method, "residual")
    if column.metric == "eigenvalue" and residual.known:
        value += f"<small>residual {residual.mean:.0e}</small>"
    kind = " ".join(filter(None, ["part" if column.up is None else "", "best" if best else ""]))
    return f'<td class="{kind}">{value}{_strip(r, method, column)}</td>'


def _strip(r: Reading, method: str, column: Column) -> str:
    every = [v for m in r.methods for v in [*r.seeds(m, column.metric), r.stat(m, column.metric).mean]]
    every = [v for v in every if math.isfinite(v)]
    stat = r.stat(method, column.metric)
    if column.up is None or not every or not stat.known or min(every) == max(every):
        return ""
    low, high = min(every), max(every)

    def place(v: float) -> str:
        return f"{4 + 92 * (v - low) / (high - low):.1f}"

    ticks = _ticks([place(v) for v in r.seeds(method, column.metric) if math.isfinite(v)])
    return (f'<svg class="strip" viewBox="0 0 100 12" aria-hidden="true"><path class="rail" d="M0 6H100"/>{ticks}'
            f'<circle cx="{place(stat.mean)}" cy="6" r="3.2"/></svg>')


def _ticks(places: Sequence[str]) -> str:
    return f'<path class="ticks" d="{"".join(f"M{x} 1.5V10.5" for x in places)}"/>' if places else ""
