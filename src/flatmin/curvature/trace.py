"""Trace, diagonal and Frobenius norm from random vectors, to a stated error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vectors
from .basis import Basis
from .checkpoint import Checkpoint, State
from .operator import CurvatureOperator
from .progress import Progress, reporter
from .sampling import Estimate, adaptive, estimate, moments
from .xtrace import append, xtrace

ONE_SIGMA = 0.6827
Method = Literal["hutchinson", "hutch++", "xtrace"]


def trace(operator: CurvatureOperator, *, rtol: float = 0.05, confidence: float = ONE_SIGMA,
          method: Method = "hutchinson", seed: int | torch.Generator = 0, sketch: int | None = None,
          max_matvecs: int = 10_000, progress: Progress = False, checkpoint: str | None = None) -> Estimate:
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
        checkpoint: a file for the state, written each minute and on Ctrl-C, from which the same call goes on to the
            same result; removed with it.

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
    if sketch is not None and method != "hutch++":
        raise ValueError('sketch= is for method="hutch++"')
    size = min(10 if sketch is None else sketch, max(1, max_matvecs // 3), operator.size) if method == "hutch++" else 0
    generator = vectors.seeded(seed)
    with operator.session(), reporter(progress, "trace") as report, \
            Checkpoint(checkpoint, operator, generator=generator, method=method, rtol=rtol, confidence=confidence,
                       sketch=size, seed=seed) as keep:
        if method == "xtrace":
            return xtrace(operator, rtol, confidence, generator, max_matvecs, report,
                          operator.describe() | {"method": method, "rtol": rtol}, keep)
        Q, exact = _range(operator, size, generator, keep) if size else (None, 0.0)

        def sample() -> float:
            z = operator.random(generator, "rademacher")
            if Q is not None:
                Q.remove(z, len(Q))
            return operator.dot(z, operator._product(z))

        if size == operator.size:
            samples, foretold = [0.0, 0.0], 2 * size
        else:
            samples, foretold = adaptive(sample, 1, keep, rtol=rtol, confidence=confidence, spent=2 * size,
                                         most=max_matvecs, offset=exact, report=report, pilot=20 if size else 10)
    spent = 2 * size + (len(samples) if size < operator.size else 0)
    mean, stderr = moments(samples)
    return estimate(exact + mean, stderr, len(samples), matvecs=spent, foretold=foretold, rtol=rtol,
                    confidence=confidence, settings=operator.describe() | {"method": method, "rtol": rtol},
                    name="the trace")


def _range(operator: CurvatureOperator, size: int, generator: torch.Generator, keep: Checkpoint
           ) -> tuple[Basis, float]:
    """An orthonormal basis of A applied to random vectors, and the trace of A on it."""
    Q, parts = Basis(operator, size), keep.saved.get("parts", [])
    done = len(keep.saved.get("Q", ()))
    if done:
        Q.rows[:done].copy_(keep.saved["Q"])

    def state() -> State:
        return {"Q": Q.rows[:done], "parts": list(parts), "matvecs": done + len(parts)}

    while done < size:
        append(operator, Q, done, operator._product(operator.random(generator, "rademacher")), generator)
        done += 1
        keep.tick(state)
    while len(parts) < size:
        q = Q[len(parts)]
        parts.append(operator.dot(q, operator._product(q)))
        keep.tick(state)
    keep.fixed = {"Q": Q.rows, "parts": parts}
    return Q, math.fsum(parts)


def frobenius(operator: CurvatureOperator, *, rtol: float = 0.05, confidence: float = ONE_SIGMA,
              seed: int | torch.Generator = 0, max_matvecs: int = 10_000, progress: Progress = False,
              checkpoint: str | None = None) -> Estimate:
    """‖A‖_F = (E ‖Az‖²)^½ over random z, to a relative error; arguments as for ``trace``.

    >>> from flatmin.curvature import Matrix
    >>> frobenius(Matrix(torch.diag(torch.tensor([3.0, 4.0])))).value
    5.0
    """
    generator = vectors.seeded(seed)
    with operator.session(), reporter(progress, "Frobenius norm") as report, \
            Checkpoint(checkpoint, operator, generator=generator, method="frobenius", rtol=rtol, confidence=confidence,
                       seed=seed) as keep:
        samples, foretold = adaptive(
            lambda: operator.norm(operator._product(operator.random(generator, "rademacher"))) ** 2, 1, keep,
            rtol=2 * rtol, confidence=confidence, spent=0, most=max_matvecs, report=report)
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
             max_matvecs: int = 1000, progress: Progress = False, checkpoint: str | None = None) -> Diagonal:
    """diag A = E[z ∘ Az] over signs z, until ‖stderr‖ is at most ``rtol`` · ‖diag A‖ or the products are spent.

    The variance of entry i is Σ_{j≠i} A_ij² a probe, so that single entries are hard where rows are full. Arguments as
    for ``trace``.

    >>> from flatmin.curvature import Matrix
    >>> diagonal(Matrix(torch.diag(torch.tensor([3.0, -1.0])))).values[0].tolist()
    [3.0, -1.0]

    C. Bekas et al., Appl. Numer. Math. 57 (2007) 1214-1229.
    """
    generator = vectors.seeded(seed)
    mean = torch.zeros(operator.length, dtype=operator.dtype, device=operator.device)
    square = torch.zeros_like(mean)
    used, error, goal = 0, math.inf, min(8, max_matvecs)
    with operator.session(), reporter(progress, "diagonal") as report, \
            Checkpoint(checkpoint, operator, generator=generator, method="diagonal", rtol=rtol, seed=seed) as keep:
        if saved := keep.take():
            used, goal = saved["matvecs"], min(saved["goal"], max_matvecs)
            mean.copy_(saved["mean"])
            square.copy_(saved["square"])
        while True:
            while used < goal:      # Welford's update
                z = operator.random(generator, "rademacher")
                sample = operator._product(z).mul_(z)
                keep.changing()
                used += 1
                sample.sub_(mean)
                mean.add_(sample, alpha=1 / used)
                square.addcmul_(sample, sample, value=1 - 1 / used)
                keep.tick({"mean": mean, "square": square, "goal": goal, "matvecs": used})
                report(used, f"of about {goal}", goal - used)
            spread = math.sqrt(float(operator.reduce(square.sum(dtype=torch.float64))) / (max(used - 1, 1) * used))
            length = operator.norm(mean)
            error = spread / length if length else (0.0 if spread == 0 else math.inf)
            if error <= rtol or used >= max_matvecs:
                break
            goal = min(max_matvecs, max(used + 2, min(4 * used, math.ceil(1.1 * used * min(error / rtol, 2) ** 2))))
    stderr = (square / (max(used - 1, 1) * used)).sqrt_()
    return Diagonal(values=operator.split(mean), stderr=operator.split(stderr), relative_error=error, matvecs=used,
                    converged=error <= rtol, settings=operator.describe() | {"rtol": rtol})
