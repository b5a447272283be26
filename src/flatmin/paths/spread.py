"""Standard errors over batches of what is made of δ_logit and δ_func.

All of it is a function of A = ‖δ_logit‖², B = ‖δ_func‖² and C = δ_logitᵀδ_func. A batch k that weighs more changes
G = Σ s_k G_k, F and, through g, the direction v = Pg/‖Pg‖. To first order, with a = Gv and b = Fv,

    dA = 2 vᵀ(G_k − G)a + 2 (Ga)ᵀdv,     dB = 2 vᵀ(F_k − F)b + 2 (Fb)ᵀdv,
    dC = vᵀ(G_k − G)b + vᵀ(F_k − F)a + (Gb + Fa)ᵀdv,     dv = (1 − vvᵀ) P (g_k − g) / ‖Pg‖,

because the matrices are symmetric. The variance is that of the sum of these influences (the delta method). It takes
two matvecs and a gradient of each batch, and the memory of a few vectors whatever the number of batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel import Ranks
from .direction import Unit
from .split import Split

NAMES = ("tau_logit", "tau_func", "tau_cross", "ratio", "cosine", "logit_norm", "func_norm", "norm")


def numbers(squares: Tensor) -> Tensor:
    """The numbers of ``NAMES`` from A, B and C."""
    A, B, C = squares
    whole = (A + B + 2 * C).clamp(min=0)
    return torch.stack([A / whole, B / whole, 2 * C / whole, (A / B).sqrt(), C / (A * B).sqrt(), A.sqrt(), B.sqrt(),
                        whole.sqrt()])


@dataclass(frozen=True)
class Spread:
    """What batches contribute to the deviations of A, B and C, (this rank's batches, 3), and to that of g, squared."""

    squares: Tensor
    gradient: Tensor
    batches: float      # on all ranks

    def errors(self, squares: Tensor, ranks: Ranks) -> dict[str, float]:
        """The standard error of each of ``NAMES``; nan where it has no derivative."""
        sums = ranks.total(*(self.squares.T @ self.squares).flatten().tolist())
        covariance = torch.tensor(sums, dtype=torch.float64).view(3, 3) * self.batches / (self.batches - 1)
        slopes = torch.func.jacrev(numbers)(squares)
        variances = torch.einsum("ni,ij,nj->n", slopes, covariance, slopes)
        return dict(zip(NAMES, variances.sqrt().tolist(), strict=True))

    def noise(self, length: float, ranks: Ranks) -> float:
        """The share of ‖g‖² that is expected from the differences between batches alone; nan for a given direction."""
        total, = ranks.total(float(self.gradient.sum()))
        return total * self.batches / (self.batches - 1) / length**2


def influences(split: Split, unit: Unit, g: Tensor, logit: Tensor, func: Tensor, squares: Tensor) -> Spread:
    """By how much A, B, C and g deviate because of each batch, to first order."""
    v, dot = unit.vector, split.operator.dot
    sums = [torch.zeros_like(v) for _ in range(3)]      # Ga, Fb, Gb + Fa
    weights: list[float] = []
    rows: list[list[float]] = []
    for batch, matvec in split.batches():
        (ga, fa), (gb, fb) = matvec(logit), matvec(func)
        weights.append(batch.weight)
        rows.append([2 * dot(ga, v), 2 * dot(fb, v), dot(gb, v) + dot(fa, v)])
        for total, row in zip(sums, (ga, fb, gb.add_(fa)), strict=True):
            total.add_(row, alpha=batch.weight)
        del ga, gb, fa, fb, row
    n = torch.tensor(weights, dtype=torch.float64)
    ranks = split.objective.ranks
    whole, count = ranks.total(math.fsum(weights), len(weights))
    # a mean divides by the sum of the weights, a loss that is a sum by 1
    part, share = n[:, None] / split.objective.normalizer(weights), n[:, None] / whole
    out = part * torch.tensor(rows, dtype=torch.float64).view(-1, 3) - share * 2 * squares
    gradient = torch.full((len(n),), math.nan, dtype=torch.float64)
    if unit.follows:
        found, mean = _along(split, unit, g, [split.mean(t, weights) for t in sums])
        out += part * found[:, :3] - share * mean[:3]
        gradient = (part**2 * found[:, 4:] - 2 * part * share * found[:, 3:4] + share**2 * mean[3]).squeeze(1)
    return Spread(out, gradient, count)


def _along(split: Split, unit: Unit, g: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a gradient changes in A, B and C through the direction, its product with g and its square, for each batch's
    gradient, (batches, 5), and for g, (5,)."""
    objective, v, dot = split.objective, unit.vector, split.operator.dot
    for t, factor in zip(sums, (2.0, 2.0, 1.0), strict=True):
        t.sub_(v, alpha=dot(v, t)).mul_(factor / unit.length)
        if unit.metric is not None:
            t.mul_(unit.metric)

    def row(own: Tensor) -> list[float]:
        return [*(dot(t, own) for t in sums), dot(g, own), dot(own, own)]

    rows = []
    with torch.enable_grad():
        for batch in objective.weighted_batches():
            loss = batch.loss(batch.outputs())
            rows.append(row(split.flat(torch.autograd.grad(loss, split.operator.parameters, allow_unused=True)
                                       if loss.requires_grad else [None] * len(split.operator.parameters), v)))
    return torch.tensor(rows, dtype=torch.float64).view(-1, 5), torch.tensor(row(g), dtype=torch.float64)
