"""Training trajectories on a plane: their principal directions and their projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import vectors
from .plane import Plane


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A training run seen on a line or plane.

    ``coordinates`` (T, k) are ⟨w_t − w, d_k⟩, lengths as on the grid's axes; ``distance`` (T,) is how far each w_t lies
    off the plane; ``explained`` (k,) is the share of the run's variance, Σ_t ‖w_t − mean‖², along each direction.
    """

    coordinates: Tensor
    distance: Tensor
    explained: Tensor

    @property
    def x(self) -> Tensor:
        return self.coordinates[:, 0]

    @property
    def y(self) -> Tensor:
        return self.coordinates[:, 1]


def project(space: vectors.Space, plane: Plane, weights: Sequence[Sequence[Tensor]]) -> Trajectory:
    """The coordinates of weights on a plane, and how much of their variance it shows."""
    rows, squares = zip(*(plane.coordinates(space, w) for w in weights), strict=True)
    c, square = torch.tensor(rows, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)
    mean = [torch.stack([w[i] for w in weights]).mean(0) - o for i, o in enumerate(plane.origin)]
    total = (square.mean() - float(space.dot(mean, mean))).clamp(min=0)
    return Trajectory(coordinates=c, distance=(square - c.square().sum(1)).clamp(min=0).sqrt(),
                      explained=c.var(0, correction=0) / total)


def principal_directions(space: vectors.Space, weights: Sequence[Sequence[Tensor]], k: int = 2) -> list[list[Tensor]]:
    """The k directions of largest variance of a sequence of weights, from the T × T matrix of their inner products.

    Raises:
        ValueError: if the weights vary in fewer than k directions.
    """
    n = len(weights)
    mean = [torch.stack([w[i] for w in weights]).mean(0) for i in range(len(space.parameters))]
    steps = [[a - b for a, b in zip(w, mean, strict=True)] for w in weights]
    gram = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = float(space.dot(steps[i], steps[j]))
    found, mixes = torch.linalg.eigh(gram)
    if n <= k or not bool(found[-k] > 1e-10 * found[-1]):
        raise ValueError(f"a trajectory of {n} models has fewer than {k} principal directions: pass more checkpoints")
    out = []
    for mix in mixes.T.flip(0)[:k].tolist():
        d = [torch.zeros_like(t) for t in mean]
        for share, step in zip(mix, steps, strict=True):
            vectors.axpy(share, step, d)
        out.append(d)
    return out
