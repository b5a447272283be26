"""Eigenpairs at the ends of a spectrum, each with a residual that was computed afresh."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vectors
from . import memory
from .basis import Basis, Place
from .krylov import Krylov, norm
from .operator import CurvatureOperator
from .progress import Progress, reporter

Which = Literal["largest", "smallest", "both", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenpairs in algebraic order, smallest first as in ``torch.linalg.eigh``.

    ``residuals`` are ‖Av − λv‖ for unit v: from fresh products where ``certified``, else estimated by the recurrence.
    In exact arithmetic an eigenvalue of A lies within its residual of each λ. ``complete`` says whether it was
    excluded, at 99 % confidence, that an eigenvalue at the wanted end is missing (another copy of a multiple one, say);
    None where that was not looked into.
    """

    eigenvalues: Tensor     # (k,) float64
    eigenvectors: Tensor = field(repr=False)    # (k, n): row i belongs to eigenvalues[i]
    residuals: Tensor       # (k,) float64
    converged: Tensor       # (k,) bool: residual at most tol times the largest |eigenvalue|
    certified: bool
    complete: bool | None
    matvecs: int
    settings: dict[str, Any]

    @property
    def largest(self) -> float:
        """The algebraically largest of the eigenvalues found."""
        return float(self.eigenvalues[-1])

    @property
    def smallest(self) -> float:
        """The algebraically smallest of the eigenvalues found."""
        return float(self.eigenvalues[0])

    def __str__(self) -> str:
        rows = [f"{float(v): .6g} (residual {float(r):.1e}{'' if c else ', not converged'})" for v, r, c in
                zip(self.eigenvalues, self.residuals, self.converged, strict=True)]
        return f"{len(rows)} eigenpairs, {self.matvecs} products\n" + "\n".join(rows)


def eigenpairs(operator: CurvatureOperator, k: int = 1, which: Which = "largest", *, tol: float = 1e-3,
               certify: bool = True, seed: int | torch.Generator = 0, basis: int | None = None, block: int = 1,
               place: Place = "device", folder: str | None = None, max_matvecs: int | None = None,
               progress: Progress = False, checkpoint: str | None = None) -> Spectrum:
    """k eigenpairs at an end of the spectrum, by thick-restart Lanczos with full re-orthogonalisation.

    A V = V T + r eᵀ; a Ritz pair (θ, Vs) of T s = θ s has the residual ‖r‖ |s_last|, and stops counting as unconverged
    when that is at most ``tol`` · max |θ|.

    Args:
        operator: any ``CurvatureOperator``.
        k: how many; fewer come back only where n < k.
        which: "largest" or "smallest" algebraically, "both" ends (the odd one at the top), or largest "magnitude".
        tol: residual relative to the largest |eigenvalue|.
        certify: recompute each residual with a fresh product (k products), and look, from a new random vector
            orthogonal to what was found, for eigenvalues that are missing.
        seed: of the start vector.
        basis: vectors held at most (by default 3k + 40, less where memory is short); after that, thick restarts.
        block: products taken together from as many random vectors; for clusters of known multiplicity.
        place: "device", "host" or "disk" (a file in ``folder`` that is gone afterwards), for the basis.
        max_matvecs: after this many products (default: 20 times the basis) what there is comes back, unconverged
            pairs marked, with a warning.
        progress: True for a line on standard error, or a function of (products, text).
        checkpoint: a file that holds the state, written each minute, from which the same call goes on after a kill;
            it is removed at the end.

    Raises:
        ValueError: k < 1, or a product that is not finite.
        MemoryError: before starting, where the basis does not fit, with what is needed.

    >>> from flatmin.curvature import Matrix
    >>> spectrum = eigenpairs(Matrix(torch.diag(torch.tensor([4.0, 1.0, 0.0, -5.0]))), k=2)
    >>> [round(x, 4) for x in spectrum.eigenvalues.tolist()], spectrum.converged.tolist()
    ([1.0, 4.0], [True, True])

    K. Wu, H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616.
    """
    if which not in ("largest", "smallest", "both", "magnitude"):
        raise ValueError(f'which must be "largest", "smallest", "both" or "magnitude", got {which!r}')
    if k < 1 or tol <= 0 or block < 1:
        raise ValueError(f"k, tol and block must be positive, got k={k}, tol={tol}, block={block}")
    k, generator = min(k, operator.size), vectors.seeded(seed)
    limit = max_matvecs or 20 * _rows(operator, k, basis, place)
    with operator.session(), reporter(progress, "eigenpairs") as report:
        V = Basis(_rows(operator, k, basis, place) + 1, operator.size, operator.dtype, operator.device, place, folder)
        run = Krylov(operator, V, generator)
        _iterate(run, k, which, tol, limit, report)
        theta, s, bounds = run.ritz()
        chosen = wanted(theta, k, which)
        x = V.combine(s[:, chosen], run.count)
        values, residuals, used, complete = theta[chosen], bounds[chosen], run.matvecs, None
        scale = float(theta.abs().max())
        del V
        if certify:
            complete = run.complete or None
    values, residuals = values / run.unit, residuals / run.unit
    if certify:
        residuals = certificate(operator, values, x)
        used += k
    converged = residuals <= tol * scale / run.unit
    if not bool(converged.all()):
        warnings.warn(f"{int((~converged).sum())} of {k} eigenpairs did not converge to {tol:g} of the largest in "
                      f"{used} products: allow more with max_matvecs=, or a larger basis=", stacklevel=2)
    return Spectrum(eigenvalues=values, eigenvectors=x, residuals=residuals, converged=converged, certified=certify,
                    complete=complete, matvecs=used, settings=operator.describe() | {"which": which, "tol": tol})


