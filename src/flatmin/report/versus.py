"""Two models side by side, from the comparison in a record of ``flatmin measure``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from html import escape
from typing import Any

from .figures import RULE, color, draw
from .reading import number, numbers, section, significant

NAMES = {"one_step": "one-step sharpness", "largest_eigenvalue": "largest eigenvalue", "worst_case": "worst case",
         "adaptive_worst_case": "worst case, adaptive", "normalized_flatness": "normalized flatness, Σ w²H"}


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def names(part: Mapping[str, Any]) -> tuple[str, str]:
    given = section(part, "settings").get("names")
    a, b = given if isinstance(given, list) and len(given) == 2 else ("A", "B")
    return printable(str(a)), printable(str(b))


def rows(part: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, bool]]:
    """(measure, of A, of B, their difference with its error, which is sharper, whether rescaling leaves it alone)."""
    out, (a, b) = [], names(part)
    for name in section(part, "rows"):
        row = section(part, "rows", name)
        sharper = {1.0: a, -1.0: b}.get(number(row.get("sign")), "undecided")
        error = number(row.get("stderr"))
        difference = signed(number(row.get("value"))) + (f" ± {significant(error, 2)}" if error >= 0 else "")
        if "data_stderr" in row and not math.isfinite(number(row["data_stderr"])):
            sharper += ", on these data alone" if sharper != "undecided" else ""
        out.append((NAMES.get(str(name), printable(str(name))), significant(number(row.get("a"))),
                    significant(number(row.get("b"))), difference, sharper, row.get("invariant") is True))
    return out


def signed(value: float) -> str:
    return significant(value).replace("-", "−", 1) if value < 0 else f"+{significant(value)}" if value > 0 else \
        significant(value)


def summary(part: Mapping[str, Any]) -> list[str]:
    """The comparison as aligned plain text."""
    if not part:
        return []
    a, b = names(part)
    table = [("", a, b, "difference", "sharper"),
             *(row[:4] + (row[4] + " (invariant)" * row[5],) for row in rows(part))]
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    return ["", *("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table),
            *textwrap.wrap(printable(str(part.get("sentence", ""))), 100)]


def html(part: Mapping[str, Any]) -> str:
    """A section of the page; "" where nothing was compared."""
    found = rows(part)
    if not found:
        return ""
    a, b = map(escape, names(part))
    body = "".join(f"<tr><th>{escape(name)}</th><td><b>{escape(x)}</b></td><td><b>{escape(y)}</b></td>"
                   f"<td>{escape(difference)}</td><td>{escape(sharper)}</td>"
                   f"<td>{'yes' if invariant else 'no'}</td></tr>"
                   for name, x, y, difference, sharper, invariant in found)
    scale = number(part.get("scale"))
    apart = f"Norms of corresponding weights are up to {scale:.3g} times apart." if math.isfinite(scale) else ""
    return (f"<section><h2>{a} and {b}</h2><p>{escape(printable(str(part.get('sentence', ''))))} {apart}</p>"
            f'<div class="scroll" tabindex="0"><table class="small"><thead><tr><th></th><th>{a}</th><th>{b}</th>'
            f"<th>difference ± standard error</th><th>sharper</th><th>invariant to rescaling</th></tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
            f"{_path(section(part, 'path'), names(part))}</section>")


def _path(path: Mapping[str, Any], ends: tuple[str, str]) -> str:
    x, y, models = (numbers(path.get(k)) for k in ("x", "values", "models"))
    if len(x) < 2 or len(x) != len(y) or len(models) != 2:
        return ""

    def paint(axes: Any) -> None:
        axes.plot(x, [v if math.isfinite(v) else math.nan for v in y], color=color(1), linewidth=2, gid="s1|loss")
        for c, name in zip(models, ends, strict=True):
            axes.axvline(c, color=RULE, linewidth=1, zorder=0.5)
            axes.annotate(name, (c, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        axes.set_xlabel("distance along the straight line")
        axes.margins(x=0.01)

    picture = draw(paint, "loss on the line between two models", size=(6.6, 3.3))
    return (f'<figure style="max-width:680px;margin-top:28px"><h3>Loss from one to the other</h3><figcaption>on the '
            f"straight line, and beyond</figcaption>{picture}</figure>")
