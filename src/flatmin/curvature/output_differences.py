"""Differences for matrices that go through the outputs z of a model, from first derivatives alone.

What the loss does with z is small and local, and differentiated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .. import perturbed, vectors
from ..evaluation import WeightedBatch
from ..gradient_sum import GradientSum
from ..linalg.operator import CurvatureOperator
from ..objective import Objective
from .finite_differences import Add, Difference, move

OutputHessian = Callable[[Tensor], Tensor]
"""A symmetric linear map on the space of one batch's outputs."""

Curvature = Callable[[WeightedBatch, Tensor, Tensor], OutputHessian]
"""A batch, its outputs z and their loss ↦ the linear map between Jᵀ and J."""

MoveTo = Callable[[float], None]
"""t: set the weights to w + tv."""

Pull = Callable[[WeightedBatch, Tensor, Tensor, float], None]
"""(batch, z, u, factor): add factor · Jᵀu to the result."""


def outputs_and_loss(batch: WeightedBatch) -> tuple[Tensor, Tensor]:
    """z and the loss as a function of it, in one graph."""
    outputs, loss = batch.outputs_and_loss()
    return batch.logits(outputs), loss


class BatchDifference(Protocol):
    """One batch's part of a difference."""

    def add(self, batch: WeightedBatch, move_to: MoveTo, h: float, pull: Pull) -> tuple[float, float, float]:
        """Add it by ``pull``; three numbers for ``error``, which are averaged over batches."""
        ...

    def error(self, means: Sequence[float], h: float, eps: float, form: float, scale: float) -> tuple[float, float]:
        """By what part the difference is off, and what rounding adds; ``form`` is vᵀAv and ``scale`` ‖v‖ ‖Av‖."""
        ...


@dataclass(frozen=True)
class OutputDifference:
    """A difference along v that is made batch by batch, so that the outputs of one batch only are held."""

    operator: CurvatureOperator
    objective: Objective
    part: BatchDifference
    needs_loss: ClassVar[bool] = False

    def __call__(self, v: Tensor, w: list[Tensor], h: float, eps: float, loss: float | None,
                 out: Tensor | None = None) -> Difference:
        operator, objective = self.operator, self.objective
        out = operator.empty() if out is None else out
        total = GradientSum(operator.like, out.split(operator.numels))
        weights: list[float] = []
        sums, first = [0.0, 0.0, 0.0], 1.0

        def move_to(t: float) -> None:
            objective.ranks.reshard()
            move(operator.like, w, v.split(operator.numels), t)

        def pull(batch: WeightedBatch, z: Tensor, u: Tensor, factor: float) -> None:
            self._pull(batch, z, u, lambda i, g, c: total.add(i, g, c * (batch.total / first)), factor)

        for batch in objective.weighted_batches():
            first = first if weights else batch.total
            weights.append(batch.weight)
            found = self.part.add(batch, move_to, h, pull)
            sums = [s + n * batch.weight for s, n in zip(sums, found, strict=True)]
        total.totals()      # zeros where nothing was added
        normalizer = objective.normalizer(weights)
        out.mul_(first / normalizer)
        if not objective.ranks.in_step:
            objective.ranks.sum_(out)
        if operator.norm(out) == 0:
            return Difference(out)
        means = [s / normalizer for s in objective.ranks.total(*sums)]
        return Difference(out, *self.part.error(means, h, eps, operator.dot(v, out),
                                                operator.norm(v) * operator.norm(out)))

    def _pull(self, batch: WeightedBatch, z: Tensor, u: Tensor, add: Add, factor: float) -> None:
        ranks, parameters = self.objective.ranks, self.operator.like
        if ranks.in_step:
            gradient = ranks.backward((z * u).sum() * (batch.weight / batch.total), parameters)
        else:
            gradient = torch.autograd.grad(z, parameters, u, allow_unused=True)
        for i, g in enumerate(gradient):
            if g is not None:
                add(i, g.to_dense() if g.layout is not torch.strided else g, factor)


@dataclass(frozen=True)
class TangentDifference:
    """v ↦ Jᵀ M (z(w + hv) − z(w − hv)) / 2h, with M = ``curvature``.

    With r = ‖z₊ − 2z + z₋‖ / ‖z₊ − z₋‖ the difference is off by about ⅔r² (by just that where z is an exponential).
    """

    curvature: Curvature

    def add(self, batch: WeightedBatch, move_to: MoveTo, h: float, pull: Pull) -> tuple[float, float, float]:
        with torch.no_grad():
            move_to(h)
            upper = batch.logits(batch.outputs())
            move_to(-h)
            lower = batch.logits(batch.outputs())
        move_to(0)
        with torch.enable_grad():
            z, loss = outputs_and_loss(batch)
            if not z.requires_grad:
                return 0.0, 0.0, 0.0
            with perturbed.without_hooks(z, loss):    # FSDP2's take any gradient there for a pass through the model
                output_hessian = self.curvature(batch, z, loss) if batch.weight else torch.zeros_like
                u = output_hessian((upper - lower) / (2 * h)).detach()
            pull(batch, z, u, 1.0)
        z = z.detach()
        return _square(upper - 2 * z + lower), _square(upper - lower), _square(z)

    def error(self, means: Sequence[float], h: float, eps: float, form: float, scale: float) -> tuple[float, float]:
        bend, change, size = means
        return 2 / 3 * bend / change, 2 / 3 * (4 * eps) ** 2 * size / change


class FrozenDifference:
    """v ↦ (J(w + hv)ᵀc − J(w − hv)ᵀc) / 2h with c = ∂L/∂z at w: the Hessian of ⟨c, z(w)⟩."""

    def add(self, batch: WeightedBatch, move_to: MoveTo, h: float, pull: Pull) -> tuple[float, float, float]:
        move_to(0)
        with torch.enable_grad():
            start, loss = outputs_and_loss(batch)
            if not start.requires_grad:
                return 0.0, 0.0, 0.0
            with perturbed.without_hooks(start, loss):
                c, = torch.autograd.grad(loss, start)
        start = start.detach()
        del loss
        bend = 0.0
        for sign in (1, -1):
            move_to(sign * h)
            with torch.enable_grad():
                z = batch.logits(batch.outputs())
                pull(batch, z, c, sign / (2 * h))
            bend += float((c * (z.detach() - start)).sum())
        return bend, float((c * start).abs().sum()), 0.0

    def error(self, means: Sequence[float], h: float, eps: float, form: float, scale: float) -> tuple[float, float]:
        bend, size, _ = means
        return abs(form - bend / h**2) / scale, 4 * eps * size / h**2 / scale


def _square(t: Tensor) -> float:
    return float(vectors.sums_of_squares([t]).sum())