def _rows(operator: CurvatureOperator, k: int, basis: int | None, place: Place) -> int:
    """How many basis vectors to hold."""
    if basis is not None:
        if basis < min(k + 2, operator.size):
            raise ValueError(f"basis must be at least k + 2 = {k + 2}, got {basis}")
        return min(basis, operator.size)
    rows = 3 * k + 40
    if place != "disk":
        where = operator.device if place == "device" else torch.device("cpu")
        vector = operator.size * torch.empty(0, dtype=operator.dtype).element_size()
        rows = min(rows, max(k + 8, memory.available(where) // (2 * vector) - k))
    return min(rows, operator.size)


def wanted(theta: Tensor, k: int, which: Which) -> Tensor:
    """Positions of the k wanted values in ascending θ, ascending."""
    m = len(theta)
    k = min(k, m)
    if which == "largest":
        return torch.arange(m - k, m)
    if which == "smallest":
        return torch.arange(k)
    if which == "both":
        return torch.cat([torch.arange(k // 2), torch.arange(m - (k - k // 2), m)])
    return theta.abs().argsort(descending=True)[:k].sort().values


def _iterate(run: Krylov, k: int, which: Which, tol: float, limit: int, report: Callable[[int, str], None]) -> None:
    """Steps and restarts until the wanted Ritz pairs have converged, the space is spanned or the budget spent."""
    checked = 0
    while True:
        run.step()
        full = run.count == run.capacity
        if run.count < k or not (full or run.count - checked > run.count // 16):
            continue
        checked = run.count
        theta, s, bounds = run.ritz()
        chosen = wanted(theta, k, which)
        done = bounds[chosen] <= 0.9 * tol * theta.abs().max()
        report(run.matvecs, f"{int(done.sum())} of {k} converged")
        if bool(done.all()) or run.complete or run.matvecs >= limit:
            return
        if full:
            keep = wanted(theta, min(k + (run.count - k) // 2, run.count - 1), which)
            run.restart(s[:, keep], theta[keep])
            checked = run.count


def certificate(operator: CurvatureOperator, values: Tensor, x: Tensor) -> Tensor:
    """‖Av − λv‖ / ‖v‖ for each row of x, by products that share nothing with earlier ones."""
    out = []
    with getattr(operator, "fresh", nullcontext)():
        for value, row in zip(values.tolist(), x, strict=True):
            v = row.to(operator.device)
            out.append(norm(operator._product(v).add_(v, alpha=-value)) / norm(v))
    return torch.tensor(out, dtype=torch.float64)
