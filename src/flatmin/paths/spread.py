"""Standard errors over batches of what is made of δ_logit and δ_func.

All of it is a function of A = ‖δ_logit‖², B = ‖δ_func‖² and C = δ_logitᵀδ_func. A batch k that weighs more changes
G = Σ s_k G_k, F and, through g, the direction v = Pg/‖Pg‖. To first order, with a = Gv and b = Fv,

    dA = 2 vᵀ(G_k − G)a + 2 (Ga)ᵀdv,     dB = 2 vᵀ(F_k − F)b + 2 (Fb)ᵀdv,
    dC = vᵀ(G_k − G)b + vᵀ(F_k − F)a + (Gb + Fa)ᵀdv,     dv = (1 − vvᵀ) P (g_k − g) / ‖Pg‖,

because the matrices are symmetric. The variance is that of the sum of these influences (the delta method). It takes
two products and a gradient of each batch, and the memory of a few vectors whatever the number of batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .direction import Unit
from .split import Split

NAMES = ("tau_logit", "tau_func", "tau_cross", "ratio", "cosine", "logit_norm", "func_norm", "norm")


def numbers(squares: Tensor) -> Tensor:
    """The numbers of ``NAMES`` from A, B and C."""
    A, B, C = squares
    whole = (A + B + 2 * C).clamp(min=0)
    return torch.stack([A / whole, B / whole, 2 * C / whole, (A / B).sqrt(), C / (A * B).sqrt(), A.sqrt(), B.sqrt(),
                        whole.sqrt()])


def standard_errors(split: Split, unit: Unit, g: Tensor, logit: Tensor, func: Tensor, squares: Tensor
                    ) -> dict[str, float]:
    """The standard error of each of ``NAMES``; nan where it has no derivative."""
    spread, count = influences(split, unit, g, logit, func, squares)
    ranks = split.objective.ranks
    covariance = torch.tensor(ranks.total(*(spread.T @ spread).flatten().tolist()), dtype=torch.float64).view(3, 3)
    slopes = torch.func.jacrev(numbers)(squares)
    variances = count / (count - 1) * torch.einsum("ni,ij,nj->n", slopes, covariance, slopes)
    return dict(zip(NAMES, variances.sqrt().tolist(), strict=True))


def influences(split: Split, unit: Unit, g: Tensor, logit: Tensor, func: Tensor, squares: Tensor
               ) -> tuple[Tensor, float]:
    """(this rank's batches, 3): what each batch contributes to the deviation of A, B and C; batches on all ranks."""
    v, dot = unit.vector, split.operator.dot
    sums = [torch.zeros_like(v) for _ in range(3)]      # Ga, Fb, Gb + Fa
    weights: list[float] = []
    rows: list[list[float]] = []
    for term, apply in split.batches():
        (ga, fa), (gb, fb) = apply(logit), apply(func)
        weights.append(term.weight)
        rows.append([2 * dot(ga, v), 2 * dot(fb, v), dot(gb, v) + dot(fa, v)])
        for total, row in zip(sums, (ga, fb, gb.add_(fa)), strict=True):
            total.add_(row, alpha=term.weight)
        del ga, gb, fa, fb, row
    n = torch.tensor(weights, dtype=torch.float64)
    ranks = split.objective.ranks
    whole, count = ranks.total(math.fsum(weights), len(weights))
    # a mean divides by the sum of the weights, a loss that is a sum by 1
    part, share = n[:, None] / split.objective.normalizer(weights), n[:, None] / whole
    out = part * torch.tensor(rows, dtype=torch.float64).view(-1, 3) - share * 2 * squares
    if unit.follows:
        found, mean = _along(split, unit, g, [split.mean(t, weights) for t in sums])
        out += part * found - share * mean
    return out, count


def _along(split: Split, unit: Unit, g: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a gradient changes in A, B and C through the direction: (batches, 3) for each batch's, (3,) for g."""
    objective, v, dot = split.objective, unit.vector, split.operator.dot
    for t, factor in zip(sums, (2.0, 2.0, 1.0), strict=True):
        t.sub_(v, alpha=dot(v, t)).mul_(factor / unit.length)
        if unit.metric is not None:
            t.mul_(unit.metric)
    rows = []
    with torch.enable_grad():
        for term in objective.terms():
            loss = term.loss(term.outputs())
            own = split.flat(torch.autograd.grad(loss, split.operator.parameters, allow_unused=True)
                             if loss.requires_grad else [None] * len(split.operator.parameters), v)
            rows.append([dot(t, own) for t in sums])
    mean = torch.tensor([dot(t, g) for t in sums], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3), mean
