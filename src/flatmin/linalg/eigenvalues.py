"""Eigenvalues alone, in three vectors of memory: Lanczos without a basis, spurious eigenvalues filtered."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..progress import Progress, left, reporter
from .checkpoint import Checkpoint
from .eigenpairs import Which, wanted
from .operator import CurvatureOperator, require_operator


@dataclass(frozen=True, kw_only=True)
class Eigenvalues:
    """Distinct eigenvalues in algebraic order; ``errors`` estimate the distance of each to the spectrum.

    ``copies`` counts how often the recurrence found each one again. It says nothing about multiplicity.
    """

    values: Tensor      # (k,) float64
    errors: Tensor      # (k,) float64
    converged: Tensor   # (k,) bool
    copies: Tensor      # (k,) int64
    matvecs: int
    settings: dict[str, Any]


def eigenvalues(operator: CurvatureOperator, k: int = 1, which: Which = "largest", *, tol: float = 1e-3,
                max_matvecs: int | None = None, seed: int | torch.Generator = 0,
                progress: Progress = False, checkpoint: str | None = None) -> Eigenvalues:
    """k distinct eigenvalues at an end of the spectrum, for a model so large that no basis can be held.

    Plain Lanczos: w = A vⱼ − βⱼ₋₁ vⱼ₋₁, αⱼ = vⱼᵀw, three vectors. Without re-orthogonalisation the tridiagonal T has
    converged eigenvalues again and again, and spurious ones on their way there. Cullum and Willoughby tell them apart:
    a simple eigenvalue of T that T without its first row and column has too does not depend on the start vector, and
    is spurious; repeated ones are copies of one. Multiplicities are not seen: use ``eigenpairs`` for them.

    Args:
        operator: any ``CurvatureOperator``.
        k: how many distinct values.
        which: as for ``eigenpairs``.
        tol: stop when each error is at most ``tol`` · max |θ|.
        max_matvecs: matvecs at most (default 30k + 200); beyond, a warning and ``converged`` False.
        seed: of the start vector.
        checkpoint: a file for the state, written each minute and on Ctrl-C, from which the same call resumes to the
            same result; removed with it.

    >>> from flatmin.curvature import Matrix
    >>> [round(x, 3) for x in eigenvalues(Matrix(torch.diag(torch.tensor([4.0, 1.0, -5.0]))), k=2).values.tolist()]
    [1.0, 4.0]

    J. Cullum, R. Willoughby, Lanczos Algorithms for Large Symmetric Eigenvalue Computations, SIAM 2002, ch. 4.
    """
    require_operator(operator)
    if k < 1 or tol <= 0:
        raise ValueError(f"k and tol must be positive, got k={k}, tol={tol}")
    limit = max_matvecs or 30 * k + 200
    alphas: list[float] = []
    betas: list[float] = []
    v = operator.random(vectors.seeded(seed))
    v.div_(operator.norm(v))
    old: Tensor | None = None
    unit = 1.0
    beta = scale = 0.0
    eps = torch.finfo(operator.dtype).eps
    found = None
    checked, history = 0, list[tuple[int, float, float]]()
    with operator.session(), reporter(progress, "eigenvalues") as report, \
            Checkpoint(checkpoint, operator, method="eigenvalues", k=k, which=which, tol=tol, seed=seed) as saver:
        if saved := saver.take():
            alphas, betas = saved["alphas"], saved["betas"]
            v, old = (saved[name].to(operator.device) for name in ("v", "old"))
            beta, scale, unit, checked = (saved[name] for name in ("beta", "scale", "unit", "checked"))
        while True:
            w = operator.matvec(v)
            unit = unit if alphas else operator.unit_for(w)
            w.mul_(unit)
            scale = max(scale, operator.norm(w))
            if old is not None:
                w.add_(old, alpha=-beta)
            alpha = operator.dot(v, w)
            if not math.isfinite(alpha):
                raise ValueError("a matvec is not finite: the loss overflows at these weights")
            w.add_(v, alpha=-alpha)
            beta = operator.norm(w)
            alphas.append(alpha)
            m = len(alphas)
            exhausted = beta <= 20 * eps * scale
            if exhausted or m >= limit or m - checked > max(4, m // 8):
                checked = m
                found = _distinct(torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64),
                                  0.0 if exhausted else beta, eps * scale, tol)
                values, errors, copies = (t[wanted(found[0], k, which)] for t in found)
                worst, top = float(errors.max()), float(found[0].abs().max())
                history.append((m, worst, tol * top))
                report(m, f"worst error {worst:.1e}, wanted {tol * top:.1e}", left(history))
                if exhausted or m >= limit or (len(values) == k and worst <= tol * top):
                    break
            betas.append(beta)
            old, v = v, w.div_(beta)
            saver.tick({"alphas": list(alphas), "betas": list(betas), "v": v, "old": old, "beta": beta,
                       "scale": scale, "unit": unit, "checked": checked, "matvecs": m})
    converged, values, errors = errors <= tol * top, values / unit, errors / unit
    if not bool(converged.all()):
        warnings.warn(f"{int((~converged).sum())} of {k} eigenvalues did not converge to {tol:g} of the largest in "
                      f"{m} matvecs: allow more with max_matvecs=", stacklevel=2)
    return Eigenvalues(values=values, errors=errors, converged=converged, copies=copies, matvecs=m,
                       settings=operator.describe() | {"k": k, "which": which, "tol": tol})


def _distinct(alphas: Tensor, betas: Tensor, beta: float, noise: float, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values, errors and copies of the eigenvalues of T, ascending: the spurious ones left out, copies taken together.

    With rounding, T is that of exact Lanczos on a matrix that has a narrow cluster in the place of each eigenvalue (A.
    Greenbaum, Linear Algebra Appl. 113 (1989) 7-63), so that each θ lies within its bound of one. Two converged θ whose
    bounds meet may therefore be one eigenvalue; of these the θ with the smallest bound stands for all.
    """
    T = torch.diag(alphas.double())
    if len(betas):
        T = T + torch.diag(betas.double(), 1) + torch.diag(betas.double(), -1)
    theta, s = torch.linalg.eigh(T)
    inner = torch.linalg.eigvalsh(T[1:, 1:])
    width = 50 * noise * math.sqrt(len(alphas)) + 1e-300
    bounds = (beta * s[-1].abs()).clamp(min=16 * noise)
    reach = torch.where(bounds <= tol * theta.abs().max(), bounds, 0.0)
    kept, copies = list[int](), list[int]()
    for i in bounds.argsort(stable=True).tolist():
        gaps = (theta[kept] - theta[i]).abs() - reach[kept] - reach[i]
        if len(kept) and float(gaps.min()) <= width:
            copies[int(gaps.argmin())] += 1
        else:
            kept.append(i)
            copies.append(1)
    chosen, count = torch.tensor(kept), torch.tensor(copies)
    if len(inner):
        shared = (inner[:, None] - theta[chosen]).abs().min(0).values <= width
        genuine = ~(shared & (count == 1) & (s[0, chosen].abs() <= 1e-6))
        chosen, count = chosen[genuine], count[genuine]
    order = theta[chosen].argsort()
    chosen = chosen[order]
    return theta[chosen], bounds[chosen], count[order]
