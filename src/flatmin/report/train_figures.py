"""The figures of the page of ``flatmin train``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figures import Figure, band, color, draw, logarithmic_ticks, name_axes
from .formatting import significant
from .train_record import SPLITS, Curve, TrainRecord, label

Line = tuple[str, Curve, list[float]]
"""A name, a curve, and its standard errors (none: [])."""
NOTHING: Line = ("", Curve([], []), [])
"""In the place of a line whose color is not used."""


def losses(r: TrainRecord) -> list[Figure]:
    """The training loss with the held-out one, and every other metric of the evaluations."""
    lines: list[Line] = [("training, each logged step", r.column("loss"), []),
                         ("training, mean between evaluations", r.evaluated("train_loss"), []),
                         ("held out", r.evaluated("loss", "tune"), r.errors("loss", "tune"))]
    found = [_figure("Loss", "of the logged steps, their mean, and on held-out data with two standard errors"
                     if lines[2][1].steps else "of the logged steps, and their mean", lines, "loss")]
    named = dict.fromkeys(name for row in r.evaluations for name in row.get("tune", {}) if name != "loss")
    found += [_figure(label(name).capitalize(), f"on {SPLITS['tune']}, with two standard errors",
                      [NOTHING, ("held out", r.evaluated(name, "tune"), r.errors(name, "tune"))],
                      label(name)) for name in named]
    return [f for f in found if f is not None]


def schedule(r: TrainRecord) -> Figure | None:
    return _figure("Learning rate", "as it was stepped with", [NOTHING, ("learning rate", r.column("lr"), [])],
                   "learning rate", logarithmic=False)


def perturbation(r: TrainRecord) -> list[Figure]:
    """What the sharpener saw: the loss at w + ε beside that at w, and the length of ε."""
    moved, radius = r.column("perturbed_loss"), r.column("radius")
    if not moved.steps:
        return []
    rises = Curve([], [])
    at = dict(zip(*r.column("loss"), strict=True))
    for step, value in zip(*moved, strict=True):
        if step in at:
            rises.steps.append(step)
            rises.values.append(value - at[step])
    found = [_figure("Loss after the step uphill", "L(w + ε) beside L(w), of the logged steps",
                     [("L(w)", r.column("loss"), []), ("L(w + ε)", moved, [])], "loss "),
             _figure("Realised sharpness", "L(w + ε) − L(w)", [NOTHING, ("rise of the loss", rises, [])],
                     "rise of the loss"),
             _figure("Length of the step uphill", "‖ε‖, the radius", [NOTHING, NOTHING, ("‖ε‖", radius, [])], "‖ε‖")]
    return [f for f in found if f is not None]


def monitored(r: TrainRecord) -> list[Figure]:
    """Each measure that the monitor followed."""
    names = {name: label(name.rpartition("/")[2]) for name in r.measures()}
    found = [_figure(names[name].capitalize(), "followed in training", [NOTHING, NOTHING, (names[name], curve, [])],
                     names[name]) for name, curve in r.measures().items()]
    return [f for f in found if f is not None]


def _figure(heading: str, caption: str, lines: Sequence[Line], ylabel: str,
            logarithmic: bool = True) -> Figure | None:
    """Lines over the steps, the first in the color of the baseline; None without two points of any of them."""
    shown = [(i, name, curve, errors) for i, (name, curve, errors) in enumerate(lines) if curve.steps]
    if not any(len(curve.steps) > 1 for _, _, curve, _ in shown):
        return None
    every = [v for _, _, curve, _ in shown for v in curve.values]

    def paint(axes: Any) -> None:
        if logarithmic and min(every) > 0 and max(every) > 30 * min(every):
            axes.set_yscale("log")
            logarithmic_ticks(axes.yaxis, every)
        for i, name, curve, errors in shown:
            band(axes, curve.steps, curve.values, errors, i)
            axes.plot(curve.steps, curve.values, color=color(i), linewidth=1.1 if i == 0 else 2,
                      marker="o" if len(curve.steps) < 3 else None,
                      gid=f"s{i}|{name}, at the end {significant(curve.values[-1])}")
        if len(shown) > 1:
            _name_lines(axes, shown)
        name_axes(axes, "step", ylabel.strip())
        axes.xaxis.get_major_locator().set_params(integer=True)

    return Figure(heading, caption, draw(paint, f"{ylabel}, {heading.lower()}", 3.3))


def _name_lines(axes: Any, shown: Sequence[tuple[int, str, Curve, list[float]]]) -> None:
    """Names in the colors of the lines, in the emptier of the upper corners."""
    rising = sum(curve.values[-1] - curve.values[0] for _, _, curve, _ in shown)
    right = not rising > 0 or not math.isfinite(rising)
    for place, (i, name, _, _) in enumerate(shown):
        axes.annotate(name, (0.99 if right else 0.02, 0.98 - 0.085 * place), xycoords="axes fraction",
                      ha="right" if right else "left", va="top", color=color(i))
