"""The results as an aligned table for the terminal, and as an HTML table whose cells also draw their seeds."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from .findings import diagnosed
from .reading import Reading, gap, in_range, number, numbers, plus_minus, section, significant


@dataclass(frozen=True)
class Column:
    """A measured quantity: its key, its heading, what to multiply it by, whether large is good."""

    metric: str
    heading: str
    scale: float = 1.0
    up: bool = False
    digits: int = 0


COLUMNS = (
    Column("accuracy", "Accuracy, %", 100.0, True, 1),
    Column("nll", "Negative log-likelihood"),
    Column("ece", "Calibration error"),
    Column("sharpness", "One-step sharpness"),
    Column("eigenvalue", "Largest Hessian eigenvalue"),
)
PARTS = ("first_order", "second_order")
CONTROL = {i: "�" for i in (*range(32), *range(127, 160))}


def table(record: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over seeds, one method a line, as plain text.

    A residual stands behind its eigenvalue in parentheses; "1st + 2nd" are the means of the parts of one-step
    sharpness, followed by the rest where that is more than a quarter; "× SGD" is the time of a step in units of SGD's.
    """
    r = Reading(record)
    head = ["", "ρ", "accuracy %", "NLL", "ECE", "sharpness", "= 1st + 2nd", "λ_max", "ms/step",
            f"× {r.label(r.baseline)}"]
    rows = [[r.label(m), _radius(r, m), *(_cell(r, m, c) for c in COLUMNS), *_time(r, m)] for m in r.methods]
    for row, m in zip(rows, r.methods, strict=True):
        row.insert(6, _parts(r, m))
    keep = [0, *(i for i in range(1, len(head)) if any(row[i] != "–" for row in rows))]
    lines = [[row[i] for i in keep] for row in [head, *rows]]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(keep))]
    text = ["  ".join([_pad(line[0], widths[0], left=True), *(_pad(c, w) for c, w in zip(line[1:], widths[1:],
                                                                                       strict=True))]).rstrip()
            for line in lines]
    told = [f"{head}{rest}".translate(CONTROL) for head, rest in diagnosed(r)]
    return "\n".join([text[0], "─" * max(map(_width, text)), *text[1:], *_note(r),
                      *(line for item in told for line in textwrap.wrap(item, 100, subsequent_indent="  "))])


def _radius(r: Reading, method: str) -> str:
    rho = next((number(x.get("rho")) for x in r.runs(method)), math.nan)
    return f"{rho:g}" if math.isfinite(rho) else "–"


def html_table(record: Mapping[str, Any]) -> str:
    """The same numbers; under each a strip, on its column's common scale: a tick for each seed, a dot for the mean.

    Strong figures are the best of their column or cannot be told from it.
    """
    r = Reading(record)
    shown = [c for c in COLUMNS if any(r.stat(m, c.metric).n for m in r.methods)]
    strong = {c.metric: _strong(r, c) for c in shown}
    timed = any(math.isfinite(x) for m in r.methods for x in r.timing(m))
    head = "".join(f'<th scope="col">{escape(c.heading)}<small>{_note_on(r, c)}</small></th>' for c in shown)
    if timed:
        head += f'<th scope="col">Time a step<small>ms; × {escape(r.label(r.baseline))} (middle half)</small></th>'
    body = []
    for i, m in enumerate(r.methods):
        cells = "".join(_html_cell(r, m, c, m in strong[c.metric]) for c in shown)
        if timed:
            ms, ratio = _time(r, m)
            cells += f"<td><b>{escape(ms)}</b><small>{escape(ratio)} ×{_quartiles(r, m)}</small></td>"
        body.append(f'<tr class="s{i}"><th scope="row">{escape(r.label(m))}</th>{cells}</tr>')
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="Results"><table><thead><tr><th scope="col">'
            f'Method</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def _cell(r: Reading, method: str, column: Column) -> str:
    text = plus_minus(r.stat(method, column.metric), column.scale, column.digits)
    residual = r.stat(method, "residual") if column.metric == "eigenvalue" else None
    return f"{text} ({_power(residual.mean)})" if residual is not None and residual.known else text


def _parts(r: Reading, method: str) -> str:
    """The two parts with as many decimals as the sharpness has digits worth reading."""
    parts = [r.stat(method, m) for m in PARTS]
    if not all(p.known for p in parts):
        return "–"
    size = max(abs(p.mean) for p in parts)
    decimals = max(0, 2 - math.floor(math.log10(size))) if 1e-4 <= size < 1e5 else 0
    shown = r.parts(method)
    shown = shown[:2] if in_range(*shown) else shown
    text = " + ".join(f"{v:.{decimals}f}" if decimals else f"{v:.1e}" for v in shown)
    return text.replace("+ -", "− ")


