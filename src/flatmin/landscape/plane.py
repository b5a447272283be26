"""A line or plane in weight space, and the loss of a model at its points."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import parallel, perturbed, vectors
from ..determinism import same
from ..objective import Objective
from ..parallel import unwrapped
from .models import State, statistics

BatchNorm = Literal["frozen", "interpolated", "reestimated"]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The points w + Σ_k c_k d_k for orthonormal directions d_k; the c_k are Euclidean lengths.

    ``units`` are the lengths of one relative step along each direction (of the vector that was normalised or
    projected to give it); ``models`` are the coordinates of the models that the plane was laid through.
    """

    origin: list[Tensor] = field(repr=False)
    directions: list[list[Tensor]] = field(repr=False)
    names: list[str]
    units: list[float]
    models: list[tuple[float, ...]] = field(default_factory=list)
    states: list[State] = field(default_factory=list, repr=False)

    def coordinates(self, space: vectors.Space, w: Sequence[Tensor]) -> tuple[list[float], float]:
        """⟨w' − w, d_k⟩ for every k, and ‖w' − w‖²."""
        step = [a - b for a, b in zip(w, self.origin, strict=True)]
        return [float(space.dot(step, d)) for d in self.directions], float(space.dot(step, step))


class PlaneModel:
    """A model that can be put on any point of a plane; every point is set from the saved w, never from the last one.

    The loss there is ``at(coordinates)``. Inside :meth:`open` only; afterwards weights, buffers, modes, random state
    and gradients are bitwise what they were.
    """

    def __init__(self, objective: Objective, plane: Plane, batch_norm: BatchNorm):
        self.objective, self.plane = objective, plane
        self._w = [parallel.local(p.detach()) for p in objective.parameters]
        self._norms = [m for m in objective.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
                       and m.running_mean is not None]
        self._reestimate = batch_norm == "reestimated" and bool(self._norms)
        self._statistics = _Interpolated(objective, plane) if batch_norm == "interpolated" else None
        self._row: tuple[float, list[Tensor]] | None = None

    @contextmanager
    def open(self) -> Iterator[PlaneModel]:
        with restored_weights(self.objective):
            try:
                yield self
            finally:
                self._row = None

    def at(self, coordinates: Sequence[float]) -> float:
        """L at w + Σ_k c_k d_k, in the arithmetic of the directions, rounded once to that of the weights."""
        self.put(coordinates)
        return float(self.objective.value())

    def centre(self) -> float:
        """L at the origin, put there like every other point.

        Raises:
            ValueError: if ``objective.value()``, with the origin's weights simply set, differs beyond rounding.
        """
        plain = self._plain()
        found = self.at([0.0] * len(self.plane.directions))
        if found != float(plain) and not same(plain, plain.new_tensor(found), self.objective.parameters):
            raise ValueError(f"the middle of the landscape is {found:.9g}, objective.value() at the same weights is "
                             f"{float(plain):.9g}: the model or the data hold state that changes between two "
                             "evaluations. The loss must depend on the weights and the batch alone")
        return found

    def _plain(self) -> Tensor:
        """``objective.value()`` at the origin, before any point was put there."""
        if self.plane.states:
            vectors.copy(self.plane.origin, self._w)
            if self._statistics is not None:
                set_statistics(self.objective.model, self.plane.states[0])
        if self._reestimate:
            self._measure_statistics()
        return self.objective.value()

    def put(self, coordinates: Sequence[float]) -> None:
        """Weights, and normalization statistics by their policy, to a point."""
        first, last = list(coordinates[:-1]), float(coordinates[-1])
        add(self._start(first), self.plane.directions[-1], last, self._w)
        if self._statistics is not None:
            self._statistics.put(coordinates)
        if self._reestimate:
            self._measure_statistics()

    def realised(self, coordinates: Sequence[float]) -> list[Tensor]:
        """Per half-precision weight, what :func:`flatmin.perturbed.realised_step` gives for the step Σ_k c_k d_k."""
        half = [i for i, t in enumerate(self._w) if t.dtype in vectors.HALF]
        if half:
            self.put(coordinates)
        out = []
        for i in half:
            asked = sum((c * d[i] for c, d in zip(coordinates, self.plane.directions, strict=True)), torch.zeros(()))
            out.append(perturbed.realised_step([self._w[i]], [self.plane.origin[i]], [asked]))
        return out

    def _start(self, coordinates: Sequence[float]) -> Sequence[Tensor]:
        """w + Σ c_k d_k over all directions but the last, kept while these coordinates stay the same."""
        if not coordinates:
            return self.plane.origin
        (c,) = coordinates
        if self._row is None:
            self._row = (math.nan, [torch.empty_like(t) for t in self.plane.origin])
        if self._row[0] != c:
            add(self.plane.origin, self.plane.directions[0], c, self._row[1])
            self._row = (c, self._row[1])
        return self._row[1]

    def _measure_statistics(self) -> None:
        """Running statistics ← averages of the batch statistics over the data, weighted by the terms of a batch."""
        momenta = [m.momentum for m in self._norms]
        flags = [m.training for m in self._norms]
        try:
            for m in self._norms:
                m.reset_running_stats()
                m.training = True
            seen = 0.0
            for batch in self.objective.weighted_batches():
                seen += batch.weight
                for m in self._norms:
                    m.momentum = batch.weight / seen
                batch.outputs()
        finally:
            for m, momentum, flag in zip(self._norms, momenta, flags, strict=True):
                m.momentum, m.training = momentum, flag


