"""Trace, diagonal and Frobenius norm from random vectors, to a stated error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vectors
from .basis import Basis
from .operator import CurvatureOperator
from .progress import Progress, reporter
from .sampling import Estimate, adaptive, enough, estimate, moments

ONE_SIGMA = 0.6827
Method = Literal["hutchinson", "hutch++", "xtrace"]


def trace(operator: CurvatureOperator, *, rtol: float = 0.05, confidence: float = ONE_SIGMA,
          method: Method = "hutchinson", seed: int | torch.Generator = 0, sketch: int | None = None,
          max_matvecs: int = 10_000, progress: Progress = False) -> Estimate:
    """tr A, to a relative error: probes are drawn until the interval at ``confidence`` is ± ``rtol`` · |tr A|.

    * "hutchinson": the mean of zᵀAz over signs z; its variance is 2(‖A‖_F² − Σ A_ii²) a probe.
    * "hutch++": with Q an orthonormal basis of A applied to ``sketch`` random vectors, tr QᵀAQ exactly and Hutchinson
      on the rest, (I − QQᵀ)A(I − QQᵀ): far less variance where few eigenvalues stand out. Two products a sketch vector.
    * "xtrace": every probe serves both ends, leaving each out in turn; two products a probe.

    All are unbiased for indefinite matrices too. The intervals are by Student's t; measured over seeds, 95 % ones hold
    the truth in 95 % ("hutchinson"), 89 to 94 % ("hutch++") and 85 to 95 % ("xtrace", least for flat spectra). The
    default confidence asks for a standard error of ``rtol``.

    Args:
        operator: any ``CurvatureOperator``.
        sketch: for "hutch++", how many vectors Q holds (10 by default). For "xtrace" 2 vectors a probe are held.
        max_matvecs: products at most; where they do not suffice a warning says how many would.
        seed: of the probes.

    Returns:
        ``.value .stderr .interval .matvecs .foretold .converged``.

    >>> from flatmin.curvature import Matrix
    >>> estimate = trace(Matrix(torch.diag(torch.tensor([3.0, 1.0, -1.0]))))
    >>> estimate.value, estimate.stderr                 # signs: exact for a diagonal matrix
    (3.0, 0.0)

    M. Hutchinson 1990; R. Meyer et al., arXiv 2010.09649 (Hutch++); E. Epperly et al., SIAM J. Matrix Anal. Appl. 45
    (2024) 1-23 (XTrace).
    """
    if method not in ("hutchinson", "hutch++", "xtrace"):
        raise ValueError(f'method must be "hutchinson", "hutch++" or "xtrace", got {method!r}')
    generator = vectors.seeded(seed)
    settings = operator.describe() | {"method": method, "rtol": rtol}
    with operator.session(), reporter(progress, "trace") as report:
        if method == "xtrace":
            return _xtrace(operator, rtol, confidence, generator, max_matvecs, report, settings)
        Q, exact, spent = None, 0.0, 0
        if method == "hutch++":
            size = min(10 if sketch is None else sketch, max(1, max_matvecs // 3), operator.size)
            Q, exact = _range(operator, size, generator)
            spent = 2 * size
        elif sketch is not None:
            raise ValueError('sketch= is for method="hutch++"')

        def sample() -> float:
            z = operator.random(generator, "rademacher")
            if Q is not None:
                Q.remove(z, len(Q))
            return operator.dot(z, operator._product(z))

        if Q is not None and len(Q) == operator.size:
            samples, foretold = [0.0, 0.0], spent
        else:
            samples, foretold = adaptive(sample, 1, rtol=rtol, confidence=confidence, spent=spent, most=max_matvecs,
                                         offset=exact, report=report, pilot=10 if Q is None else 20)
            spent += len(samples)
    mean, stderr = moments(samples)
    return estimate(exact + mean, stderr, len(samples), matvecs=spent, foretold=foretold, rtol=rtol,
                    confidence=confidence, settings=settings, name="the trace")


def _range(operator: CurvatureOperator, size: int, generator: torch.Generator) -> tuple[Basis, float]:
    """An orthonormal basis of A applied to random vectors, and the trace of A on it."""
    Q = Basis(operator, size)
    for i in range(size):
        append(operator, Q, i, operator._product(operator.random(generator, "rademacher")), generator)
    return Q, math.fsum(operator.dot(Q[i], operator._product(Q[i])) for i in range(size))


def append(operator: CurvatureOperator, Q: Basis, i: int, y: Tensor, generator: torch.Generator) -> Tensor:
    """Row i of Q ← y made orthonormal to the rows before (or a random vector, where y depends on them).

    Returns the coefficients (i + 1,) of y along the rows, the last one 0 where y was dependent.
    """
    before = operator.norm(y)
    c = Q.remove(y, i)
    c = c + Q.remove(y, i)
    length = operator.norm(y)
    dependent = length <= 100 * torch.finfo(operator.dtype).eps * before
    if dependent:
        y = operator.random(generator)
        for _ in range(3):
            y.div_(operator.norm(y))
            Q.remove(y, i)
    Q.put(i, y, 1 / operator.norm(y))
    return torch.cat([c, torch.tensor([0.0 if dependent else length], dtype=torch.float64)])


def _xtrace(operator: CurvatureOperator, rtol: float, confidence: float, generator: torch.Generator, most: int,
            report: Callable[[int, str], None], settings: dict[str, Any]) -> Estimate:
    """Grow Q and the probes together, doubling, until the leave-one-out error is small enough."""
    limit = max(2, min(most // 2, operator.size - 1 if operator.size > 1 else 1))
    goal, done, foretold = min(16, limit), 0, 0
    probes: list[Tensor] = []
    q: list[Tensor] = []
    R, H, W, square = (torch.zeros(0, 0, dtype=torch.float64) for _ in range(4))
    while True:
        Q = Basis(operator, goal)
        for i, row in enumerate(q):
            Q.put(i, row)
        R, H, square = (torch.nn.functional.pad(t, (0, goal - done, 0, goal - done)) for t in (R, H, square))
        for i in range(done, goal):
            z = operator.random(generator)
            y = operator._product(z)
            square[i, i] = operator.dot(z, y)
            R[:i + 1, i] = append(operator, Q, i, y, generator)
            probes.append(z)
            az = operator._product(Q[i])
            H[:i + 1, i] = H[i, :i + 1] = Q.project(az, i + 1).to("cpu", torch.float64)
            report(2 * (i + 1), f"of about {2 * goal}")
        W = torch.stack([Q.project(z, goal).to("cpu", torch.float64) for z in probes], 1)
        q, done = list(Q.rows), goal
        lengths = torch.tensor([operator.norm(z) ** 2 for z in probes], dtype=torch.float64)
        samples = _leave_one_out(R, H, W, square.diagonal(), lengths, operator.size)
        mean, stderr = moments(samples)
        if enough(mean, stderr, rtol, confidence, done):
            break
        foretold = foretold or int(min(2 * done * (stderr / max(rtol * abs(mean), 1e-300)) ** 2, 2**62))
        if done >= limit:
            break
        goal = min(2 * goal, limit)
    return estimate(mean, stderr, done, matvecs=2 * done, foretold=foretold or 2 * done, rtol=rtol,
                    confidence=confidence, settings=settings, name="the trace")


def _leave_one_out(R: Tensor, H: Tensor, W: Tensor, zaz: Tensor, lengths: Tensor, n: int) -> list[float]:
    """The XTrace estimates, one a probe: QᵢQᵢᵀ = Q(I − s sᵀ)Qᵀ is the range without probe i, s ∝ R⁻ᵀ eᵢ.

    With p the coordinates of the projected probe, μ = z − Qp: tr QᵢᵀAQᵢ + (n − N + 1) μᵀAμ / ‖μ‖², the last factor
    because only the direction of a normal probe matters.
    """
    size = len(R)
    scale = R.diagonal().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    safe = R + torch.diag(torch.where(R.diagonal().abs() < 1e-12 * scale, scale * 1e-12, 0.0))
    S = torch.linalg.solve_triangular(safe.T, torch.eye(size, dtype=torch.float64), upper=False)
    S = S / torch.linalg.vector_norm(S, dim=0)
    P = W - S * (S * W).sum(0)
    rest = zaz - 2 * (P * R).sum(0) + (P * (H @ P)).sum(0)
    mu = (lengths - (P * P).sum(0)).clamp(min=1e-300)
    return (H.trace() - (S * (H @ S)).sum(0) + (n - size + 1) * rest / mu).tolist()


def frobenius(operator: CurvatureOperator, *, rtol: float = 0.05, confidence: float = ONE_SIGMA,
              seed: int | torch.Generator = 0, max_matvecs: int = 10_000, progress: Progress = False) -> Estimate:
    """‖A‖_F = (E ‖Az‖²)^½ over random z, to a relative error; arguments as for ``trace``.

    >>> from flatmin.curvature import Matrix
    >>> frobenius(Matrix(torch.diag(torch.tensor([3.0, 4.0])))).value
    5.0
    """
    generator = vectors.seeded(seed)
    with operator.session(), reporter(progress, "Frobenius norm") as report:
        samples, foretold = adaptive(
            lambda: operator.norm(operator._product(operator.random(generator, "rademacher"))) ** 2, 1, rtol=2 * rtol,
            confidence=confidence, spent=0, most=max_matvecs, report=report)
    mean, stderr = moments(samples)
    value = math.sqrt(mean)
    return estimate(value, stderr / (2 * value) if value else 0.0, len(samples), matvecs=len(samples),
                    foretold=foretold, rtol=rtol, confidence=confidence,
                    settings=operator.describe() | {"rtol": rtol}, name="the Frobenius norm")


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """The diagonal as a list of tensors in parameter order, with the standard error of each entry.

    ``relative_error`` is ‖stderr‖ / ‖diagonal‖.
    """

    values: list[Tensor] = field(repr=False)
    stderr: list[Tensor] = field(repr=False)
    relative_error: float
    matvecs: int
    converged: bool
    settings: dict[str, Any]


def diagonal(operator: CurvatureOperator, *, rtol: float = 0.1, seed: int | torch.Generator = 0,
             max_matvecs: int = 1000, progress: Progress = False) -> Diagonal:
    """diag A = E[z ∘ Az] over signs z, until ‖stderr‖ is at most ``rtol`` · ‖diag A‖ or the products are spent.

    The variance of entry i is Σ_{j≠i} A_ij² a probe, so that single entries are hard where rows are full.

    >>> from flatmin.curvature import Matrix
    >>> diagonal(Matrix(torch.diag(torch.tensor([3.0, -1.0])))).values[0].tolist()
    [3.0, -1.0]

    C. Bekas et al., Appl. Numer. Math. 57 (2007) 1214-1229.
    """
    generator = vectors.seeded(seed)
    mean = torch.zeros(operator.length, dtype=operator.dtype, device=operator.device)
    square = torch.zeros_like(mean)
    used, error, goal = 0, math.inf, min(8, max_matvecs)
    with operator.session(), reporter(progress, "diagonal") as report:
        while True:
            while used < goal:      # Welford's update
                z = operator.random(generator, "rademacher")
                sample = operator._product(z).mul_(z)
                used += 1
                sample.sub_(mean)
                mean.add_(sample, alpha=1 / used)
                square.addcmul_(sample, sample, value=1 - 1 / used)
                report(used, f"of about {goal}")
            spread = math.sqrt(float(operator.reduce(square.sum(dtype=torch.float64))) / (max(used - 1, 1) * used))
            length = operator.norm(mean)
            error = spread / length if length else (0.0 if spread == 0 else math.inf)
            if error <= rtol or used >= max_matvecs:
                break
            goal = min(max_matvecs, max(used + 2, min(4 * used, math.ceil(1.1 * used * min(error / rtol, 2) ** 2))))
    stderr = (square / (max(used - 1, 1) * used)).sqrt_()
    return Diagonal(values=operator.split(mean), stderr=operator.split(stderr), relative_error=error, matvecs=used,
                    converged=error <= rtol, settings=operator.describe() | {"rtol": rtol})
