"""The loss on many points of a plane: can be resumed, and ranks can share the points."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..errors import RunFolderError
from ..files import digest, replace_file
from ..objective import Objective
from ..parallel import Group
from ..sharpness.cautions import warn_of_rounded_step
from .plane import BatchNorm, Plane, PlaneModel

FORMAT = "flatmin.landscape 1"

DIFFERENT = ("the ranks hold different weights, directions or points: give all the same seed, or pass as group= the "
             "ranks that are replicas of each other")


def evaluate(objective: Objective, plane: Plane, points: Tensor, *, batch_norm: BatchNorm = "frozen",
             checkpoint: str | os.PathLike[str] | None = None, group: Any = None, seconds: float = 10.0) -> Tensor:
    """L at w + Σ_k c_k d_k for every row c of ``points``; NaN and inf are kept as values.

    Args:
        objective: L.
        plane: w and the d_k.
        points: (n, k), float64.
        batch_norm: what running statistics do.
        checkpoint: a file written every ``seconds`` and at the end, also when interrupted. Where it exists, only
            missing points are computed. It is replaced in one step, so it is never half written.
        group: a process group whose ranks all hold the model and the data and share the points.

    Returns:
        (n,) float64; bitwise the same whether interrupted or not, on one rank or many.

    Raises:
        RunFolderError: if the file belongs to other weights, directions, points or data.
        ValueError: if L at the middle, c = 0, is not ``objective.value()`` at the same weights.
    """
    ranks = Group(group)
    if ranks.size > 1 and vectors.Space(objective.parameters).sharded:
        raise ValueError("sharded weights are evaluated by all ranks together: leave group= out")
    points = points.to(torch.float64)
    model = PlaneModel(objective, plane, batch_norm)
    with model.open():
        origin, error = float("nan"), None
        try:
            origin = model.centre()
        except Exception as e:
            error = e
        ranks.raise_everywhere(error)
        key = "" if checkpoint is None and ranks.size == 1 else \
            fingerprint(plane, points, (batch_norm, objective.mode, objective.seed))
        ranks.refuse_different(key, DIFFERENT)
        moved = points.norm(dim=1)
        if bool(moved.any()):       # where rounding is worst
            nearest = points[moved.where(moved > 0, torch.inf).argmin()].tolist()
            warn_of_rounded_step(objective, model.realised(nearest), stacklevel=5)
        file = _opened(objective, checkpoint, key, origin, len(points), ranks, seconds)
        mine = torch.tensor_split(file.missing(), ranks.size)[ranks.rank].tolist()
        rows = points.tolist()
        try:
            for i in mine:
                file.put(i, model.at(rows[i]))
        except Exception as e:
            error = e
            if ranks.size == 1:
                raise
        finally:
            file.save()
        return file.finish(error)


def _opened(objective: Objective, checkpoint: str | os.PathLike[str] | None, key: str, origin: float, n: int,
            ranks: Group, seconds: float) -> _File:
    """The file of a grid. Where the model's own ranks evaluate each point together, the first reads and writes it."""
    own = objective.ranks
    if not own or checkpoint is None:
        return _File(checkpoint, key, origin, n, ranks, seconds)
    key = str(own.total(*(float(int(key[i:i + 12], 16)) for i in (0, 12))))
    first, file, error = own.least(own.rank) == own.rank, _File(None, key, origin, n, ranks, seconds), None
    try:
        file = _File(checkpoint, key, origin, n, ranks, seconds) if first else file
    except RunFolderError as e:
        error = e
    if not own.least(int(error is None)):
        raise error or RunFolderError(f"{checkpoint} cannot be resumed; the error of the first rank says why")
    file.values = own.sum_(file.values if first else torch.zeros(n, dtype=torch.float64))
    file.done = own.sum_(file.done.double()) > 0
    return file


