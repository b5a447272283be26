"""Figures as inline SVG: matplotlib draws them, the page's own colours and fonts dress them."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from typing import Any

from .reading import METRICS, Reading, number, numbers, section, significant

INK, SOFT, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"  # placeholders for the colours of the page
COLORS = 8                                                           # then dashes and markers change
FEW = 6                                                              # with more methods than that, figures get finer
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)))
MARKERS = ("o", "s", "^")


def hue(index: int) -> int:
    """Which of the page's colours a method has; the first, a grey, is the baseline's alone."""
    return 0 if index == 0 else 1 + (index - 1) % (COLORS - 1)


def color(index: int) -> str:
    """The placeholder for the colour of a method; :mod:`style` names the real ones, for light and for dark."""
    return f"#0102{hue(index):02x}"


def _turn(index: int) -> int:
    """How often the colours were used up before."""
    return max(0, index - 1) // (COLORS - 1)


def _style(index: int) -> tuple[Any, str]:
    return DASHES[_turn(index) % len(DASHES)], MARKERS[_turn(index) % len(MARKERS)]


def _weight(r: Reading) -> float:
    return 2.1 if len(r.methods) <= FEW else 1.4


def draw(paint: Callable[[Any], None], title: str, *, size: tuple[float, float] = (5.6, 3.7)) -> str:
    """One axes as an ``<svg>`` that takes the width it is given, the colours from CSS and makes no request.

    Args:
        paint: fills a matplotlib axes. Artists with a gid "s3" or "s3|hint" belong to method 3 and show the hint.
        title: what a screen reader says.
        size: inches; only the ratio and the relative size of the text matter.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11.5,
                "axes.edgecolor": RULE,
                "axes.labelcolor": SOFT, "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": SOFT,
                "ytick.labelcolor": SOFT, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False,
                "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True,
                "axes.grid.axis": "y", "axes.linewidth": 0.8, "axes.formatter.useoffset": False,
                "axes.spines.left": False, "ytick.major.size": 0, "font.family": "sans-serif", "text.parse_math": False,
                "axes.labelpad": 7, "axes.unicode_minus": True, "axes.formatter.use_mathtext": False}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "svg", **settings}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        paint(axes)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _dress(text.getvalue(), title)


def _dress(svg: str, title: str) -> str:
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
    box = re.search(r'viewBox="([^"]*)"', svg)
    head = f'<svg viewBox="{box[1] if box else "0 0 400 260"}" role="img" aria-label="{escape(title)}">'
    return head + re.sub(r"\s*\n\s*", " ", svg[svg.index(">") + 1:]).replace("> <", "><").strip()


def curves(r: Reading, key: str, title: str, percent: bool = False) -> str:
    """The mean over seeds at each epoch, with the band from the lowest to the highest seed."""
    scale = 100.0 if percent else 1.0

    def paint(axes: Any) -> None:
        for i, m in enumerate(r.methods):
            rows = [{number(e): scale * number(v) for e, v in zip(numbers(h.get("epoch")) or range(1, 10**6),
                                                                  numbers(h.get(key)), strict=False)}
                    for h in (section(x, "history") for x in r.runs(m))]
            epochs = sorted({e for row in rows for e, v in row.items() if math.isfinite(v) and math.isfinite(e)})
            values = [[row[e] for row in rows if math.isfinite(row.get(e, math.nan))] for e in epochs]
            means = [sum(v) / len(v) for v in values]
            dash, marker = _style(i)
            if any(len(v) > 1 for v in values):
                axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=color(i),
                                  alpha=0.16 if len(r.methods) <= FEW else 0.05, linewidth=0, gid=f"s{i}")
            axes.plot(epochs, means, color=color(i), linestyle=dash, linewidth=_weight(r), gid=f"s{i}|{r.label(m)}",
                      marker=marker if len(epochs) == 1 else None, solid_capstyle="round")
        axes.set_xlabel("epoch")
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw(paint, title)


def scatter(r: Reading, metric: str, xlabel: str) -> str:
    """Accuracy against a sharpness: a point a seed, a ring at the mean of a method."""
    part, name = METRICS[metric]
    pairs: dict[str, list[tuple[float, float, str]]] = {m: [] for m in r.methods}
    for m in r.methods:
        for run in r.runs(m):
            x, y = number(section(run, part).get(name)), 100 * number(section(run, "test").get("accuracy"))
            if math.isfinite(x) and math.isfinite(y):
                pairs[m].append((x, y, str(run.get("seed", "?"))))
    every = [p[0] for v in pairs.values() for p in v]

    def paint(axes: Any) -> None:
        if every and min(every) > 0 and max(every) > 8 * min(every):
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, every)
        for i, m in enumerate(r.methods):
            for x, y, seed in pairs[m]:
                hint = f"{r.label(m)}, seed {seed}: {y:.1f} %, {significant(x)}"
                axes.plot([x], [y], _style(i)[1], color=color(i), markersize=9 if len(r.methods) <= FEW else 6.5,
                          alpha=0.85, markeredgecolor=PAPER, markeredgewidth=1.2, gid=f"s{i}|{hint}")
            if len(pairs[m]) > 1 and len(r.methods) <= FEW:
                x, y = sum(p[0] for p in pairs[m]) / len(pairs[m]), sum(p[1] for p in pairs[m]) / len(pairs[m])
                axes.plot([x], [y], "o", color="none", markersize=19, markeredgecolor=color(i), markeredgewidth=1.2,
                          gid=f"s{i}|{r.label(m)}, mean")
        axes.set_xlabel(xlabel)
        axes.margins(0.1)
        axes.grid(True, axis="x")

    return draw(paint, f"{r.test_name} in percent against {xlabel}")


