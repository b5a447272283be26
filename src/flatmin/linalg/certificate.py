"""What makes a spectrum trustworthy: residuals from fresh products, and a search for eigenvalues that are missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .lanczos import BandLanczos
from .operator import CurvatureOperator, Forms

DOUBT = 0.01
"""Probability that a search overlooks an eigenvalue, by an unlucky start vector."""


def residuals(operator: CurvatureOperator, values: Tensor, x: Tensor) -> tuple[Tensor, list[Forms | None]]:
    """‖Av − λv‖ / ‖v‖ for each row v of x, by products that share nothing with earlier ones; vᵀA_b v / ‖v‖² of each
    batch b, whose spread is the error of λ by the data: to first order a change dA of A changes λ by vᵀ dA v / ‖v‖².
    """
    out, forms = [], []
    with operator.fresh():
        for value, row in zip(values.tolist(), x, strict=True):
            v = row.to(operator.device)
            w, here = operator.matvec_with_forms(v)
            length = operator.norm(v)
            out.append(operator.norm(w.add_(v, alpha=-value)) / length)
            forms.append(here and (here[0], here[1] / length**2))
    return torch.tensor(out, dtype=torch.float64), forms


@dataclass(frozen=True)
class Search:
    """What lies beyond given thresholds in the space orthogonal to known eigenvectors."""

    excluded: bool          # nothing does, at 1 − DOUBT
    values: Tensor          # (f,) eigenvalues found beyond
    vectors: Tensor         # (f, n)
    matvecs: int


def search(operator: CurvatureOperator, x: Tensor, sides: list[tuple[int, float]], *, tolerance: float, budget: int,
           generator: torch.Generator, unit: float) -> Search:
    """Lanczos from a random vector orthogonal to the rows of x, until an eigenvalue beyond a threshold is found or
    excluded. ``sides`` are (+1, upper threshold) and (−1, lower threshold), in units of 1/unit like ``tolerance``.

    Exclusion: were there an eigenvalue μ beyond the threshold, then with T_d the Chebyshev polynomial that is at most 1
    on the spectrum up to the outermost Ritz value b of d + 1 steps, T_d(A)r would have a Rayleigh quotient beyond b as
    soon as s² γ T_d(1 + 2γ)² > 1, where γ = (μ − b) / (b − a), a is the other end of the spectrum and s² the share of
    μ's eigenvector in the random r; but b is the outermost one. s² ≥ ½π δ²/n with probability 1 − δ.
    """
    rows = min(budget, operator.size - len(x))
    none = torch.zeros(0, dtype=torch.float64), x[:0]
    if rows == 0:
        return Search(True, *none, 0)
    run = BandLanczos(operator, Basis(operator, rows + 1), generator,
                 locked=Basis.of(operator, x))
    run.unit = unit
    run.matvecs = 1         # the unit is known
    for used in range(1, rows + 1):
        run.step()
        theta, s, bounds = run.ritz()
        low, high = float(theta[0]), float(theta[-1])
        exhausted = run.complete or run.breakdowns > 0
        beyond = torch.stack([sign * theta > sign * limit + tolerance for sign, limit in sides]).any(0)
        if bool(beyond.any()):
            if bool((bounds[beyond] <= tolerance).all()) or exhausted:
                return Search(False, theta[beyond], run.V.combine(s[:, beyond], run.count), used)
            continue
        if exhausted or all(_excludes(sign * limit + tolerance, *((low, high) if sign > 0 else (-high, -low)),
                                      used, operator.size) for sign, limit in sides):
            return Search(True, *none, used)
    return Search(False, *none, rows)


def _excludes(limit: float, low: float, high: float, steps: int, n: int) -> bool:
    """Whether Ritz values in [low, high] after so many steps leave no room for an eigenvalue at ``limit`` or above."""
    if high <= low:
        return steps > 1
    gamma = (limit - high) / (1.1 * (high - low))
    if gamma <= 0:
        return False
    log_t = (steps - 1) * math.acosh(1 + 2 * gamma) - math.log(2)
    return math.log(0.5 * math.pi * DOUBT**2 / n) + math.log(gamma) + 2 * log_t > 0
