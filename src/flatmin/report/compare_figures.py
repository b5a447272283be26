"""The figures of the page of ``flatmin compare``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .compare_record import CompareRecord
from .fields import number, numbers, section
from .figures import PAPER, band, color, draw, line_style, logarithmic_ticks, mark, name_axes
from .formatting import significant

FEW = 6                                 # with more methods than that, figures get finer


def few(r: CompareRecord) -> bool:
    return len(r.methods) <= FEW


def curves(r: CompareRecord, key: str, ylabel: str, scale: float = 1.0) -> Markup:
    """The mean over seeds at each epoch, with the band from the lowest to the highest seed."""
    def paint(axes: Any) -> None:
        for i, m in enumerate(r.methods):
            rows = [dict(zip(numbers(h.get("epoch")), numbers(h.get(key)), strict=False))
                    for h in (section(x, "history") for x in r.runs(m))]
            epochs = sorted({e for row in rows for e, v in row.items() if math.isfinite(v) and math.isfinite(e)})
            values = [[scale * row[e] for row in rows if math.isfinite(row.get(e, math.nan))] for e in epochs]
            if max(map(len, values), default=0) > 1:
                axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=color(i),
                                  alpha=_alpha(r), linewidth=0, gid=f"s{i}")
            axes.plot(epochs, list(map(fmean, values)), **_line(r, i, m), solid_capstyle="round",
                      marker=line_style(i).marker if len(epochs) == 1 else None)
        name_axes(axes, r.time_axis, ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw(paint, f"{ylabel} at each {r.time_axis}")


def scatter(r: CompareRecord, metric: str, xlabel: str) -> Markup:
    """The first metric against a sharpness: a point a seed, a ring at the mean of a method."""
    ylabel, unit = r.test_label, " %" * (r.metrics[r.first].scale == 100)
    pairs = {m: [p for p in (_point(r, run, metric) for run in r.runs(m)) if math.isfinite(p[0] + p[1])]
             for m in r.methods}
    every = [p[0] for v in pairs.values() for p in v]

    def paint(axes: Any) -> None:
        if every and min(every) > 0 and max(every) > 8 * min(every):
            axes.set_xscale("log")
            logarithmic_ticks(axes.xaxis, every)
        for i, m in enumerate(r.methods):
            for x, y, seed in pairs[m]:
                axes.plot([x], [y], line_style(i).marker, color=color(i), markersize=9 if few(r) else 6.5, alpha=0.85,
                          markeredgecolor=PAPER, markeredgewidth=1.2,
                          gid=f"s{i}|{r.label(m)}, seed {seed}: {_shown(r, y)}{unit}, {significant(x)}")
            if len(pairs[m]) > 1 and few(r):
                _ring(axes, fmean(p[0] for p in pairs[m]), fmean(p[1] for p in pairs[m]), i, 19,
                      f"{r.label(m)}, mean")
        axes.margins(0.1)
        name_axes(axes, xlabel, ylabel, 0.1)
        axes.grid(True, axis="x")

    return draw(paint, f"{ylabel} against {xlabel}")


def loss_lines(r: CompareRecord, rise: bool) -> Markup:
    """The loss along lines through each solution: each seed thin, their mean thick, with two standard errors.

    The errors are over directions. With ``rise``, what is above the loss of the solution, over the distance in lengths
    of the weights.
    """
    def paint(axes: Any) -> None:
        tops = []
        for i, m in enumerate(r.methods):
            found = [_loss_line(section(x, "line"), rise) for x in r.runs(m)]
            found = [c for c in found if c and len(c) == len(found[0])]
            if not found:
                continue
            for curve in found if len(found) > 1 and few(r) else []:
                axes.plot(*list(zip(*curve, strict=True))[:2], color=color(i), linewidth=0.8, alpha=0.45, gid=f"s{i}")
            x, mean, error = zip(*[[sum(column) / len(column) for column in zip(*points, strict=True)]
                                   for points in zip(*found, strict=True)], strict=True)
            band(axes, x, mean, error, i, _alpha(r))
            axes.plot(x, mean, **_line(r, i, m))
            tops.append(max(filter(math.isfinite, mean), default=0.0))
        if len(tops) > 2 and max(tops) > 6 * sorted(tops)[len(tops) // 2] > 0:  # one steep method hides the others
            axes.set_ylim(top=3 * sorted(tops)[len(tops) // 2])
        mark(axes, 0, "solution")
        name_axes(axes, "distance / length of the weights" if rise else "distance from the solution, ‖w′ − w‖",
                  "rise of the training loss" if rise else "training loss")

    return draw(paint, f"{'rise of the loss' if rise else 'loss'} along a line through each solution")


def radii(r: CompareRecord) -> Markup:
    """The held-out metric of every ρ that was tried, with its standard error over the parts, the chosen ρ ringed."""
    scale = r.metrics[r.first].scale
    name = "held-out " + r.test_label.removeprefix("clean-test ").removeprefix("test ")

    def paint(axes: Any) -> None:
        tried = []
        for i, m in enumerate(r.methods):
            part = section(r.record, "selection", m)
            scores = numbers(part.get("scores"))
            points = [(g, scale * s) for g, s in zip(numbers(part.get("grid")), scores, strict=False)
                      if math.isfinite(g) and math.isfinite(s)]
            tried += [g for g, _ in points if g > 0]
            for (g, s), e in zip(points, numbers(part.get("stderr")), strict=False):
                if e > 0 and math.isfinite(e):
                    axes.plot([g, g], [s - scale * e, s + scale * e], color=color(i), linewidth=1.2, alpha=0.5,
                              gid=f"s{i}")
            axes.plot(*([p[k] for p in points] for k in (0, 1)), **_line(r, i, m) | {"linewidth": 1.8},
                      marker=line_style(i).marker, markersize=5)
            for g, s in points:
                if g == number(part.get("chosen")):
                    _ring(axes, g, s, i, 15, f"{r.label(m)}: ρ = {g:g} chosen")
        if tried and max(tried) > 4 * min(tried):
            axes.set_xscale("log")
            logarithmic_ticks(axes.xaxis, tried)
        axes.margins(y=0.12)
        name_axes(axes, "radius ρ", name, 0.07)

    return draw(paint, f"{name} against the radius")


def _point(r: CompareRecord, run: Mapping[str, Any], metric: str) -> tuple[float, float, str]:
    x, y = (section(run, m.part).get(m.field) for m in (r.metrics[metric], r.metrics[r.first]))
    return number(x), r.metrics[r.first].scale * number(y), str(run.get("seed"))


def _shown(r: CompareRecord, value: float) -> str:
    return f"{value:.1f}" if r.metrics[r.first].scale == 100 else significant(value)


def _loss_line(line: Mapping[str, Any], rise: bool) -> Sequence[tuple[float, float, float]]:
    """(distance, loss, standard error) at each point; nothing where they do not fit together."""
    x, values, errors = (numbers(line.get(k)) for k in ("x", "values", "stderr"))
    if not len(x) == len(values) == len(errors) or not x:
        return []
    at_zero = values[min(range(len(x)), key=lambda k: abs(x[k]))] if rise else 0.0
    unit = number(line.get("unit")) or math.nan
    return [(at / unit if rise else at, v - at_zero if math.isfinite(v) else math.nan, e)
            for at, v, e in zip(x, values, errors, strict=True)]


def _alpha(r: CompareRecord) -> float:
    return 0.16 if few(r) else 0.05


def _line(r: CompareRecord, i: int, method: str) -> dict[str, Any]:
    return {"color": color(i), "linestyle": line_style(i).dashes, "linewidth": 2.1 if few(r) else 1.4,
            "gid": f"s{i}|{r.label(method)}"}


def _ring(axes: Any, x: float, y: float, i: int, size: float, hint: str) -> None:
    axes.plot([x], [y], "o", color="none", markersize=size, markeredgecolor=color(i), markeredgewidth=1.6,
              gid=f"s{i}|{hint}")
