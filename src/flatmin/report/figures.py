"""Figures as inline SVG: matplotlib draws them, the page's style sheet gives colors and fonts."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from markupsafe import Markup

INK, SOFT, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"  # placeholders for the colors of the page
# Okabe and Ito's colour-blind safe colors, darkened for paper, lightened for night; the first is the baseline's alone
LIGHT = ("#6d7178", "#0a66b0", "#cc5208", "#00876c", "#aa4f90", "#a87700", "#3d9ad3", "#74331f")
DARK = ("#a7abb3", "#62aef0", "#f58b4e", "#40c79f", "#e39bcc", "#e2b740", "#a5dcff", "#d69f8a")
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 11.5, "font.family": "sans-serif", "text.color": INK, "text.parse_math": False,
    "axes.edgecolor": RULE, "axes.labelcolor": SOFT, "axes.labelpad": 7, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.unicode_minus": True,
    "axes.formatter.useoffset": False, "axes.formatter.use_mathtext": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": RULE, "grid.linewidth": 0.6, "ytick.major.size": 0, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
}


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading and a caption."""

    heading: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class LineStyle:
    """How the lines and points of a method look: color, dashes and marker, for matplotlib and for the legend."""

    color: int
    dashes: Any
    marker: str
    stroke: str
    shape: str


STYLES = (("-", "o", "", "circle"), ((0, (5, 2)), "s", "7 3", "square"), ((0, (1.2, 1.6)), "^", "2 2.4", "triangle"))


def line_style(index: int) -> LineStyle:
    """Of the method with this index; dashes and markers change once the colors are used up."""
    turn, color_index = divmod(index - 1, len(LIGHT) - 1) if index else (0, -1)
    return LineStyle(color_index + 1, *STYLES[turn % len(STYLES)])


def color(index: int) -> str:
    """The placeholder for the color of a method; the style sheet has one for light and one for dark."""
    return f"#0102{line_style(index).color:02x}"


def draw(paint: Callable[[Any], None], title: str, height: float = 3.7) -> Markup:
    """One axes as an ``<svg>`` that takes the width it is given, the colors from CSS and makes no request.

    Args:
        paint: fills a matplotlib axes. Artists with a gid "s3" or "s3|hint" belong to method 3 and show the hint.
        title: what a screen reader says; no two figures of a page have the same.
        height: inches, beside a width of 5.6.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, "backend": "svg", "svg.hashsalt": title, **SETTINGS}
    with matplotlib.rc_context(settings):
        figure = Canvas(figsize=(5.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        paint(axes)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_styled(text.getvalue(), title))


def _styled(svg: str, title: str) -> str:
    """Placeholders become CSS variables, groups become classes, everything that is not drawing goes."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="s(\d+)(?:\|([^"]*))?">', lambda m: f'<g class="s s{m[1]}">' + (
        f"<title>{m[2]}</title>" if m[2] else ""), svg)
    prefix = f"f{zlib.crc32(title.encode()):x}"
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'id="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}", svg).replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    for name, value in (("ink", INK), ("soft", SOFT), ("rule", RULE), ("paper", PAPER)):
        svg = svg.replace(value, f"var(--{name})")
    svg = re.sub(r"#0102([0-9a-f]{2})", lambda m: f"var(--c{int(m[1], 16)})", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)  # coordinates, never text
    box = svg.split('viewBox="', 1)[1].split('"', 1)[0]
    head = f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">'
    return head + re.sub(r"\s*\n\s*", " ", svg[svg.index(">") + 1:]).replace("> <", "><").strip()


def name_axes(axes: Any, x: str, y: str, margin: float = 0.01) -> None:
    """Both axes named, and the empty share left and right of the data."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(x=margin)


def band(axes: Any, x: Sequence[float], y: Sequence[float], error: Sequence[float], index: int, alpha: float = 0.2,
         least: float = -math.inf) -> None:
    """Two standard errors on each side of a line, where all of them are known."""
    if len(x) == len(error) and all(map(math.isfinite, (*y, *error))):
        axes.fill_between(x, [max(v - 2 * e, least) for v, e in zip(y, error, strict=True)],
                          [max(v + 2 * e, least) for v, e in zip(y, error, strict=True)], color=color(index),
                          alpha=alpha, linewidth=0, gid=f"s{index}")


def mark(axes: Any, x: float, name: str = "") -> None:
    """A vertical line with its name on top."""
    axes.axvline(x, color=RULE, linewidth=1, zorder=0.5)
    axes.annotate(name, (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=SOFT)


def logarithmic_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis in plain notation: at most seven of 1, 2, 5 times a power of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[s * 10.0**p for p in powers for s in steps if low / 1.6 <= s * 10.0**p <= high * 1.6]
               for steps in ((1, 2, 5), (1, 3), (1,))]
    axis.set_major_locator(FixedLocator(next((c for c in choices if len(c) <= 7), choices[-1])))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
