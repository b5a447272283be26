"""The loss over a plane through the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..objective import Objective
from .directions import Kind
from .grid import evaluate
from .layout import Planner, check_arguments, span
from .lines import extent, sample, several
from .models import Model, read
from .pictures import Picture
from .plane import BatchNorm, Plane, batch_norm_policy
from .trajectories import Trajectory, project


@dataclass(frozen=True, kw_only=True)
class Surface:
    """L(w + x d₁ + y d₂) for orthonormal d₁, d₂: ``values[i, j]`` is the loss at (``x[i]``, ``y[j]``).

    ``x`` and ``y`` are true displacements, Euclidean lengths in weight space. NaN and inf are kept. With several
    draws, ``values`` is their mean, ``samples`` (draws, steps, steps) each of them and ``stderr`` the standard error
    of the mean; ``directions`` are those of the first. ``units`` are the lengths of one relative unit on each axis.
    """

    values: Tensor      # (steps, steps) float64
    x: Tensor           # (steps,) float64
    y: Tensor           # (steps,) float64
    plane: Plane = field(repr=False)
    settings: dict[str, Any]
    samples: Tensor | None = None
    stderr: Tensor | None = None
    models: Tensor | None = None            # (m, 2) coordinates of the models given
    model_values: Tensor | None = None      # (m,) the loss there
    trajectory: Trajectory | None = None

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.values.shape))
        draws = "" if self.samples is None else f", {len(self.samples)} draws"
        return f"Surface({shape} points, x {extent(self.x)}, y {extent(self.y)}, loss {extent(self.values)}{draws})"

    @property
    def directions(self) -> list[list[Tensor]]:
        """d₁ and d₂: orthonormal, each a list of tensors in the order of the parameters that require a gradient."""
        return self.plane.directions

    @property
    def units(self) -> tuple[float, float]:
        return self.plane.units[0], self.plane.units[1]

    def project(self, objective: Objective, models: Sequence[Model]) -> Trajectory:
        """Where other weights of the same model lie: coordinates as on the axes, and their distance from the plane."""
        return project(vectors.Space(self.plane.origin), self.plane, [read(objective, m).weights for m in models])

    def plot(self, ax: Any = None, *, relative: bool = False, levels: int = 20, log: bool | None = None) -> Any:
        """Contours for a paper, on a matplotlib axes; cells that are not finite stay blank."""
        return self.picture(relative).contour(ax, levels=levels, log=log)

    def to_html(self, title: str = "Loss surface", *, relative: bool = False, names: Sequence[str] = ()) -> str:
        """A self-contained piece of HTML with a surface that can be turned: no network, no other library.

        ``names`` are written beside the models.
        """
        return self.picture(relative).turnable(title, names)

    def picture(self, relative: bool = False) -> Picture:
        """What ``plot`` and ``to_html`` draw; with ``relative``, lengths are in the ``units`` of the axes."""
        units = torch.tensor(self.units if relative else (1.0, 1.0), dtype=torch.float64)
        return Picture(x=self.x / units[0], y=self.y / units[1], values=self.values,
                       labels=[self._label(k, relative) for k in range(2)],
                       points=torch.zeros(1, 2) if self.models is None else self.models / units,
                       path=None if self.trajectory is None else self.trajectory.coordinates / units)

    def _label(self, k: int, relative: bool) -> str:
        """What axis k shows, with the share of a trajectory's variance along it."""
        name = self.plane.names[k]
        kind = {"filter": "random, filter-normalised", "layer": "random, layer-normalised"}.get(name, name)
        kind += " (orthogonal part)" if name.startswith("model 3") else ""
        share = "" if self.trajectory is None else f", {float(self.trajectory.explained[k]):.0%} of variance"
        return f"displacement{' (relative)' * relative}: {kind}{share}"


def surface(objective: Objective, steps: int = 51, seed: int | torch.Generator = 0, *,
            directions: Kind | Sequence[Any] | None = None, radius: float | None = None, models: Sequence[Model] = (),
            trajectory: Sequence[Model] | None = None, draws: int = 1, relative: bool = False, margin: float = 0.2,
            batch_norm: BatchNorm | None = None, checkpoint: str | os.PathLike[str] | None = None,
            group: Any = None) -> Surface:
    """The loss at w + x d₁ + y d₂ on a grid of ``steps`` × ``steps`` points, d₁ and d₂ orthonormal.

    Args:
        objective: L.
        steps: points along each axis; odd, so that the middle is w itself, unless both axes span models or a
            trajectory.
        seed: of random directions.
        directions: a kind for both, or two of them, each a kind or a list of tensors. Kinds: "filter", the default
            (random with the norms of the weights' filters), "layer", "random", "eigenvectors" (of the largest Hessian
            eigenvalues), "update" and "pca" (the last steps and the principal components of ``trajectory``), and
            "gradient", one direction, which goes with another kind: ("gradient", "filter"). With two models, the second
            direction; with three, none.
        radius: both axes run over [−radius, radius], a Euclidean length in weight space. By default as far as models
            and trajectory reach; else the length of the normalised direction; else 1.
        models: one model instead of the objective's own weights, or two or three that the plane goes through, as
            modules, state_dicts or lists of tensors. The first is the origin, the second lies on the x axis.
        trajectory: a training run, projected on the plane.
        draws: how many pairs of random directions to average over.
        relative: whether ``radius`` counts in units of the directions' lengths (or of ‖w‖, where they have none).
        margin: how much further than the models and the trajectory to go, as a share of their extent.
        batch_norm: running statistics are "frozen" as in the objective's model, "interpolated" between the models'
            own (the default where they bring some), or "reestimated" on the objective's data at every point.
        checkpoint: a file from which an interrupted surface resumes.
        group: a process group whose ranks hold the same model and data and share the points.

    Returns:
        ``.values .x .y .directions .settings`` and, where there are any, ``.stderr .samples .models .model_values
        .trajectory``; the model is bitwise what it was.

    Raises:
        ValueError: for directions that are zero or collinear, models that do not fit, contradicting arguments, or a
            loss in the middle that is not ``objective.value()``.
        RunFolderError: for a checkpoint of another surface.

    Source: arXiv 1712.09913; planes through three models: 1802.10026.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.eye(2), model.weight.detach().T.clone()))
    >>> s = surface(objective, steps=3, radius=2.0)
    >>> [round(v, 4) for v in s.values.flatten().tolist()]      # ½(x² + y²)
    [4.0, 2.0, 4.0, 2.0, 0.0, 2.0, 4.0, 2.0, 4.0]
    """
    if directions is not None and len(models) == 3:
        raise ValueError("three models give the directions themselves: leave directions out")
    planner = Planner(objective, 2, directions, models, trajectory, seed)
    check_arguments(steps, radius, draws, planner.random)
    objective.check()
    policy = batch_norm_policy(objective, batch_norm, planner.states)
    first = planner.layout()
    plane = first.plane
    axes = [span(first, k, radius, relative, margin, steps) for k in range(2)]
    samples = sample(planner, first, axes, draws, objective, batch_norm=policy, checkpoint=checkpoint, group=group)
    found: dict[str, Tensor] = {}
    if plane.models:
        found["models"] = torch.tensor(plane.models, dtype=torch.float64)
        found["model_values"] = evaluate(objective, plane, found["models"], batch_norm=policy)
    settings = {"directions": plane.names, "mode": objective.mode, "batch_norm": policy, "draws": draws,
                "seed": seed if isinstance(seed, int) else None}
    return Surface(values=samples.mean(0), x=axes[0], y=axes[1], plane=plane, settings=settings,
                   trajectory=first.trajectory, **several(samples), **found)