class _Interpolated:
    """Running statistics on the plane through several models: affine in the coordinates, equal to each model's own.

    Outside of the triangle of the models an affine variance would turn negative, so that statistics are held within
    the range of the models' own.
    """

    def __init__(self, objective: Objective, plane: Plane):
        here = statistics(unwrapped(objective.model))
        self._slopes = _slopes(plane)
        self._tables = [(here[name], torch.stack([s.statistics[name].to(here[name]) for s in plane.states]))
                        for name in here]

    def put(self, coordinates: Sequence[float]) -> None:
        shares = self._slopes @ torch.tensor(coordinates, dtype=torch.float64)
        for buffer, table in self._tables:
            value = table[0].clone()
            for share, other in zip(shares.tolist(), table[1:], strict=True):
                value += share * (other - table[0])
            buffer.copy_(value.clamp(table.amin(0), table.amax(0)) if len(table) > 1 else value)


def _slopes(plane: Plane) -> Tensor:
    """S such that S c are the shares of the second and third model at coordinates c."""
    edges = torch.tensor(plane.models[1:], dtype=torch.float64).reshape(len(plane.models) - 1, len(plane.directions))
    return torch.linalg.pinv(edges.T) if len(edges) else edges


def add(origin: Sequence[Tensor], d: Sequence[Tensor], c: float, out: Sequence[Tensor]) -> None:
    """out ← origin + c d; exactly the origin for c = 0."""
    if c == 0:
        vectors.copy(origin, out)
        return
    for w, step, target in zip(origin, d, out, strict=True):
        torch.add(w, step, alpha=c, out=target)


@contextmanager
def restored_weights(objective: Objective) -> Iterator[None]:
    """A session of an objective at whose end the weights are restored bit for bit, whatever was written to them."""
    w = [parallel.local(p.detach()) for p in objective.parameters]
    saved = [t.clone() for t in w]
    with objective.session():
        try:
            yield
        finally:
            with torch.no_grad():
                vectors.copy(saved, w)


@contextmanager
def at_weights_of(objective: Objective, state: State | None) -> Iterator[None]:
    """A session in which the model has the weights and statistics of another (its own for None)."""
    if state is None:
        with objective.session():
            yield
        return
    with restored_weights(objective):
        with torch.no_grad():
            vectors.copy(state.weights, [parallel.local(p.detach()) for p in objective.parameters])
            set_statistics(objective.model, state)
        yield


def set_statistics(model: nn.Module, state: State) -> None:
    """The running statistics of normalization layers, where the state has them."""
    for name, buffer in statistics(unwrapped(model)).items():
        buffer.copy_(state.statistics.get(name, buffer))


def batch_norm_policy(objective: Objective, policy: Any, states: Sequence[State]) -> BatchNorm:
    """The policy for running statistics: as given, or "interpolated" where models bring their own, else "frozen"."""
    names = statistics(unwrapped(objective.model))
    able = bool(states and names) and all(name in s.statistics for s in states for name in names)
    if policy is None:
        if names and states and not able:
            warnings.warn("the models given are bare parameters, without the running statistics of their "
                          'normalization layers: those of the objective\'s model are used. Pass state_dicts, or '
                          'batch_norm="reestimated"', stacklevel=4)
        return "interpolated" if able else "frozen"
    if policy not in ("frozen", "interpolated", "reestimated"):
        raise ValueError(f'batch_norm must be "frozen", "interpolated" or "reestimated", got {policy!r}')
    if policy == "interpolated" and names and not able:
        raise ValueError('batch_norm="interpolated" needs models= as state_dicts or modules that hold the running '
                         "statistics of every normalization layer")
    return policy if names else "frozen"
