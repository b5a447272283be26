"""Where a line or surface lies: its origin, directions and axes, from what was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..curvature import Hessian, eigenpairs
from ..objective import Objective
from .directions import KINDS, given, orthonormal, random_direction, wide
from .grid import axis
from .models import Model, State, read
from .plane import Plane, at_weights_of
from .trajectories import Trajectory, principal_directions, project

RANDOM = ("filter", "layer", "random")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A plane of k dimensions, and the trajectory projected on it."""

    plane: Plane
    trajectory: Trajectory | None


class Planner:
    """Makes planes through the models given, along the directions named; ``layout()`` draws new random directions."""

    def __init__(self, objective: Objective, k: int, directions: Any, models: Sequence[Model],
                 trajectory: Sequence[Model] | None, seed: int | torch.Generator):
        self.objective, self.k = objective, k
        self.space = vectors.Space(objective.parameters)
        self.states = [read(objective, m) for m in models]
        self.path = [read(objective, m).weights for m in trajectory] if trajectory is not None else None
        self.generator = vectors.seeded(seed)
        self.origin = self.states[0].weights if self.states else [wide(p).clone() for p in objective.parameters]
        if len(self.states) > k + 1:
            raise ValueError(f"a {'line' if k == 1 else 'surface'} goes through at most {k + 1} models, "
                             f"got {len(self.states)}")
        self.wanted = self._wanted(directions)
        self._fixed: list[tuple[str, list[Tensor]]] = []

    @property
    def random(self) -> bool:
        """Whether another draw gives another plane."""
        return any(isinstance(want, str) and want in RANDOM for want in self.wanted)

    def layout(self) -> Layout:
        """A plane, drawn anew where it is random."""
        if not self._fixed:
            self._fixed = self._fix()
        found: list[tuple[str, list[Tensor]]] = []
        fixed = iter(self._fixed)
        for want in self.wanted:
            if isinstance(want, str) and want in RANDOM:
                d = random_direction(self._like(), self.generator, normalize=None if want == "random" else want,
                                     orthogonal_to=[d for _, d in found])
                found.append((want, d))
            else:
                found.append(next(fixed))
        names = [name for name, _ in found]
        unit, lengths = orthonormal(self.space, [d for _, d in found], names)
        size = float(self.space.norm(self.origin))
        units = [length if name in ("filter", "layer", "update") or name.startswith("model") else size or 1.0
                 for name, length in zip(names, lengths, strict=True)]
        plane = Plane(origin=self.origin, directions=unit, names=names, units=units, states=self.states)
        for state in self.states:
            plane.models.append(tuple(plane.coordinates(self.space, state.weights)[0]))
        return Layout(plane=plane, trajectory=project(self.space, plane, self.path) if self.path else None)

    def _wanted(self, directions: Any) -> list[Any]:
        """One entry a dimension: a name, or a list of tensors."""
        through = [f"model {i + 2} − model 1" for i in range(len(self.states) - 1)]
        left = self.k - len(through)
        if directions is None or isinstance(directions, str):
            named = [directions or "filter"] * left
        else:
            named = [directions] if self.k == 1 else list(directions)
            if len(named) != left:
                raise ValueError(f"{left} directions are free, got {len(named)}" +
                                 f" ({len(through)} go through the models)" * bool(through))
        for want in named:
            if isinstance(want, str) and want not in KINDS:
                raise ValueError(f"a direction is one of {', '.join(map(repr, KINDS))}, or a list of tensors; "
                                 f"got {want!r}")
            if isinstance(want, str) and want in ("pca", "update") and (self.path is None or len(self.path) < 2):
                raise ValueError(f"{want!r} is read from trajectory=, a sequence of at least two models")
        if sum(isinstance(want, str) and want == "gradient" for want in named) > 1:
            raise ValueError('"gradient" is one direction: pass another kind with it, such as ("gradient", "filter")')
        if any(isinstance(w, str) and w in ("filter", "layer") for w in named) and \
                not any(p.dim() > 1 and bool(p.detach().any()) for p in self._like()):
            warnings.warn("there is no tensor of two dimensions whose filters could be normalised: the directions are "
                          "plain normal vectors", stacklevel=5)
            named = ["random" if isinstance(w, str) and w in ("filter", "layer") else w for w in named]
        return [*through, *named]

    def _like(self) -> Sequence[Tensor]:
        """The tensors whose filters give the norms: the origin, or the parameters themselves, which may be sharded."""
        return self.origin if self.states else self.objective.parameters

    def _fix(self) -> list[tuple[str, list[Tensor]]]:
        """The directions that are not random, in order; each kind is computed once."""
        names = [w for w in self.wanted if isinstance(w, str)]
        pools = {kind: self._compute(kind, names.count(kind)) for kind in dict.fromkeys(names) if kind not in RANDOM
                 and not kind.startswith("model")}
        out = []
        for i, want in enumerate(self.wanted):
            if not isinstance(want, str):
                out.append((f"given {i + 1}", given(self.space, want)))
            elif want.startswith("model"):
                out.append((want, [b - a for a, b in zip(self.origin, self.states[i + 1].weights, strict=True)]))
            elif want not in RANDOM:
                out.append((want, pools[want].pop(0)))
        return out

    def _compute(self, kind: str, count: int) -> list[list[Tensor]]:
        state = self.states[0] if self.states else None
        if kind == "gradient":
            with at_weights_of(self.objective, state):
                return [[wide(t) for t in self.objective.evaluate(gradient=True).gradient]] * count
        if kind == "eigenvectors":
            return self._eigenvectors(state, count)
        assert self.path is not None
        if kind == "update":
            return [[b - a for a, b in zip(self.path[i - 1], self.path[i], strict=True)]
                    for i in range(len(self.path) - 1, 0, -1)][:count]
        return principal_directions(self.space, self.path, count)

    def _eigenvectors(self, state: State | None, count: int) -> list[list[Tensor]]:
        with at_weights_of(self.objective, state):
            hessian = Hessian(self.objective)
            spectrum = eigenpairs(hessian, k=count, seed=0)
            if not bool(spectrum.converged.all()):
                warnings.warn(f"{int((~spectrum.converged).sum())} of the {count} eigenvectors have not converged",
                              stacklevel=6)
            return [[wide(t) for t in hessian.split(row)] for row in spectrum.eigenvectors.flip(0)]


