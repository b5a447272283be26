"""Matvecs by central differences of first derivatives, for what autograd cannot differentiate twice.

That is a model without a second derivative, one so large that the graph of one does not fit, and weights that are
sharded by FSDP2, where torch refuses a second derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import parallel, vectors
from ..evaluation import WeightedBatch
from ..gradient_sum import GradientSum
from ..linalg import memory
from ..linalg.operator import CurvatureOperator
from ..objective import Objective

ALLOWED = 3e-3
"""The part of ‖Hv‖ by which a difference may be off along v before the step is made smaller."""

DOUBTFUL = 0.2
"""The change of a difference at twice the step above which a warning says that it means little."""

_TRIES = 6

Add = Callable[[int, Tensor, float], None]
"""(i, t, factor): add factor · t to the part of parameter i."""


class Difference(NamedTuple):
    """Av by a central difference; by what part of ‖Av‖ it is off along v, and what rounding adds to that."""

    av: Tensor
    off: float = 0.0
    rounding: float = 0.0
    losses: tuple[float, ...] = ()      # at w + hv and w − hv, where the scheme computes them


class Scheme(Protocol):
    """How one central difference is made of first derivatives."""

    needs_loss: ClassVar[bool]      # whether it is told L(w), to say how far it is off

    def __call__(self, v: Tensor, w: list[Tensor], h: float, eps: float, loss: float | None,
                 out: Tensor | None = None) -> Difference:
        """The difference with step h along v from weights w, whose dtypes have the precision ``eps``."""
        ...


class Differences:
    """v ↦ Av by central differences, with the largest relative error seen in ``error``.

    The step h = s ε^⅓ (1 + ‖w‖) / ‖v‖ balances the third derivative (h²) against rounding of the gradient (ε/h). Where
    the scheme says that the difference is off by more than ``ALLOWED``, s falls (from 1). ``error`` comes from a second
    difference with 2h, at the first vector and at the first after ``forget``.

    Memory: the weights, a copy of them, v and the result. With ``on_disk`` the copy and the second difference are in
    files in ``folder``.
    """

    def __init__(self, operator: CurvatureOperator, objective: Objective, scheme: Scheme, *, on_disk: bool = False,
                 folder: str | None = None):
        self.operator, self.objective, self.scheme = operator, objective, scheme
        self.on_disk, self.folder = on_disk, folder
        self.error: float | None = None
        self.scale = 1.0
        self.forget()

    def forget(self) -> None:
        """Assume nothing any more about weights seen before, nor about the error at the next vector."""
        self._copy: list[Tensor] | None = None
        self._loss: float | None = None
        self._estimated = False

    def matvec(self, v: Tensor, *, same_weights: bool) -> Tensor:
        """Av as a new flat tensor; ``same_weights``: they do not change until ``forget``."""
        operator = self.operator
        length = operator.norm(v)
        if length == 0:
            return operator.empty().zero_()
        with self._restored() as w:
            if self.scheme.needs_loss and self._loss is None:
                self._loss = float(self.objective.value())
            eps = max(torch.finfo(p.dtype).eps for p in w)
            size = float(operator.reduce(vectors.sums_of_squares(w).sum().reshape(1)).sqrt())
            reach = eps ** (1 / 3) * (1 + size) / length
            out = self._fitting(v, w, reach, eps)
            if not self._estimated:
                other = memory.mapped(len(v), v.dtype, self.folder) if self.on_disk else operator.empty()
                coarse = self.scheme(v, w, 2 * self.scale * reach, eps, self._loss, other).av
                top = operator.norm(out)
                self.error = max(self.error or 0.0, operator.norm(coarse.sub_(out)) / top if top > 0 else 0.0)
                if self.error > DOUBTFUL:
                    warnings.warn(f"differences of gradients with steps h and 2h differ by {self.error:.0%}, so they "
                                  "mean little here: the loss has kinks (ReLU), or its gradient too few digits. Use "
                                  "float64, or exact matvecs", stacklevel=2)
        self._estimated = True
        if not same_weights:
            self._copy = self._loss = None
        return out

    @contextmanager
    def at(self, v: Tensor) -> Iterator[Callable[[float], Difference]]:
        """A function h ↦ the difference with step h along v; the weights must not change until the end."""
        with self._restored() as w:
            yield lambda h: self.scheme(v, w, h, torch.finfo(v.dtype).eps, self._loss)

    def _fitting(self, v: Tensor, w: list[Tensor], reach: float, eps: float) -> Tensor:
        """The difference with a step that is small enough for v."""
        for _ in range(_TRIES):
            found = self.scheme(v, w, self.scale * reach, eps, self._loss)
            if found.off <= max(ALLOWED, 3 * found.rounding):
                return found.av
            # The error falls as h², but the estimate ends at h⁴ and is too hopeful far from w.
            self.scale *= min(0.5, max(0.03, 0.7 * ALLOWED / found.off))
            del found
        return self.scheme(v, w, self.scale * reach, eps, self._loss).av

    @contextmanager
    def _restored(self) -> Iterator[list[Tensor]]:
        """A copy of the weights; at the end these are as they were, bit for bit."""
        ranks = self.objective.ranks
        ranks.reshard()
        weights = [parallel.local(p.detach()) for p in self.operator.like]
        if self._copy is None:
            self._copy = self._copied(weights)
        copy = self._copy
        try:
            yield copy
        finally:
            ranks.reshard()
            try:
                vectors.copy(copy, weights)
            except KeyboardInterrupt:   # in the middle: once more
                vectors.copy(copy, weights)
                raise
            if not self.on_disk:
                self._copy = None

    def _copied(self, weights: Sequence[Tensor]) -> list[Tensor]:
        if not self.on_disk:
            return [t.clone() for t in weights]
        out = [memory.mapped(t.numel(), t.dtype, self.folder).view(t.shape) for t in weights]
        vectors.copy(weights, out)
        return out


@dataclass(frozen=True)
class GradientDifference:
    """(∇L(w + hv) − ∇L(w − hv)) / 2h: the Hessian.

    The losses that come with the gradients tell how far it is off along v: with φ(t) = L(w + tv) it is h²φ⁗/6 there,
    and h (φ′(h) − φ′(−h)) − 2 (φ(h) − 2φ(0) + φ(−h)) = h⁴φ⁗/6 + O(h⁶). A parameter's gradient is added to the result
    as soon as autograd has it, and freed.
    """

    operator: CurvatureOperator
    objective: Objective
    needs_loss: ClassVar[bool] = True

    def __call__(self, v: Tensor, w: list[Tensor], h: float, eps: float, loss: float | None,
                 out: Tensor | None = None) -> Difference:
        operator, objective = self.operator, self.objective
        out, values = operator.empty() if out is None else out, []
        sums = GradientSum(operator.like, out.split(operator.numels))
        first = normalizer = 1.0
        for sign in (1, -1):
            move(operator.like, w, v.split(operator.numels), sign * h)
            losses: list[tuple[Tensor, float]] = []
            for batch in objective.weighted_batches():
                first = first if losses or sign < 0 else batch.total
                losses.append((_add_gradient(batch, sums, sign * batch.total / first), batch.weight))
            values.append(float(objective.mean(losses)))
            normalizer = objective.normalizer(n for _, n in losses)
        sums.totals()       # zeros where nothing was added
        out.mul_(first / normalizer / (2 * h))
        if not objective.ranks.in_step:
            objective.ranks.sum_(out)
        if loss is None:
            return Difference(out, losses=tuple(values))
        length, top = operator.norm(v), operator.norm(out)
        if top == 0:
            return Difference(out, losses=tuple(values))
        off = abs(operator.dot(v, out) - (values[0] - 2 * loss + values[1]) / h**2)
        rounding = 4 * eps * max(map(abs, (*values, loss))) / h**2
        return Difference(out, off / (top * length), rounding / (top * length), tuple(values))


def _add_gradient(batch: WeightedBatch, sums: GradientSum, factor: float) -> Tensor:
    """Add factor · ∇loss of one batch; the loss."""
    with torch.enable_grad():
        loss = batch.loss(batch.outputs())
        batch.add_gradient(loss, sums, factor)
    return loss.detach()


@torch.no_grad()
def move(parameters: Sequence[Tensor], w: Sequence[Tensor], v: Sequence[Tensor], h: float) -> None:
    """Parameters ← w + h v, block by block."""
    for p, start, step in zip(parameters, w, v, strict=True):
        target = parallel.local(p.detach())
        for ts, ws, vs in vectors.blocks([target], [start], [step.view(start.shape)]):
            for t, a, d in zip(ts, ws, vs, strict=True):
                if a.dtype == d.dtype:
                    torch.add(a, d, alpha=h, out=t)
                else:
                    t.copy_(a.to(d.dtype).add_(d, alpha=h))
