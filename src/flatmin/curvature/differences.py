"""Hessian products as central differences of gradients.

For what has no second derivative, for models so large that the graph of one does not fit, and for weights that are
sharded by FSDP2, where torch refuses a second derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..evaluation import WeightedBatch
from ..gradient_sum import GradientSum
from ..linalg import memory
from .products import ObjectiveOperator

ALLOWED = 3e-3
"""The part of ‖Hv‖ by which a product may be off along v before the step is made smaller."""

DOUBTFUL = 0.2
"""The change of a product at twice the step above which a warning says that it means little."""

_TRIES = 6

Add = Callable[[int, Tensor, float], None]


class Differences:
    """v ↦ (∇L(w + hv) − ∇L(w − hv)) / 2h, with the largest relative error seen in ``error``.

    h = s ε^⅓ (1 + ‖w‖) / ‖v‖ balances the third derivative (h²) against rounding of the gradient (ε/h). The losses that
    come with the gradients tell how far the difference is off along v: with φ(t) = L(w + tv) it is h²φ⁗/6 there, and
    h (φ′(h) − φ′(−h)) − 2 (φ(h) − 2φ(0) + φ(−h)) = h⁴φ⁗/6 + O(h⁶). Where that is too much, s falls (from 1).
    ``error`` comes from a second difference with 2h, at the first vector and at the first after ``forget``.

    Memory: the weights, a copy of them, v and the result. A parameter's gradient is added to the result as soon as
    autograd has it, and freed. With ``on_disk`` the copy is in files in ``folder``.
    """

    def __init__(self, operator: ObjectiveOperator, on_disk: bool, folder: str | None):
        self.operator, self.on_disk, self.folder = operator, on_disk, folder
        self.parameters = operator.parameters
        self.error: float | None = None
        self.losses: tuple[float, ...] = ()     # at w + hv and w − hv, of the last difference
        self.scale = 1.0
        self.forget()

    def forget(self) -> None:
        """Assume nothing any more about weights seen before, nor about the error at the next vector."""
        self._copy: list[Tensor] | None = None
        self._value: float | None = None
        self._estimated = False

    def product(self, v: Tensor, keep: bool) -> Tensor:
        """Hv as a new flat tensor; ``keep``: the weights stay as they are until ``forget``."""
        operator = self.operator
        length = operator.norm(v)
        if length == 0:
            return operator.empty().zero_()
        with self._restored() as w:
            self._prepare()
            eps = max(torch.finfo(p.dtype).eps for p in w)
            size = float(operator.reduce(vectors.sums_of_squares(w).sum().reshape(1)).sqrt())
            reach = eps ** (1 / 3) * (1 + size) / length
            out = self._fitting(v, w, reach, eps)
            if not self._estimated:
                other = memory.mapped(len(v), v.dtype, self.folder) if self.on_disk else operator.empty()
                coarse, _, _ = self._central(v, w, 2 * self.scale * reach, eps, other)
                top = operator.norm(out)
                self.error = max(self.error or 0.0, operator.norm(coarse.sub_(out)) / top if top > 0 else 0.0)
                if self.error > DOUBTFUL:
                    warnings.warn(f"differences of gradients with steps h and 2h differ by {self.error:.0%}, so they "
                                  "mean little here: the loss has kinks (ReLU), or its gradient too few digits. Use "
                                  "float64, or exact products", stacklevel=2)
        self._estimated = True
        if not keep:
            self._copy = self._value = None
        return out

    @contextmanager
    def at(self, v: Tensor) -> Iterator[Callable[[float], Tensor]]:
        """A function h ↦ the difference with step h along v; the weights stay as they are until the end."""
        with self._restored() as w:
            yield lambda h: self._central(v, w, h, torch.finfo(v.dtype).eps)[0]

    def _prepare(self) -> None:
        """What all products at these weights need."""
        if self._value is None:
            self._value = float(self.operator.objective.value())

    def _fitting(self, v: Tensor, w: list[Tensor], reach: float, eps: float) -> Tensor:
        """The difference with a step that is small enough for v."""
        for _ in range(_TRIES):
            out, off, noise = self._central(v, w, self.scale * reach, eps)
            if off <= max(ALLOWED, 3 * noise):
                return out
            del out
            self.scale *= min(0.5, max(0.03, 0.7 * ALLOWED / off))     # a series that ends at h⁴ is too hopeful
        return self._central(v, w, self.scale * reach, eps)[0]

    def _central(self, v: Tensor, w: list[Tensor], h: float, eps: float,
                 out: Tensor | None = None) -> tuple[Tensor, float, float]:
        """The difference with step h; by what part of ‖Hv‖ it is off along v; what rounding of losses adds to that."""
        operator, objective = self.operator, self.operator.objective
        out, values = operator.empty() if out is None else out, []
        sums = GradientSum(self.parameters, out.split(operator.numels))
        first = normalizer = 1.0
        for sign in (1, -1):
            move(self.parameters, w, v.split(operator.numels), sign * h)
            losses: list[tuple[Tensor, float]] = []
            for batch in objective.weighted_batches():
                first = first if losses or sign < 0 else batch.total
                losses.append((self._collect(batch, sums, sign * batch.total / first), batch.weight))
            values.append(float(objective.mean(losses)))
            normalizer = objective.normalizer(n for _, n in losses)
        sums.totals()       # zeros where nothing was added
        out.mul_(first / normalizer / (2 * h))
        if not objective.ranks.in_step:
            objective.ranks.sum_(out)
        self.losses = tuple(values)
        if self._value is None:
            return out, 0.0, 0.0
        length, top = operator.norm(v), operator.norm(out)
        if top == 0:
            return out, 0.0, 0.0
        off = abs(operator.dot(v, out) - (values[0] - 2 * self._value + values[1]) / h**2)
        noise = 4 * eps * max(map(abs, (*values, self._value))) / h**2
        return out, off / (top * length), noise / (top * length)

    def _collect(self, batch: WeightedBatch, sums: GradientSum, factor: float) -> Tensor:
        """Add factor · ∇loss of one batch; the loss."""
        with torch.enable_grad():
            loss = batch.loss(batch.outputs())
            batch.add_gradient(loss, sums, factor)
        return loss.detach()

    @contextmanager
    def _restored(self) -> Iterator[list[Tensor]]:
        """A copy of the weights, which stand as they were afterwards, bit for bit."""
        objective = self.operator.objective
        objective.ranks.reshard()
        weights = [parallel.local(p.detach()) for p in self.parameters]
        if self._copy is None:
            self._copy = self._copied(weights)
        copy = self._copy
        try:
            yield copy
        finally:
            objective.ranks.reshard()
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


@torch.no_grad()
def move(parameters: Sequence[nn.Parameter], w: Sequence[Tensor], v: Sequence[Tensor], h: float) -> None:
    """Parameters ← w + h v, block by block."""
    for p, start, step in zip(parameters, w, v, strict=True):
        target = parallel.local(p.detach())
        for ts, ws, vs in vectors.blocks([target], [start], [step.view(start.shape)]):
            for t, a, d in zip(ts, ws, vs, strict=True):
                if a.dtype == d.dtype:
                    torch.add(a, d, alpha=h, out=t)
                else:
                    t.copy_(a.to(d.dtype).add_(d, alpha=h))