def span(layout: Layout, k: int, radius: float | None, relative: bool, margin: float, steps: int) -> Tensor:
    """Axis k, in displacement: symmetric with a radius, else around the models and the trajectory, else one unit."""
    plane = layout.plane
    if radius is not None:
        return _around(radius * plane.units[k] if relative else radius, steps)
    seen = [0.0, *(c[k] for c in plane.models)]
    if layout.trajectory is not None:
        seen += layout.trajectory.coordinates[:, k].tolist()
    low, high = min(seen), max(seen)
    if high - low > 1e-6 * plane.units[k]:
        extra = margin * (high - low)
        return axis(low - extra, high + extra, steps)
    name = plane.names[k]
    return _around(plane.units[k] if name in ("filter", "layer", "update") else 1.0, steps)


def _around(r: float, steps: int) -> Tensor:
    if steps % 2 == 0:
        raise ValueError(f"steps must be odd, so that the middle of the axis is w itself, got {steps}; use {steps + 1}")
    return axis(-r, r, steps)


def check_arguments(steps: int, radius: float | None, draws: int, random: bool) -> None:
    if steps < 1 or radius is not None and not radius > 0:
        raise ValueError(f"steps and radius must be positive, got {steps} and {radius}")
    if draws < 1:
        raise ValueError(f"draws must be positive, got {draws}")
    if draws > 1 and not random:
        raise ValueError("draws= repeats random directions, and none of these is random")
