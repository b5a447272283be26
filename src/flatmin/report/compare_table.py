"""The results of ``flatmin compare`` as an aligned table for the terminal."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import Any

from .compare_findings import compared, diagnosed
from .compare_record import PARTS, CompareRecord
from .fields import number
from .formatting import count, minus, significant, total


def table(record: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over seeds, one method a line, as plain text.

    A residual stands behind its eigenvalue in parentheses; "1st + 2nd" are the means of the parts of one-step
    sharpness, followed by the rest where that is more than a quarter; "× SGD" is the time of a step in units of SGD's.
    """
    r = CompareRecord(record)
    names = [r.metrics[name].short for name in r.columns]
    head = ["mean ± sd" if r.most_seeds() > 1 else "", "ρ", *names[:-1], "= 1st + 2nd", names[-1], "ms/step",
            f"× {r.label(r.baseline)}"]
    rows = []
    for m in r.methods:
        cells = [r.metrics[name].text(r.stat(m, name)) for name in r.columns]
        residual = r.stat(m, "residual")
        cells[-1] += f" ({power(residual.mean)})" if residual.known else ""
        rows.append([r.label(m), _radius(r, m), *cells[:-1], parts(r, m) or "–", cells[-1], *step_time(r, m)])
    keep = [0, *(i for i in range(1, len(head)) if any(row[i] != "–" for row in rows))]
    lines = [[row[i] for i in keep] for row in [head, *rows]]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([_pad(line[0], widths[0], left=True), *map(_pad, line[1:], widths[1:])]).rstrip()
            for line in lines]
    found = [line for item in diagnosed(r) for line in textwrap.wrap("".join(item), 100, subsequent_indent="  ")]
    return "\n".join([text[0], "─" * max(map(_width, text)), *text[1:], *_notes(r), *found])


def parts(r: CompareRecord, method: str) -> str:
    """The parts of one-step sharpness as a sum with the decimals worth reading; "" where they are unknown."""
    if not all(r.stat(method, m).known for m in PARTS):
        return ""
    shown = r.parts(method)
    shown = shown[:2] if r.explained(method) else shown
    size = max(map(abs, shown[:2]))
    decimals = max(0, 2 - math.floor(math.log10(size))) if 1e-4 <= size < 1e5 else 0
    return total([minus(f"{v:.{decimals}f}" if decimals else f"{v:.1e}") for v in shown])


def power(value: float) -> str:
    """One digit: 2e-3, not 2e-03."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def step_time(r: CompareRecord, method: str) -> tuple[str, str]:
    """Milliseconds a step, and the ratio to the baseline's."""
    seconds, ratio = r.timing(method)
    return (significant(1e3 * seconds) if math.isfinite(seconds) else "–",
            f"{ratio:.2f}" if math.isfinite(ratio) else "–")


def _radius(r: CompareRecord, method: str) -> str:
    rho = next((number(x.get("rho")) for x in r.runs(method)), math.nan)
    return f"{rho:g}" if math.isfinite(rho) else "–"


def _notes(r: CompareRecord) -> list[str]:
    counts = {r.stat(m, r.first).n for m in r.methods} - {0}
    seeds = f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else count(max(counts, default=0), "seed")
    out = [f"± is the standard deviation over {seeds}" if r.most_seeds() > 1 else f"no spread: {seeds}"]
    if math.isfinite(r.probe()):
        out.append(f"one-step sharpness at ρ = {r.probe():g}")
    if any(r.stat(m, "residual").known for m in r.methods):
        out.append("eigenvalue (residual)")
    if not all(map(r.explained, r.methods)):
        out.append("a third part is what slope and curvature leave unexplained")
    lines, idle = [", ".join(out), *compared(r)], r.not_learnt()
    if idle:
        lines.append(f"not above chance ({100 * r.chance:.1f} %), so not compared: {', '.join(map(r.label, idle))}")
    for m in r.methods:
        tried = r.next_radius(m)
        lines += [f"{r.label(m)}: {tried[2]} at ρ = {tried[0]:g}; try {tried[1]:g} next"] if tried else []
    return lines


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _pad(text: str, width: int, left: bool = False) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text
