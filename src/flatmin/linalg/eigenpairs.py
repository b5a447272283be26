"""Eigenpairs at the ends of a spectrum, each with a residual that was computed afresh."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vectors
from ..progress import Progress, Report, left, reporter
from . import certificate, memory
from .basis import Basis, Place
from .checkpoint import Checkpoint, Journal, State
from .confidence import about_data, data_stderr
from .lanczos import BandLanczos
from .operator import CurvatureOperator, Forms, require_operator

Which = Literal["largest", "smallest", "both", "magnitude"]

SMALL = 1000
"""Up to so many coordinates a basis may span the whole space: no restart, and at most as many matvecs."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenpairs in algebraic order, smallest first as in ``torch.linalg.eigh``.

    ``residuals`` are ‖Av − λv‖ for unit v: from fresh matvecs where ``certified``, else estimated by the recurrence.
    In exact arithmetic A has an eigenvalue within its residual of each λ. ``complete`` says whether, at 99 %
    confidence, no eigenvalue at the wanted end is missing (another copy of a multiple one, say): True where the whole
    space was spanned or ``find_missing`` found no more, False where that ran out of its matvecs, None without
    that search.

    ``data_stderr`` is the standard error of each eigenvalue as an estimate for the distribution that the data were
    drawn from, by the spread of vᵀA_b v over the ``batches``, which must be independent: to first order the
    eigenvalue of A + dA is λ + vᵀ dA v (Hellmann and Feynman). It is None without ``certify``, for fewer than 5
    batches, and where the matrix is no mean over batches that are seen one by one (differences of gradients). It does
    not know of the bias of a largest eigenvalue of few samples (upwards), nor of weights trained on the same data, and
    it means little where a neighbour is closer than the error itself.
    """

    eigenvalues: Tensor     # (k,) float64
    eigenvectors: Tensor = field(repr=False)    # (k, n): row i belongs to eigenvalues[i]
    residuals: Tensor       # (k,) float64
    converged: Tensor       # (k,) bool: residual at most tol times the largest |eigenvalue|
    certified: bool
    complete: bool | None
    matvecs: int
    settings: dict[str, Any]
    data_stderr: Tensor | None = None   # (k,) float64
    batches: int | None = None

    @property
    def largest(self) -> float:
        """The algebraically largest of the eigenvalues found."""
        return float(self.eigenvalues[-1])

    @property
    def smallest(self) -> float:
        """The algebraically smallest of the eigenvalues found."""
        return float(self.eigenvalues[0])

    def __str__(self) -> str:
        data = [None] * len(self.eigenvalues) if self.data_stderr is None else self.data_stderr.tolist()
        rows = [f"{v: .6g} (residual {r:.1e}{about_data(d, self.batches)}{'' if c else ', not converged'})"
                for v, r, c, d in zip(self.eigenvalues.tolist(), self.residuals.tolist(), self.converged.tolist(),
                                      data, strict=True)]
        return f"{len(rows)} eigenpairs, {self.matvecs} matvecs\n" + "\n".join(rows)


def eigenpairs(operator: CurvatureOperator, k: int = 1, which: Which = "largest", *, tol: float = 1e-3,
               certify: bool = True, find_missing: bool = False, seed: int | torch.Generator = 0,
               basis: int | None = None, block: int = 1,
               place: Place = "device", folder: str | None = None, max_matvecs: int | None = None,
               progress: Progress = False, checkpoint: str | None = None) -> Spectrum:
    """k eigenpairs at an end of the spectrum, by thick-restart Lanczos with full re-orthogonalisation.

    A V = V T + r eᵀ; a Ritz pair (θ, Vs) with T s = θ s has the residual ‖r‖ |s_last|, and has converged when that is
    at most ``tol`` · max |θ|.

    Args:
        operator: any ``CurvatureOperator``.
        k: how many; fewer come back only where n < k.
        which: "largest" or "smallest" algebraically, "both" ends (the odd one at the top), or largest "magnitude".
        tol: residual relative to the largest |eigenvalue|.
        certify: make sure that the objective is deterministic, and recompute each residual with a fresh matvec (k of
            them), which gives ``data_stderr`` too.
        find_missing: search from a new random vector for eigenvalues that are missing, such as further copies of a
            multiple one (at most a quarter more matvecs, and 16 at least, unless something is found).
        seed: of the start vector.
        basis: vectors held at most (by default 3k + 40, less where memory is short; for up to 1000 coordinates one
            each, so that as many matvecs give the whole spectrum); after that, thick restarts.
        block: from how many random vectors to start, taking matvecs together; for clusters of known multiplicity.
        place: "device", "host" or "disk" (a file in ``folder`` that is gone afterwards), for the basis.
        max_matvecs: after this many matvecs (default: 20 times the basis) what there is comes back, unconverged
            pairs marked, with a warning.
        progress: True for a line on standard error, or a function of (matvecs, text).
        checkpoint: a file for the state, written each minute, on Ctrl-C and before the certification, from which the
            same call resumes after a kill; removed with the result.

    Raises:
        ValueError: k < 1, a matvec that is not finite, or a checkpoint of something else.
        MemoryError: before starting, where the basis does not fit, with what is needed.

    >>> from flatmin.curvature import Matrix
    >>> spectrum = eigenpairs(Matrix(torch.diag(torch.tensor([4.0, 1.0, 0.0, -5.0]))), k=2)
    >>> [round(x, 4) for x in spectrum.eigenvalues.tolist()], spectrum.converged.tolist()
    ([1.0, 4.0], [True, True])

    K. Wu, H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616.
    """
    require_operator(operator)
    if which not in ("largest", "smallest", "both", "magnitude"):
        raise ValueError(f'which must be "largest", "smallest", "both" or "magnitude", got {which!r}')
    if k < 1 or tol <= 0 or block < 1:
        raise ValueError(f"k, tol and block must be positive, got k={k}, tol={tol}, block={block}")
    k, generator = min(k, operator.size), vectors.seeded(seed)
    with operator.session(check=certify), reporter(progress, "eigenpairs") as report, \
            Checkpoint(checkpoint, operator, on_disk=place == "disk", method="eigenpairs", k=k, which=which, tol=tol,
                       basis=basis, block=block, seed=seed) as saver:
        saved = saver.take()
        m = len(saved["F"]) - block if saved else _basis_size(operator, k, basis, block, place)
        V = Basis(operator, m + block, place, folder, saver.basis)
        run = BandLanczos(operator, V, generator, block=block, start=saved is None)
        _iterate(run, k, which, tol, max_matvecs or 20 * m, report, saver, saved)
        saver.write()
        theta, s, bounds = run.ritz()
        chosen = wanted(theta, k, which)
        values, residuals, x = theta[chosen], bounds[chosen], V.combine(s[:, chosen], run.count)
        scale, used, complete = float(theta.abs().max()), run.matvecs, True if run.complete else None
        del V, run.V
        if find_missing and not complete and bool((residuals <= tol * scale).all()):
            values, x, complete, more = _completed(run, values, x, which, tol * scale, max(16, used // 4))
            used += more
        values, forms = values / run.unit, list[Forms | None]()
        if certify:
            residuals, forms = certificate.residuals(operator, values, x)
            used += len(x)
        else:
            residuals = residuals / run.unit
    converged = residuals <= tol * scale / run.unit
    if not bool(converged.all()):
        warnings.warn(f"{int((~converged).sum())} of {len(values)} eigenpairs did not converge to {tol:g} of the "
                      f"largest in {used} matvecs: allow more with max_matvecs=, or a larger basis=", stacklevel=2)
    errors, batches = [data_stderr(f) for f in forms], {len(f[0]) for f in forms if f is not None}
    known = len(errors) > 0 and None not in errors
    return Spectrum(eigenvalues=values, eigenvectors=x, residuals=residuals, converged=converged,
                    certified=certify and operator.trusted,
                    complete=complete, matvecs=used, settings=operator.describe() | {
                        "k": k, "which": which, "tol": tol, "basis": m, "block": block,
                        "method": "exact" if run.complete else "lanczos"},
                    data_stderr=torch.tensor(errors, dtype=torch.float64) if known else None,
                    batches=batches.pop() if batches else None)


def _basis_size(operator: CurvatureOperator, k: int, basis: int | None, block: int, place: Place) -> int:
    """How many basis vectors to hold."""
    least = min(k + 2 * block, operator.size)
    if basis is not None:
        if basis < least:
            raise ValueError(f"basis must be at least k + 2 block = {least}, got {basis}")
        return min(basis, operator.size)
    rows = operator.size if operator.size <= SMALL else 3 * k + 20 + 20 * block
    if place != "disk":
        where = operator.device if place == "device" else torch.device("cpu")
        vector = max(operator.length, 1) * torch.empty(0, dtype=operator.dtype).element_size()
        rows = min(rows, max(least + 6, memory.available(where) // (2 * vector) - k))
    return operator.smallest(min(rows, operator.size))


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


def _iterate(run: BandLanczos, k: int, which: Which, tol: float, limit: int, report: Report,
             saver: Checkpoint, saved: State | None) -> None:
    """Steps and restarts until the wanted Ritz pairs have converged, the space is spanned or the budget spent."""
    margin = min(0.1, max(0.02, 100 * run.eps / tol)) if run.operator.exact else 0.1    # a fresh matvec will differ
    due, history = k, list[tuple[int, float, float]]()

    def state(**more: Tensor) -> State:
        return run.state(with_basis=saver.basis is None) | {"due": due} | more

    def restart(s: Tensor, theta: Tensor, journal: Journal | None) -> None:
        nonlocal due
        run.restart(s, theta, journal)
        due = run.count + 1
        saver.rewritten(state)

    if saved:
        run.resume(saved)
        due = saved["due"]
        if "s" in saved:        # killed in the middle of a restart on disk
            restart(saved["s"], saved["theta"], saver.journal())
    while True:
        full = run.count == run.capacity
        if full or run.count >= due:
            theta, s, bounds = run.ritz()
            chosen = wanted(theta, k, which)
            worst = float(bounds[chosen].max())
            target = (1 - margin) * tol * float(theta.abs().max())
            history.append((run.matvecs, worst, target))
            report(run.matvecs, f"{int((bounds[chosen] <= target).sum())} of {k} converged, worst residual "
                                f"{worst / run.unit:.1e}, wanted {target / run.unit:.1e}", left(history))
            if worst <= target or run.complete or run.matvecs >= limit:
                return
            due = run.count + max(1, run.count // (48 if worst <= 10 * target else 16))     # a check costs time too
            if full:
                kept = wanted(theta, min(k + (run.count - k) // 2, run.count - 1), which)
                s, theta = s[:, kept], theta[kept]
                restart(s, theta, saver.rewriting(partial(state, s=s, theta=theta)))
        run.step()
        saver.tick(state)


def _completed(run: BandLanczos, values: Tensor, x: Tensor, which: Which, tolerance: float,
               budget: int) -> tuple[Tensor, Tensor, bool, int]:
    """The wanted eigenpairs after looking for missing ones: values, vectors, whether none is missing, matvecs."""
    k, used = len(values), 0
    while True:
        found = certificate.search(run.operator, x, _sides(values, which), tolerance=tolerance, budget=budget,
                                   unit=run.unit, generator=run.generator)
        used += found.matvecs
        if not len(found.values):
            return values, x, found.excluded, used
        values, x = torch.cat([values, found.values]), torch.cat([x, found.vectors])
        order = values.argsort()
        best = order[wanted(values[order], k, which)]
        values, x = values[best], x[best.to(x.device)]


def _sides(values: Tensor, which: Which) -> list[tuple[int, float]]:
    """Beyond which thresholds a further eigenvalue would belong to the wanted ones."""
    k = len(values)
    if which == "magnitude":
        least = float(values.abs().min())
        return [(1, least), (-1, -least)]
    if which == "both":
        sides = [(1, float(values[k // 2]))]
        return [*sides, (-1, float(values[k // 2 - 1]))] if k > 1 else sides
    return [(1, float(values[0]))] if which == "largest" else [(-1, float(values[-1]))]
