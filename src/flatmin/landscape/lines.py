"""The loss along a line through the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import perturbed, vectors
from ..objective import Objective


@dataclass(frozen=True, kw_only=True)
class Line:
    """L(w + x d) for a unit vector d: ``x`` is the true displacement ‖w' − w‖, with sign. NaN and inf are kept."""

    x: Tensor           # (steps,) float64
    values: Tensor      # (steps,) float64
    direction: list[Tensor] = field(repr=False)
    settings: dict[str, Any]

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """The curve, on a matplotlib axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        ax.plot(self.x.numpy(), self.values.numpy(), **style)
        ax.set_xlabel("displacement")
        ax.set_ylabel("loss")
        return ax


def line(objective: Objective, direction: Sequence[Tensor] | Literal["random", "gradient"] | None = None, *,
         steps: int = 51, radius: float = 1.0, seed: int | torch.Generator = 0) -> Line:
    """The loss at w + x d for ``steps`` evenly spaced x in [−radius, radius], d = direction / ‖direction‖.

    Args:
        objective: L.
        direction: tensors in the order of the parameters that require a gradient; "gradient"; or "random", the
            default, a normal vector.
        steps: how many points; odd, so that the middle one is w itself.
        radius: the largest displacement, a Euclidean length in weight space.
        seed: of a random direction.

    Returns:
        ``.x .values .direction .settings``; the weights are bitwise what they were.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(1, 1), model.weight.detach().clone()))
    >>> [abs(round(v, 4)) for v in line(objective, steps=3, radius=2.0).values.tolist()]
    [4.0, 0.0, 4.0]
    """
    if steps < 1 or not radius > 0:
        raise ValueError(f"steps and radius must be positive, got {steps} and {radius}")
    w = objective.parameters
    space = vectors.Space(w)
    with objective.session():
        d, kind = _direction(objective, space, direction, seed)
        length = space.norm(d)
        if not math.isfinite(length) or length == 0:
            raise ValueError(f"the direction has length {float(length)}")
        vectors.scale(1 / length, d)
        x = torch.linspace(-radius, radius, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1).double()
        values = torch.empty_like(x)
        for i, t in enumerate(x.tolist()):
            with perturbed.displaced(w, d, t):
                values[i] = objective.value()
    settings = {"direction": kind, "radius": radius, "mode": objective.mode}
    return Line(x=x, values=values, direction=d, settings=settings)


def _direction(objective: Objective, space: vectors.Space, direction: Any,
               seed: int | torch.Generator) -> tuple[list[Tensor], str]:
    if direction is None or isinstance(direction, str) and direction == "random":
        return space.random(vectors.seeded(seed)), "random"
    if isinstance(direction, str):
        if direction != "gradient":
            raise ValueError(f'direction must be "random", "gradient" or a list of tensors, got {direction!r}')
        return [vectors.local(t) for t in objective.trainable_gradient()[1]], "gradient"
    d = list(direction)
    if [t.shape for t in d] != [p.shape for p in space.parameters]:
        raise ValueError(f"the direction needs one tensor for each of the {len(space.parameters)} parameters that "
                         f"require a gradient, of their shapes; got {len(d)} tensors")
    return [vectors.local(t.detach()).to(p.device, p.dtype, copy=True) for t, p in
            zip(d, space.parameters, strict=True)], "given"
