"""Surfaces as contours for papers and as something that can be turned, for the report."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .surfaces import Surface


def contour(surface: Surface, ax: Any = None, *, relative: bool = False, levels: int = 20,
            log: bool | None = None) -> Any:
    """Filled contours with a colour bar; logarithmic where the loss spans more than two decades. Returns the axes."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator

    if ax is None:
        ax = plt.subplots(figsize=(5, 4), layout="constrained")[1]
    x, y = _axes(surface, relative)
    v = surface.values.clone()
    v[~v.isfinite()] = math.nan
    shown = v[v.isfinite()]
    ax.set_facecolor("0.85")
    if len(shown) and min(v.shape) > 1 and shown.min() < shown.max():
        log = logarithmic(shown) if log is None else log and bool((shown > 0).all())
        low, high = float(shown.min()), float(shown.max())
        where = torch.logspace(math.log10(low), math.log10(high), levels).tolist() if log else \
            MaxNLocator(levels).tick_values(low, high)
        options = {"norm": "log"} if log else {}
        filled = ax.contourf(x.numpy(), y.numpy(), v.T.numpy(), where, cmap="viridis", extend="neither", **options)
        ax.contour(x.numpy(), y.numpy(), v.T.numpy(), where, colors="white", linewidths=0.3, alpha=0.6)
        bar = ax.figure.colorbar(filled, ax=ax, label="loss")
        if log:
            bar.set_ticks(LogLocator(10, (1, 2, 5)).tick_values(low, high))
            bar.ax.set_ylim(low, high)
            bar.ax.yaxis.set_major_formatter("{x:.3g}")
            bar.ax.minorticks_off()
    _marks(surface, ax, relative)
    if len(x) > 1:
        ax.set_xlim(float(x[0]), float(x[-1]))
        ax.set_ylim(float(y[0]), float(y[-1]))
    for k, label in enumerate(labels(surface, relative)):
        (ax.set_xlabel, ax.set_ylabel)[k](label)
    return ax


def _marks(surface: Surface, ax: Any, relative: bool) -> None:
    unit = torch.tensor(surface.units if relative else (1.0, 1.0), dtype=torch.float64)
    if surface.trajectory is not None:
        path = (surface.trajectory.coordinates / unit).numpy()
        ax.plot(path[:, 0], path[:, 1], "o-", color="#d62728", markersize=2.5, linewidth=1)
    points = torch.zeros(1, 2) if surface.models is None else surface.models / unit
    ax.plot(points[:, 0].numpy(), points[:, 1].numpy(), "o", color="white", markeredgecolor="black", markersize=5)


def _axes(surface: Surface, relative: bool) -> tuple[Tensor, Tensor]:
    a, b = surface.units if relative else (1.0, 1.0)
    return surface.x / a, surface.y / b


def labels(surface: Surface, relative: bool) -> list[str]:
    """What each axis shows, with the share of a trajectory's variance along it."""
    out = []
    for k, name in enumerate(surface.plane.names):
        kind = {"filter": "random, filter-normalised", "layer": "random, layer-normalised"}.get(name, name)
        kind += " (orthogonal part)" if name.startswith("model 3") else ""
        share = "" if surface.trajectory is None else f", {float(surface.trajectory.explained[k]):.0%} of variance"
        out.append(f"displacement{' (relative)' * relative}: {kind}{share}")
    return out


def logarithmic(shown: Tensor) -> bool:
    """Whether positive numbers span more than two decades."""
    return bool((shown > 0).all()) and float(shown.max() / shown.min()) > 100


def turnable(surface: Surface, title: str, *, relative: bool = False, names: Sequence[str] = ()) -> str:
    """A figure element with its data and script inside."""
    x, y = _axes(surface, relative)
    unit = torch.tensor(surface.units if relative else (1.0, 1.0), dtype=torch.float64)
    shown = surface.values[surface.values.isfinite()]
    data: dict[str, Any] = {
        "x": _numbers(x), "y": _numbers(y), "v": [_numbers(row) for row in surface.values],
        "labels": labels(surface, relative), "title": title,
        "log": bool(len(shown)) and logarithmic(shown),
        "positive": bool((shown > 0).all()) if len(shown) else False,
        "path": [] if surface.trajectory is None else
        [_numbers(row) for row in surface.trajectory.coordinates / unit],
        "models": [[0.0, 0.0]] if surface.models is None else [_numbers(row) for row in surface.models / unit],
        "names": list(names),
    }
    missing = surface.values.numel() - len(shown)
    note = f" {missing} of {surface.values.numel()} points are not finite and left open." if missing else ""
    inside = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    script = (Path(__file__).parent / "turn.js").read_text(encoding="utf-8")
    return (f'<figure class="flatmin-surface" style="margin:1em 0;max-width:760px">\n'
            f'<canvas width="760" height="520" tabindex="0" role="img" aria-label="{html.escape(title)}" '
            'style="width:100%;touch-action:none;cursor:grab"></canvas>\n'
            f'<figcaption style="font:14px system-ui,sans-serif"><b>{html.escape(title)}.</b> '
            f'Drag to turn, wheel to zoom, arrow keys too.{note} '
            '<label><input type="checkbox"> logarithmic height</label> <output></output></figcaption>\n'
            f'<script type="application/json">{inside}</script>\n<script>{script}</script>\n</figure>\n')


def _numbers(t: Tensor) -> list[float | None]:
    """Seven digits, and null for what is not finite."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in t.tolist()]
