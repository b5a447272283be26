"""Surfaces as contours for papers, and as a figure for the report that can be turned."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn of a surface: values on a grid, the labels of both axes, and the points and the path on it."""

    x: Tensor
    y: Tensor
    values: Tensor          # (len(x), len(y)); NaN and inf stay blank
    labels: list[str]
    points: Tensor          # (m, 2)
    path: Tensor | None     # (T, 2)

    def contour(self, ax: Any = None, *, levels: int = 20, log: bool | None = None) -> Any:
        """Filled contours with a colour bar; logarithmic where the loss spans more than two decades.

        Returns:
            The matplotlib axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(5, 4), layout="constrained")[1]
        values = self.values.clone()
        values[~values.isfinite()] = math.nan
        shown = values[values.isfinite()]
        ax.set_facecolor("0.85")
        if len(shown) and min(values.shape) > 1 and shown.min() < shown.max():
            log = logarithmic(shown) if log is None else log and bool((shown > 0).all())
            self._fill(ax, values, float(shown.min()), float(shown.max()), levels, log)
        if self.path is not None:
            ax.plot(self.path[:, 0].numpy(), self.path[:, 1].numpy(), "o-", color="#d62728", markersize=2.5,
                    linewidth=1)
        ax.plot(self.points[:, 0].numpy(), self.points[:, 1].numpy(), "o", color="white", markeredgecolor="black",
                markersize=5)
        if len(self.x) > 1:
            ax.set_xlim(float(self.x[0]), float(self.x[-1]))
            ax.set_ylim(float(self.y[0]), float(self.y[-1]))
        ax.set_xlabel(self.labels[0])
        ax.set_ylabel(self.labels[1])
        return ax

    def _fill(self, ax: Any, values: Tensor, low: float, high: float, levels: int, log: bool) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        x, y, v = self.x.numpy(), self.y.numpy(), values.T.numpy()
        where = torch.logspace(math.log10(low), math.log10(high), levels).tolist() if log else \
            MaxNLocator(levels).tick_values(low, high)
        options = {"norm": "log"} if log else {}
        filled = ax.contourf(x, y, v, where, cmap="viridis", extend="neither", **options)
        ax.contour(x, y, v, where, colors="white", linewidths=0.3, alpha=0.6)
        bar = ax.figure.colorbar(filled, ax=ax, label="loss")
        if log:
            bar.set_ticks(LogLocator(10, (1, 2, 5)).tick_values(low, high))
            bar.ax.set_ylim(low, high)
            bar.ax.yaxis.set_major_formatter("{x:.3g}")
            bar.ax.minorticks_off()

    def turnable(self, title: str, names: Sequence[str] = ()) -> str:
        """A figure element with its data and script inside; ``names`` are written beside the points."""
        shown = self.values[self.values.isfinite()]
        data: dict[str, Any] = {
            "x": _numbers(self.x), "y": _numbers(self.y), "v": [_numbers(row) for row in self.values],
            "labels": self.labels, "title": title,
            "log": bool(len(shown)) and logarithmic(shown),
            "positive": bool((shown > 0).all()) if len(shown) else False,
            "path": [] if self.path is None else [_numbers(row) for row in self.path],
            "models": [_numbers(row) for row in self.points],
            "names": list(names),
        }
        missing = self.values.numel() - len(shown)
        note = f" {missing} of {self.values.numel()} points are not finite and left open." if missing else ""
        inside = json.dumps(data, separators=(",", ":"), allow_nan=False)
        inside = inside.replace("<", "\\u003c").replace("&", "\\u0026")
        script = (Path(__file__).parent / "turn.js").read_text(encoding="utf-8")
        return (f'<figure class="flatmin-surface" style="margin:1em 0;max-width:760px">\n'
                f'<canvas width="760" height="520" tabindex="0" role="img" aria-label="{html.escape(title)}" '
                'style="width:100%;touch-action:none;cursor:grab"></canvas>\n'
                f'<figcaption style="font:14px system-ui,sans-serif"><b>{html.escape(title)}.</b> '
                f'Drag to turn, wheel to zoom, arrow keys too.{note} '
                '<label><input type="checkbox"> logarithmic height</label> <output></output></figcaption>\n'
                f'<script type="application/json">{inside}</script>\n<script>{script}</script>\n</figure>\n')


def logarithmic(shown: Tensor) -> bool:
    """Whether numbers are positive and span more than two decades."""
    return bool((shown > 0).all()) and float(shown.max() / shown.min()) > 100


def _numbers(t: Tensor) -> list[float | None]:
    """Seven digits, and null for what is not finite."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in t.tolist()]
