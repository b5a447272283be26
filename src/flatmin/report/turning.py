"""Surfaces that can be turned, from a record; and the policy of a page, which lets their script run and no other."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .reading import numbers


def turnable(part: Mapping[str, Any], values: str, title: str, axes: Sequence[str], models: Sequence[str] = ()) -> str:
    """The grid ``part[values]`` over ``part["x"]`` and ``part["y"]`` as a figure; "" where it is not a grid.

    ``axes`` says what x and y are, ``models`` names the points ``part["models"]``.
    """
    x, y = numbers(part.get("x")), numbers(part.get("y"))
    given, points = part.get(values), part.get("models")
    grid = [numbers(row) for row in given] if isinstance(given, list) else []
    if not (x and y and len(grid) == len(x) and all(len(row) == len(y) for row in grid)):
        return ""
    marks = [numbers(p) for p in points] if isinstance(points, list) else []
    marks = marks if marks and all(len(m) == 2 for m in marks) else []
    import torch

    from ..landscape import Surface
    from ..landscape.plane import Plane

    v, a, b = (torch.tensor(t, dtype=torch.float64) for t in (grid, x, y))
    plane = Plane(origin=[], directions=[[], []], names=list(axes), units=[1.0, 1.0])
    found = Surface(values=v, x=a, y=b, settings={}, plane=plane,
                    models=torch.tensor(marks, dtype=torch.float64) if marks else None)
    return found.to_html(title, names=list(models) if len(models) == len(marks) else [])


def policy(body: str) -> str:
    """The page's content security policy: no request, styles inline, and the scripts of ``body`` by their hashes."""
    scripts = dict.fromkeys(re.findall(r"<script>(.*?)</script>", body, re.S))
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = "".join(f" 'sha256-{h}'" for h in hashes)
    return "default-src 'none'; style-src 'unsafe-inline'" + (f"; script-src{allowed}" if allowed else "")