def has_units(r: Reading) -> bool:
    """Whether every line knows the length of the weights it was drawn around."""
    lines = [x for x in (section(x, "line") for x in r.all_runs) if x]
    return bool(lines) and all(number(x.get("unit")) > 0 for x in lines)


def lines(r: Reading, rise: bool) -> str:
    """The loss along lines through each solution: every seed thin, their mean thick, a band of two standard errors over
    directions. Or its rise over x = 0, in lengths of the weights where they are known."""
    relative = rise and has_units(r)

    def found(method: str) -> list[list[tuple[float, float, float]]]:
        out = []
        for x in (section(x, "line") for x in r.runs(method)):
            at, values, errors = (numbers(x.get(k)) for k in ("x", "values", "stderr"))
            if at and len(at) == len(values):
                zero = values[min(range(len(at)), key=lambda k: abs(at[k]))] if rise else 0.0
                unit = number(x.get("unit")) if relative else 1.0
                errors = errors if len(errors) == len(at) else [math.nan] * len(at)
                out.append([(a / unit, v - zero if math.isfinite(v) else math.nan, e)
                            for a, v, e in zip(at, values, errors, strict=True)])
        return out

    def paint(axes: Any) -> None:
        tops = []
        for i, m in enumerate(r.methods):
            curves = found(m)
            for curve in curves if len(curves) > 1 and len(r.methods) <= FEW else []:
                axes.plot(*list(zip(*curve, strict=True))[:2], color=color(i), linewidth=0.8, alpha=0.45, gid=f"s{i}")
            same = [c for c in curves if len(c) == len(curves[0])]
            if not same:
                continue
            at, mean, error = zip(*[[sum(column) / len(column) for column in zip(*points, strict=True)]
                                    for points in zip(*same, strict=True)], strict=True)
            if all(map(math.isfinite, (*mean, *error))):
                axes.fill_between(at, [v - 2 * e for v, e in zip(mean, error, strict=True)],
                                  [v + 2 * e for v, e in zip(mean, error, strict=True)], color=color(i), linewidth=0,
                                  alpha=0.16 if len(r.methods) <= FEW else 0.05, gid=f"s{i}")
            axes.plot(at, mean, color=color(i), linewidth=_weight(r), linestyle=_style(i)[0], gid=f"s{i}|{r.label(m)}")
            tops.append(max((v for v in mean if math.isfinite(v)), default=0.0))
        if len(tops) > 2 and max(tops) > 6 * sorted(tops)[len(tops) // 2] > 0:  # one steep method hides the others
            axes.set_ylim(top=3 * sorted(tops)[len(tops) // 2])
        axes.axvline(0, color=RULE, linewidth=1, zorder=0.5)
        axes.set_xlabel("distance / length of the weights" if relative else "distance from the solution, ‖w′ − w‖")
        axes.margins(x=0.01)

    return draw(paint, "rise of the loss along a line through each solution" if rise else
                "loss along a line through each solution")


def radii(r: Reading) -> str:
    """The held-out score of every ρ that was tried, the chosen one ringed."""
    chosen = section(r.record, "selection")
    every = [g for m in r.methods for g in numbers(section(chosen, m).get("grid")) if g > 0]

    def paint(axes: Any) -> None:
        if every and max(every) > 4 * min(every):
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, every)
        for i, m in enumerate(r.methods):
            part = section(chosen, m)
            points = [(g, 100 * s) for g, s in zip(numbers(part.get("grid")), numbers(part.get("scores")), strict=False)
                      if math.isfinite(g) and math.isfinite(s)]
            if not points:
                continue
            dash, marker = _style(i)
            for (g, s), e in zip(points, numbers(part.get("stderr")), strict=False):
                if e > 0 and math.isfinite(e):
                    axes.plot([g, g], [s - 100 * e, s + 100 * e], color=color(i), linewidth=1.2, alpha=0.5, gid=f"s{i}")
            axes.plot(*zip(*points, strict=True), color=color(i), linestyle=dash, marker=marker, markersize=5,
                      linewidth=1.8, gid=f"s{i}|{r.label(m)}")
            for g, s in points:
                if g == number(part.get("chosen")):
                    axes.plot([g], [s], "o", color="none", markersize=15, markeredgecolor=color(i), markeredgewidth=2,
                              gid=f"s{i}|{r.label(m)}: ρ = {g:g} chosen")
        axes.set_xlabel("radius ρ")
        axes.margins(0.07, 0.12)

    return draw(paint, "held-out accuracy in percent against the radius")


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as numbers one reads: at most seven of 1, 2, 5 times a power of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**p for p in powers for s in steps if low / 1.6 <= s * 10.0**p <= high * 1.6]
        if len(ticks) <= 7:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def key(r: Reading, methods: Sequence[str]) -> str:
    """The legend: a sample of line and marker, and the name; pointing at one dims the others."""
    items = []
    for m in methods:
        i = r.methods.index(m)
        dash = ("", "7 3", "2 2.4")[_turn(i) % len(DASHES)]
        shape = ('<circle cx="14" cy="6" r="4"/>', '<rect x="10.3" y="2.3" width="7.4" height="7.4"/>',
                 '<path d="M14 1.5L18.6 9.6H9.4Z"/>')[_turn(i) % len(MARKERS)]
        items.append(f'<li class="k{i} s{i}" tabindex="0"><svg viewBox="0 0 28 12" aria-hidden="true"><path '
                     f'd="M1 6H27" stroke-dasharray="{dash}"/>{shape}</svg><span>{escape(r.label(m))}</span></li>')
    hint = "<li class=quiet>Point at a name to single it out.</li>" if len(methods) > 3 else ""
    return f'<ul class="key">{"".join(items)}{hint}</ul>'
