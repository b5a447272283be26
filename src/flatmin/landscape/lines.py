"""The loss along a line through the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..objective import Objective
from .directions import Kind
from .grid import evaluate
from .layout import Layout, Planner, check_arguments, span
from .models import Model
from .plane import BatchNorm, batch_norm_policy
from .trajectories import Trajectory


def extent(values: Tensor) -> str:
    """From the smallest to the largest finite number."""
    finite = values[values.isfinite()]
    few = len(finite) < values.numel()
    text = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if len(finite) else "nowhere finite"
    return text + f" ({values.numel() - len(finite)} not finite)" * (few and len(finite) > 0)


@dataclass(frozen=True, kw_only=True)
class Line:
    """L(w + x d) for a unit vector d: ``x`` is the true displacement ‖w' − w‖, with sign. NaN and inf are kept.

    With several draws, ``values`` is their mean, ``samples`` (draws, steps) each of them and ``stderr`` the standard
    error of the mean; ``direction`` is that of the first. ``unit`` is the length of one relative unit.
    """

    x: Tensor           # (steps,) float64
    values: Tensor      # (steps,) float64
    direction: list[Tensor] = field(repr=False)
    settings: dict[str, Any]
    samples: Tensor | None = None
    stderr: Tensor | None = None
    unit: float = 1.0
    models: Tensor | None = None        # (m,) the coordinates of the models given
    trajectory: Trajectory | None = None

    def __repr__(self) -> str:
        draws = "" if self.samples is None else f", {len(self.samples)} draws"
        return f"Line({len(self.x)} points, x {extent(self.x)}, loss {extent(self.values)}{draws})"

    def plot(self, ax: Any = None, *, relative: bool = False, **style: Any) -> Any:
        """The curve, with a band of two standard errors where there are several draws, on a matplotlib axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        unit = self.unit if relative else 1.0
        x = (self.x / unit).numpy()
        curve = ax.plot(x, self.values.numpy(), **style)[0]
        if self.stderr is not None:
            low, high = ((self.values + side * self.stderr).numpy() for side in (-2, 2))
            ax.fill_between(x, low, high, color=curve.get_color(), alpha=0.2, linewidth=0)
        for c in [] if self.models is None else (self.models / unit).tolist():
            ax.axvline(c, color="0.6", linewidth=0.8, zorder=0)
        ax.set_xlabel("displacement" + " / unit of the direction" * relative)
        ax.set_ylabel("loss")
        return ax


def line(objective: Objective, direction: Sequence[Tensor] | Kind | None = None, *, steps: int = 51,
         radius: float | None = None, seed: int | torch.Generator = 0, models: Sequence[Model] = (),
         trajectory: Sequence[Model] | None = None, draws: int = 1, relative: bool = False, margin: float = 0.0,
         batch_norm: BatchNorm | None = None, checkpoint: str | os.PathLike[str] | None = None,
         group: Any = None) -> Line:
    """The loss at w + x d for ``steps`` evenly spaced x, d = direction / ‖direction‖.

    Args:
        objective: L.
        direction: tensors in the order of the parameters that require a gradient; "random", the default, a normal
            vector; "filter" or "layer", a normal vector with the norms of the weights' filters or tensors; "gradient";
            "eigenvectors", the one of the largest Hessian eigenvalue; "update" and "pca", the last step and the first
            principal component of ``trajectory``.
        steps: how many points; odd, so that the middle is w itself, unless the axis spans models or a trajectory.
        radius: the largest displacement, a Euclidean length in weight space: x in [−radius, radius]. By default 1, or
            the length of a "filter", "layer" or "update" direction, or as far as models and trajectory reach.
        seed: of random directions.
        models: one model instead of the objective's own weights, or two: x from the first (0) to the second, as
            modules, state_dicts or lists of tensors.
        trajectory: a training run, projected on the line.
        draws: how many random directions to average over.
        relative: whether ``radius`` counts in units of the direction's length (or of ‖w‖, where it has none).
        margin: how much further than the models and the trajectory to go, as a share of their extent.
        batch_norm: running statistics are "frozen" as in the objective's model, "interpolated" between the models'
            own (the default where they bring some), or "reestimated" on the objective's data at every point.
        checkpoint: a file from which an interrupted line resumes.
        group: a process group whose ranks hold the same model and data and share the points.

    Returns:
        ``.x .values .direction .settings`` and, where there are any, ``.stderr .samples .models .trajectory``; the
        model is bitwise what it was.

    Raises:
        ValueError: for directions of no length, models that do not fit, arguments that contradict each other, or a
            loss in the middle that is not ``objective.value()``.

    Source: arXiv 1412.6544 (interpolation), 1712.09913 (filter normalisation).

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(1, 1), model.weight.detach().clone()))
    >>> [abs(round(v, 4)) for v in line(objective, steps=3, radius=2.0).values.tolist()]
    [4.0, 0.0, 4.0]
    """
    if direction is not None and len(models) == 2:
        raise ValueError("two models give the direction themselves: leave direction out")
    planner = Planner(objective, 1, "random" if direction is None else direction, models, trajectory, seed)
    check_arguments(steps, radius, draws, planner.random)
    objective.check()
    policy = batch_norm_policy(objective, batch_norm, planner.states)
    first = planner.layout()
    axes = [span(first, 0, radius, relative, margin, steps)]
    samples = sample(planner, first, axes, draws, objective, batch_norm=policy, checkpoint=checkpoint, group=group)
    plane = first.plane
    settings = {"direction": plane.names[0].split(" ")[0] if plane.names[0].startswith("given") else plane.names[0],
                "radius": float(axes[0].abs().max()), "mode": objective.mode, "batch_norm": policy, "draws": draws,
                "seed": seed if isinstance(seed, int) else None}
    return Line(x=axes[0], values=samples.mean(0), direction=plane.directions[0], settings=settings,
                unit=plane.units[0], trajectory=first.trajectory, **several(samples),
                models=torch.tensor(plane.models, dtype=torch.float64).flatten() if plane.models else None)


def sample(planner: Planner, first: Layout, axes: Sequence[Tensor], draws: int, objective: Objective, *,
           checkpoint: str | os.PathLike[str] | None, **options: Any) -> Tensor:
    """The losses on a grid for every draw of the random directions: (draws, *steps)."""
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    out = []
    for draw in range(draws):
        layout = first if draw == 0 else planner.layout()
        file = checkpoint if checkpoint is None or draw == 0 else f"{os.fspath(checkpoint)}.draw{draw}"
        out.append(evaluate(objective, layout.plane, points, checkpoint=file, **options))
    return torch.stack(out).reshape(draws, *(len(a) for a in axes))


def several(samples: Tensor) -> dict[str, Tensor]:
    """The fields ``samples`` and ``stderr`` of a record of several draws; none for one draw."""
    if len(samples) < 2:
        return {}
    return {"samples": samples, "stderr": samples.std(0) / len(samples) ** 0.5}
