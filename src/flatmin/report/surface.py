"""Loss surfaces that can be turned, from a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup

from ..landscape import Surface
from ..landscape.plane import Plane
from .fields import items, numbers


def turnable(part: Mapping[str, Any], values: str, title: str, axes: Sequence[str], models: Sequence[str] = ()
             ) -> Markup:
    """The grid ``part[values]`` over ``part["x"]`` and ``part["y"]`` as a figure; "" where it is not a grid.

    ``axes`` says what x and y are, ``models`` names the points ``part["models"]``.
    """
    x, y, grid = numbers(part.get("x")), numbers(part.get("y")), [numbers(row) for row in items(part.get(values))]
    if not (x and y and len(grid) == len(x) and all(len(row) == len(y) for row in grid)):
        return Markup("")
    points = [numbers(p) for p in items(part.get("models"))]
    marks = torch.tensor(points, dtype=torch.float64) if points and all(len(p) == 2 for p in points) else None
    v, a, b = (torch.tensor(t, dtype=torch.float64) for t in (grid, x, y))
    plane = Plane(origin=[], directions=[[], []], names=list(axes), units=[1.0, 1.0])
    found = Surface(values=v, x=a, y=b, settings={}, plane=plane, models=marks)
    return Markup(found.to_html(title, names=list(models) if len(models) == len(points) else []))
