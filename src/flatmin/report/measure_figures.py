"""The figures of the page of ``flatmin measure``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from .fields import numbers
from .figures import band, color, draw, mark, name_axes
from .formatting import error_of, significant, supported
from .measure_record import PARTS, MeasureRecord, Pair


def parts(m: MeasureRecord) -> Markup:
    """One-step sharpness and what it is made of, as bars; "" without it."""
    if not m.parts():
        return Markup("")
    bars = [("rise of the loss", m.get("one_step")), *((PARTS[key], v) for key, v in m.parts().items())]

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for i, (_, v) in enumerate(bars):
            axes.barh([-i], [v], color=color(i), height=0.62, gid=f"s{i}|{significant(v)}")
            axes.annotate(significant(v), (max(v, 0.0), -i), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks([-i for i in range(len(bars))], [label for label, _ in bars])
        mark(axes, 0)
        axes.grid(False, axis="y")
        name_axes(axes, "loss", "", 0.16)
        axes.xaxis.set_major_locator(MaxNLocator(4))

    return draw(paint, "the parts of one-step sharpness", 2.4)


def eigenvalues(pairs: Sequence[Pair]) -> Markup:
    """Each eigenvalue by rank, with its residual; a ring where it did not converge; "" for a single one."""
    if len(pairs) < 2:
        return Markup("")
    finite = [(i, p) for i, p in enumerate(pairs, 1) if math.isfinite(p.value)]

    def paint(axes: Any) -> None:
        for i, p in finite:
            axes.plot([i, i], [0, p.value], color=color(1), linewidth=1, alpha=0.35)
            axes.plot([i, i], [p.value - p.residual, p.value + p.residual], color=color(1), linewidth=5, alpha=0.3)
            axes.plot([i], [p.value], "o", color=color(1), markersize=7, fillstyle="full" if p.converged else "none",
                      gid=f"s1|λ {supported(p.value, p.residual)}, residual {error_of(p.residual)}")
        axes.set_ylim(bottom=min([0.0, *(p.value for _, p in finite)]))
        axes.margins(y=0.08)
        name_axes(axes, "rank", "eigenvalue λ", 0.08)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw(paint, "the largest eigenvalues with their residuals", 3.2)


def density(m: MeasureRecord) -> Markup:
    """The spectral density on a logarithmic scale, down to a part of one eigenvalue's peak; "" without one."""
    r = m.result("density")
    x, y, error = (numbers(r.get(k)) for k in ("x", "density", "density_stderr"))
    points = [i for i, (a, b) in enumerate(zip(x, y, strict=False)) if math.isfinite(a) and math.isfinite(b)]
    if len(points) < 2:
        return Markup("")
    # one eigenvalue is a peak of 1/(n width √(2π)), and x spans about as many widths as there are nodes
    floor = 1 / (m.parameters * (x[points[-1]] - x[points[0]])) if m.parameters > 0 else 1e-6
    x, y = [x[i] for i in points], [max(y[i], floor) for i in points]
    error = [error[i] for i in points] if len(error) > points[-1] else []
    low, high = math.log10(floor), math.log10(max(3 * max(y), 10 * floor))
    powers = range(math.ceil(low), math.floor(high) + 1, max(1, math.ceil((high - low) / 6)))

    def paint(axes: Any) -> None:
        band(axes, x, y, error, 1, least=floor)
        axes.plot(x, y, color=color(1), linewidth=1.8, gid="s1|density")
        axes.set_yscale("log")
        axes.set_ylim(10**low, 10**high)
        axes.set_yticks([10.0**p for p in powers], [f"{10.0**p:g}" for p in powers])
        axes.minorticks_off()
        mark(axes, 0)
        name_axes(axes, "eigenvalue λ", "density of eigenvalues")

    return draw(paint, "spectral density", 3.4)


def loss_line(m: MeasureRecord) -> Markup:
    """The loss along random lines through the weights, the mean over them; "" without one."""
    r = m.result("line")
    x, y, error = (numbers(r.get(k)) for k in ("x", "values", "stderr"))
    return _line(x, y, error, {"the weights": 0.0}, "distance from the weights, ‖w′ − w‖", "loss along a line")


def loss_between(m: MeasureRecord) -> Markup:
    """The loss on the straight line from one model to the other; "" without one."""
    path = m.result("comparison").get("path")
    x, y, models = (numbers(path.get(k)) if isinstance(path, dict) else [] for k in ("x", "values", "models"))
    if len(models) != 2:
        return Markup("")
    return _line(x, y, [], dict(zip(m.names(), models, strict=True)), "distance along the line",
                 "loss on the line between two models")


def _line(x: Sequence[float], y: Sequence[float], error: Sequence[float], marks: dict[str, float], xlabel: str,
          title: str) -> Markup:
    if len(x) < 2 or len(x) != len(y):
        return Markup("")

    def paint(axes: Any) -> None:
        band(axes, x, y, error, 1)
        axes.plot(x, [v if math.isfinite(v) else math.nan for v in y], color=color(1), linewidth=2, gid="s1|loss")
        for name, at in marks.items():
            mark(axes, at, name)
        name_axes(axes, xlabel, "loss")

    return draw(paint, title, 3.2)