def _power(value: float) -> str:
    """2e-3, not 2e-03."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _time(r: Reading, method: str) -> tuple[str, str]:
    seconds, ratio = r.timing(method)
    return (significant(1e3 * seconds) if math.isfinite(seconds) else "–",
            f"{ratio:.2f}" if math.isfinite(ratio) else "–")


def _quartiles(r: Reading, method: str) -> str:
    """The middle half of the ratios step by step, where it was measured against the baseline."""
    low, high = [*numbers(section(r.record, "timing", method).get("quartiles")), math.nan, math.nan][:2]
    unit = number(section(r.record, "timing", r.baseline).get("ratio"))
    return f" ({low:.2f} to {high:.2f})" if unit == 1 and low < high else ""


def _note(r: Reading) -> list[str]:
    counts = {r.stat(m, "accuracy").n for m in r.methods} - {0}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts) if counts else "no"
    spread = "± is the standard deviation over" if counts and max(counts) > 1 else "no spread:"
    probe = f", one-step sharpness at ρ = {r.probe():g}" if math.isfinite(r.probe()) else ""
    residual = ", eigenvalue (residual)" if any(r.stat(m, "residual").known for m in r.methods) else ""
    beyond = any(r.stat(m, "second_order").known and not in_range(*r.parts(m)) for m in r.methods)
    rest = ", a third part is what slope and curvature leave unexplained" if beyond else ""
    idle = [r.label(m) for m in r.methods if r.stat(m, "accuracy").known and not r.learnt(m)]
    chance = [f"not above chance ({100 * r.chance:.1f} %), so not compared: {', '.join(idle)}"] if idle else []
    return [f"{spread} {seeds} seed{'' if seeds == '1' else 's'}{probe}{residual}{rest}", *chance, *_next_radii(r)]


def _next_radii(r: Reading) -> list[str]:
    """The radius to try next, where the diagnosis of a method asks for another one."""
    out = []
    for m in r.methods:
        part = section(r.record, "diagnosis", m)
        now, tried = number(part.get("rho")), number(part.get("next_rho"))
        if math.isfinite(tried) and tried != now:
            out.append(f"{r.label(m)}: {part.get('next_rho_because')} at ρ = {now:g}; try {tried:g} next")
    return out


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int, left: bool = False) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text


def _strong(r: Reading, column: Column) -> set[str]:
    known = [m for m in r.methods if r.competes(m, column.metric)]
    if len(known) < 2:
        return set()
    best = (max if column.up else min)(known, key=lambda m: r.stat(m, column.metric).mean)
    top = r.stat(best, column.metric)
    tied = {m for m in known if not gap(top, r.stat(m, column.metric)).decided}
    return tied if len(tied) < len(known) or len(known) < len(r.methods) else set()


def _note_on(r: Reading, column: Column) -> str:
    if column.metric == "sharpness" and math.isfinite(r.probe()):
        return f"ρ = {r.probe():g}; first ■ and second □ order"
    if column.metric == "eigenvalue":
        return "of the training loss"
    return "higher is better" if column.up else "lower is better"


def _html_cell(r: Reading, method: str, column: Column, strong: bool) -> str:
    text = escape(plus_minus(r.stat(method, column.metric), column.scale, column.digits))
    value, _, spread = text.partition(" ± ")
    value = f"<b>{value}</b>" + (f" <span>± {spread}</span>" if spread else "")
    below = strip(r, method, column)
    if column.metric == "sharpness":
        below += _bar(r, method)
    residual = r.stat(method, "residual")
    if column.metric == "eigenvalue" and residual.known:
        below += f"<small>residual {_power(residual.mean)}</small>"
    return f"<td{' class=strong' if strong else ''}>{value}{below}</td>"


def scale(r: Reading, column: Column) -> tuple[float, float]:
    """From the lowest seed of any method to the highest; nan where there is none."""
    every = [v for m in r.methods for v in [*r.seeds(m, column.metric), r.stat(m, column.metric).mean]]
    every = [v for v in every if math.isfinite(v)]
    return min(every, default=math.nan), max(every, default=math.nan)


def strip(r: Reading, method: str, column: Column, width: int = 100) -> str:
    """The seeds of a method on the scale that all methods of a column share."""
    low, high = scale(r, column)
    stat = r.stat(method, column.metric)
    if not stat.known or not low < high:
        return ""

    def place(v: float) -> str:
        return f"{4 + (width - 8) * (v - low) / (high - low):.1f}"

    ticks = "".join(f"M{place(v)} 1.5V10.5" for v in r.seeds(method, column.metric) if math.isfinite(v))
    return (f'<svg class="strip" viewBox="0 0 {width} 12" aria-hidden="true"><path class="rail" d="M0 6H{width}"/>'
            f'<path class="ticks" d="{ticks}"/><circle cx="{place(stat.mean)}" cy="6" r="3.2"/></svg>')


def _bar(r: Reading, method: str) -> str:
    """The parts of one-step sharpness, as shares of its largest mean, and in numbers."""
    first, second = (r.stat(method, m).mean for m in PARTS)
    whole = max((abs(r.stat(m, p).mean) for m in r.methods for p in PARTS if r.stat(m, p).known), default=0) * 1.4
    if not (math.isfinite(first) and math.isfinite(second) and whole > 0):
        return ""
    a, b = (min(100.0, 100 * max(v, 0.0) / whole) for v in (first, second))
    return (f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true"><rect width="{a:.1f}" '
            f'height="6"/><rect class="open" x="{a:.1f}" width="{b:.1f}" height="6"/></svg>'
            f"<small>{escape(_parts(r, method))}</small>")