class _File:
    """Values by point, in memory and on disk. Each rank writes a file of its own; together they are one."""

    def __init__(self, path: str | os.PathLike[str] | None, key: str, origin: float, n: int, ranks: Group,
                 seconds: float):
        self.key, self.origin, self.ranks, self.seconds = key, origin, ranks, seconds
        self.values = torch.full((n,), float("nan"), dtype=torch.float64)
        self.done = torch.zeros(n, dtype=torch.bool)
        self.main = Path(path) if path is not None else None
        self.own = self.main if ranks.size == 1 or self.main is None else \
            self.main.with_name(f"{self.main.name}.rank{ranks.rank}")
        self._saved, self._changed = time.monotonic(), False
        error = None
        try:
            for file in self._files():
                self._merge(*self._load(file))
        except RunFolderError as e:
            error = e
        self._exchange(error)

    def missing(self) -> Tensor:
        return (~self.done).nonzero().flatten()

    def put(self, i: int, value: float) -> None:
        self.values[i], self.done[i], self._changed = value, True, True
        if self.main is not None and time.monotonic() - self._saved > self.seconds:
            self.save()

    def save(self) -> None:
        """Replace the file as a whole: a crash leaves the old one."""
        if self.own is None or not self._changed:
            return
        self._write(self.own)
        self._saved, self._changed = time.monotonic(), False

    def finish(self, error: Exception | None) -> Tensor:
        """All values, from all ranks; one file is left."""
        self._exchange(error)
        if self.main is not None and self.ranks.size > 1:
            if self.ranks.rank == 0:
                self._write(self.main)
            self.ranks.gather(None)
            if self.own is not None and self.own != self.main:
                self.own.unlink(missing_ok=True)
            self.ranks.gather(None)     # wait until every rank has removed its file
        elif self.main is not None:
            for part in self._files()[1:]:
                part.unlink()
        return self.values

    def _exchange(self, error: Exception | None) -> None:
        self.ranks.raise_everywhere(error)
        for values, done in self.ranks.gather((self.values, self.done)):
            self._merge(values, done)

    def _merge(self, values: Tensor, done: Tensor) -> None:
        self.values = torch.where(done, values, self.values)
        self.done = self.done | done

    def _files(self) -> list[Path]:
        if self.main is None or not self.main.parent.is_dir():
            return []
        parts = sorted(p for p in self.main.parent.iterdir() if p.name.startswith(f"{self.main.name}.rank"))
        return [p for p in (self.main, *parts) if p.exists()]

    def _write(self, path: Path) -> None:
        state = {"format": FORMAT, "key": self.key, "origin": self.origin, "values": self.values, "done": self.done}
        replace_file(path, partial(torch.save, state))

    def _load(self, path: Path) -> tuple[Tensor, Tensor]:
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            kind = state["format"]
        except Exception as e:
            raise RunFolderError(f"{path} is not a landscape checkpoint ({type(e).__name__}): delete it or choose "
                                 "another file") from e
        same_loss = abs(state["origin"] - self.origin) <= 1e-4 * abs(self.origin) \
            or not (state["origin"] == state["origin"] or self.origin == self.origin)
        if kind != FORMAT or state["key"] != self.key or not same_loss:
            what = "data or another loss" if kind == FORMAT and state["key"] == self.key else \
                "weights, directions, points or settings"
            raise RunFolderError(f"{path} holds a landscape of other {what}: delete it or choose another file")
        return state["values"], state["done"]


def fingerprint(plane: Plane, points: Tensor, settings: Iterable[Any]) -> str:
    """A digest of everything that says which points are meant."""
    statistics = [part for state in plane.states for item in sorted(state.statistics.items()) for part in item]
    return digest(repr(tuple(settings)), points, *plane.origin, *(t for d in plane.directions for t in d), *statistics)


def axis(low: float, high: float, steps: int) -> Tensor:
    """Evenly spaced numbers that hold both ends exactly, and 0 in the middle of a symmetric odd axis.

    >>> axis(-1.0, 1.0, 5).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if steps == 1:
        return torch.tensor([(low + high) / 2], dtype=torch.float64)
    i = torch.arange(steps, dtype=torch.float64)
    x = ((steps - 1 - i) * low + i * high) / (steps - 1)
    x[0], x[-1] = low, high
    return x
