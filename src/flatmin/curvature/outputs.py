"""Products of matrices that go through the outputs z of a model, from first derivatives alone.

For what has no second derivative, and for weights that are sharded by FSDP2, where torch refuses one. What the loss
does with z is small and local, and differentiated exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .. import perturbed, vectors
from ..evaluation import WeightedBatch
from ..gradient_sum import GradientSum
from .differences import Add, Differences, move
from .products import ObjectiveOperator

OutputHessian = Callable[[Tensor], Tensor]
"""A symmetric linear map on the space of one batch's outputs."""

Curvature = Callable[[WeightedBatch, Tensor, Tensor], OutputHessian]
"""A batch, its outputs z and their loss ↦ what stands between Jᵀ and J."""

At = Callable[[float], None]


def outputs_and_loss(batch: WeightedBatch) -> tuple[Tensor, Tensor]:
    """z and the loss as a function of it, in one graph."""
    outputs, loss = batch.outputs_and_loss()
    return batch.logits(outputs), loss


class OutputDifferences(Differences):
    """Differences along v that are made batch by batch, so that outputs of one batch only are held."""

    def __init__(self, operator: ObjectiveOperator):
        super().__init__(operator, on_disk=False, folder=None)

    def _prepare(self) -> None:
        pass

    def _central(self, v: Tensor, w: list[Tensor], h: float, eps: float,
                 out: Tensor | None = None) -> tuple[Tensor, float, float]:
        operator, objective = self.operator, self.operator.objective
        out = operator.empty() if out is None else out
        total = GradientSum(self.parameters, out.split(operator.numels))
        weights: list[float] = []
        sums, first = [0.0, 0.0, 0.0], 1.0

        def at(t: float) -> None:
            objective.ranks.reshard()
            move(self.parameters, w, v.split(operator.numels), t)

        for batch in objective.weighted_batches():
            first = first if weights else batch.total
            weights.append(batch.weight)
            found = self._batch(batch, at, h, lambda i, g, c, share=batch.total / first: total.add(i, g, c * share))
            sums = [s + n * batch.weight for s, n in zip(sums, found, strict=True)]
        total.totals()      # zeros where nothing was added
        normalizer = objective.normalizer(weights)
        out.mul_(first / normalizer)
        if not objective.ranks.in_step:
            objective.ranks.sum_(out)
        if operator.norm(out) == 0:
            return out, 0.0, 0.0
        return out, *self._judge([s / normalizer for s in objective.ranks.total(*sums)], v, out, h, eps)

    @abstractmethod
    def _batch(self, batch: WeightedBatch, at: At, h: float, add: Add) -> tuple[float, float, float]:
        """Add one batch's part of the product; what ``_judge`` wants, to be averaged over batches."""

    @abstractmethod
    def _judge(self, means: list[float], v: Tensor, out: Tensor, h: float, eps: float) -> tuple[float, float]:
        """By what part the product is off; what rounding adds to that."""

    def _pull(self, z: Tensor, u: Tensor, batch: WeightedBatch, add: Add, factor: float = 1.0) -> None:
        """Add factor · Jᵀu."""
        ranks = self.operator.objective.ranks
        if ranks.in_step:
            rows = ranks.backward((z * u).sum() * (batch.weight / batch.total), self.parameters)
        else:
            rows = torch.autograd.grad(z, self.parameters, u, allow_unused=True)
        for i, row in enumerate(rows):
            if row is not None:
                add(i, row.to_dense() if row.layout is not torch.strided else row, factor)


class TangentDifferences(OutputDifferences):
    """v ↦ Jᵀ M (z(w + hv) − z(w − hv)) / 2h.

    With r = ‖z₊ − 2z + z₋‖ / ‖z₊ − z₋‖ the difference is off by about ⅔r² (by just that where z is an exponential).
    """

    def __init__(self, operator: ObjectiveOperator, curvature: Curvature):
        super().__init__(operator)
        self.curvature = curvature

    def _batch(self, batch: WeightedBatch, at: At, h: float, add: Add) -> tuple[float, float, float]:
        with torch.no_grad():
            at(h)
            upper = batch.logits(batch.outputs())
            at(-h)
            lower = batch.logits(batch.outputs())
        at(0)
        with torch.enable_grad():
            z, loss = outputs_and_loss(batch)
            if not z.requires_grad:
                return 0.0, 0.0, 0.0
            with perturbed.without_hooks(z, loss):    # FSDP2's take any gradient there for a pass through the model
                output_hessian = self.curvature(batch, z, loss) if batch.weight else torch.zeros_like
                u = output_hessian((upper - lower) / (2 * h)).detach()
            self._pull(z, u, batch, add)
        z = z.detach()
        return _square(upper - 2 * z + lower), _square(upper - lower), _square(z)

    def _judge(self, means: list[float], v: Tensor, out: Tensor, h: float, eps: float) -> tuple[float, float]:
        bend, change, size = means
        return 2 / 3 * bend / change, 2 / 3 * (4 * eps) ** 2 * size / change


class FrozenDifferences(OutputDifferences):
    """v ↦ (J(w + hv)ᵀc − J(w − hv)ᵀc) / 2h with c = ∂L/∂z at w: the Hessian of ⟨c, z(w)⟩."""

    def _batch(self, batch: WeightedBatch, at: At, h: float, add: Add) -> tuple[float, float, float]:
        at(0)
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
            at(sign * h)
            with torch.enable_grad():
                z = batch.logits(batch.outputs())
                self._pull(z, c, batch, add, sign / (2 * h))
            bend += float((c * (z.detach() - start)).sum())
        return bend, float((c * start).abs().sum()), 0.0

    def _judge(self, means: list[float], v: Tensor, out: Tensor, h: float, eps: float) -> tuple[float, float]:
        bend, size, _ = means
        scale = self.operator.norm(v) * self.operator.norm(out)
        return abs(self.operator.dot(v, out) - bend / h**2) / scale, 4 * eps * size / h**2 / scale


def _square(t: Tensor) -> float:
    return float(vectors.sums_of_squares([t]).sum())
