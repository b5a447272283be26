"""Trace, diagonal and Frobenius norm from random vectors, to a stated error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vectors
from ..progress import Progress, Report, reporter
from .basis import Basis
from .checkpoint import Checkpoint, State
from .confidence import (
    Drawn,
    Estimate,
    adaptive,
    add_forms,
    draw_if_cheaper,
    estimate,
    exact_is_cheaper,
    over_coordinates,
)
from .operator import CurvatureOperator, Forms, require_operator
from .xtrace import LEAST_PROBES, append_orthonormal, xtrace

ONE_SIGMA = 0.6827
Method = Literal["hutchinson", "hutch++", "xtrace"]


def trace(operator: CurvatureOperator, *, rtol: float = 0.05, confidence: float = ONE_SIGMA,
          method: Method = "hutchinson", seed: int | torch.Generator = 0, sketch: int | None = None,
          max_matvecs: int = 10_000, progress: Progress = False, checkpoint: str | None = None) -> Estimate:
    """tr A, to a relative error: probes are drawn until the interval at ``confidence`` is ± ``rtol`` · |tr A|.

    * "hutchinson": the mean of zᵀAz over signs z; its variance is 2(‖A‖_F² − Σ A_ii²) a probe.
    * "hutch++": with Q an orthonormal basis of A applied to ``sketch`` random vectors, tr QᵀAQ exactly and Hutchinson
      on the rest, (I − QQᵀ)A(I − QQᵀ): far less variance where few eigenvalues stand out. Two matvecs a sketch vector.
    * "xtrace": every probe serves both ends, leaving each out in turn; two matvecs a probe. The least error for the
      matvecs where the spectrum decays, for two vectors of memory a probe.

    All are unbiased for indefinite matrices too. The intervals are by Student's t; measured over seeds, 95 % ones hold
    the truth in 95 % ("hutchinson"), 89 to 94 % ("hutch++") and 85 to 95 % ("xtrace", least for flat spectra). The
    default confidence asks for a standard error of ``rtol``. Stated errors include rounding.

    Where as many matvecs would be needed as there are coordinates, one a coordinate gives the exact trace:
    ``settings["method"]`` is "exact" then, and the standard error 0 (not over ranks that share the parameters).

    ``data_stderr`` is over the batches, from zᵀA_b z of each batch b and the same z for all of them. What the probes
    add to the differences between batches is in it: it is an upper estimate, unless the method is "exact".

    Args:
        operator: any ``CurvatureOperator``.
        sketch: for "hutch++", how many vectors Q holds (10 by default). For "xtrace" 2 vectors a probe are held.
        max_matvecs: matvecs at most; where they do not suffice a warning says how many would.
        seed: of the probes.
        checkpoint: a file for the state, written each minute and on Ctrl-C, from which the same call resumes to the
            same result; removed with it.

    Returns:
        ``.value .stderr .interval .matvecs .predicted .converged .data_stderr .batches``.

    >>> from flatmin.curvature import Matrix
    >>> estimate = trace(Matrix(torch.diag(torch.tensor([3.0, 1.0, -1.0]))))
    >>> estimate.value, estimate.stderr, estimate.settings["method"]
    (3.0, 0.0, 'exact')

    M. Hutchinson 1990; R. Meyer et al., arXiv 2010.09649 (Hutch++); E. Epperly et al., SIAM J. Matrix Anal. Appl. 45
    (2024) 1-23 (XTrace).
    """
    require_operator(operator)
    if method not in ("hutchinson", "hutch++", "xtrace"):
        raise ValueError(f'method must be "hutchinson", "hutch++" or "xtrace", got {method!r}')
    if sketch is not None and method != "hutch++":
        raise ValueError('sketch= is for method="hutch++"')
    size = min(10 if sketch is None else sketch, max(1, max_matvecs // 3), operator.size) if method == "hutch++" else 0
    generator = vectors.seeded(seed)
    with operator.session(), reporter(progress, "trace") as report, \
            Checkpoint(checkpoint, operator, generator=generator, method=method, rtol=rtol, confidence=confidence,
                       sketch=size, seed=seed) as saver:
        least = 2 * LEAST_PROBES if method == "xtrace" else 2 * size + (20 if size else 10)
        options = operator, rtol, confidence, generator, max_matvecs, report, saver
        drawn = draw_if_cheaper(lambda: xtrace(*options) if method == "xtrace" else _hutchinson(*options, size),
                             operator, saver, least=least, most=max_matvecs)
        if drawn.prefer_exact:
            entries, forms = over_coordinates(operator, lambda w, i: float(w[i]), saver, report, spent=drawn.matvecs,
                                              predicted=drawn.predicted)
            drawn = drawn.exactly(math.fsum(entries), len(entries), math.fsum(map(abs, entries)), forms)
    return estimate(drawn, operator, rtol=rtol, confidence=confidence, name="the trace",
                    settings=operator.describe() | {"method": method, "rtol": rtol})


def _hutchinson(operator: CurvatureOperator, rtol: float, confidence: float, generator: torch.Generator, most: int,
                report: Report, saver: Checkpoint, size: int) -> Drawn:
    """The trace on the range of ``size`` matvecs exactly, and by random signs on the rest."""
    Q, parts, inside = _range(operator, size, generator, saver)
    forms: Forms | None = saver.saved.get("forms")

    def sample() -> float:
        nonlocal forms
        z = operator.random(generator, "rademacher")
        Q.remove(z, size)
        az, here = operator.matvec_with_forms(z)
        forms = saver.fixed["forms"] = add_forms(forms, here)
        return operator.dot(z, az)

    if size == operator.size:
        return Drawn(value=math.fsum(parts), magnitude=math.fsum(map(abs, parts)), matvecs=2 * size, samples=size,
                     predicted=2 * size, forms=inside)
    drawn = adaptive(sample, saver, operator, rtol=rtol, confidence=confidence, spent=2 * size, most=most,
                     offset=math.fsum(parts), report=report, pilot=20 if size else 10)
    return replace(drawn, magnitude=drawn.magnitude + math.fsum(map(abs, parts)),
                   forms=add_forms(inside, forms, 1 / drawn.samples))


def _range(operator: CurvatureOperator, size: int, generator: torch.Generator, saver: Checkpoint
           ) -> tuple[Basis, list[float], Forms | None]:
    """An orthonormal basis of A applied to random vectors, and the entries of A along it, batch by batch too."""
    Q, parts, forms = Basis(operator, max(size, 1)), saver.saved.get("parts", []), saver.saved.get("inside")
    done = len(saver.saved.get("Q", ()))
    if done:
        Q.rows[:done].copy_(saver.saved["Q"])

    def state() -> State:
        return {"Q": Q.rows[:done], "parts": list(parts), "inside": forms, "matvecs": done + len(parts)}

    while done < size:
        append_orthonormal(operator, Q, done, operator.matvec(operator.random(generator, "rademacher")), generator)
        done += 1
        saver.tick(state)
    while len(parts) < size:
        q = Q[len(parts)]
        aq, here = operator.matvec_with_forms(q)
        forms = add_forms(forms, here)
        parts.append(operator.dot(q, aq))
        saver.tick(state)
    if size:
        saver.fixed = {"Q": Q.rows, "parts": parts, "inside": forms}
    return Q, parts, forms


def frobenius(operator: CurvatureOperator, *, rtol: float = 0.05, confidence: float = ONE_SIGMA,
              seed: int | torch.Generator = 0, max_matvecs: int = 10_000, progress: Progress = False,
              checkpoint: str | None = None) -> Estimate:
    """‖A‖_F = (E ‖Az‖²)^½ over random z, to a relative error; arguments, and exact values, as for ``trace``.

    Its error by the data is not known (``data_stderr`` is None): it is no mean over batches.

    >>> from flatmin.curvature import Matrix
    >>> frobenius(Matrix(torch.diag(torch.tensor([3.0, 4.0])))).value
    5.0
    """
    require_operator(operator)
    generator = vectors.seeded(seed)
    with operator.session(), reporter(progress, "Frobenius norm") as report, \
            Checkpoint(checkpoint, operator, generator=generator, method="frobenius", rtol=rtol, confidence=confidence,
                       seed=seed) as saver:
        unit = saver.saved.get("unit", 0.0)

        def sample() -> float:
            nonlocal unit
            length = operator.norm(operator.matvec(operator.random(generator, "rademacher")))
            unit = saver.fixed["unit"] = unit or length or 1.0       # squares must not over- or underflow
            return (length / unit) ** 2

        drawn = draw_if_cheaper(lambda: adaptive(sample, saver, operator, rtol=2 * rtol, confidence=confidence, spent=0,
                                              most=max_matvecs, report=report),
                             operator, saver, least=10, most=max_matvecs)
        if drawn.prefer_exact:
            lengths, _ = over_coordinates(operator, lambda w, i: operator.norm(w), saver, report, spent=drawn.matvecs,
                                          predicted=drawn.predicted)
            drawn = drawn.exactly(math.hypot(*lengths), len(lengths), math.hypot(*lengths))
        else:
            root = math.sqrt(drawn.value)
            drawn = replace(drawn, value=root * unit, stderr=drawn.stderr / (2 * root) * unit if root else 0.0,
                            magnitude=root * unit)
    return estimate(drawn, operator, rtol=rtol, confidence=confidence, settings=operator.describe() | {"rtol": rtol},
                    name="the Frobenius norm")


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
    """diag A = E[z ∘ Az] over signs z, until ‖stderr‖ is at most ``rtol`` · ‖diag A‖ or the matvecs are spent.

    The variance of entry i is Σ_{j≠i} A_ij² a probe, so that single entries are hard where rows are full. Arguments,
    and exact values where they take no more matvecs, as for ``trace``.

    >>> from flatmin.curvature import Matrix
    >>> diagonal(Matrix(torch.diag(torch.tensor([3.0, -1.0])))).values[0].tolist()
    [3.0, -1.0]

    C. Bekas et al., Appl. Numer. Math. 57 (2007) 1214-1229.
    """
    require_operator(operator)
    generator = vectors.seeded(seed)
    mean = torch.zeros(operator.length, dtype=operator.dtype, device=operator.device)
    square = torch.zeros_like(mean)
    used, error, goal, unit = 0, math.inf, min(8, max_matvecs), 1.0
    with operator.session(), reporter(progress, "diagonal") as report, \
            Checkpoint(checkpoint, operator, generator=generator, method="diagonal", rtol=rtol, seed=seed) as saver:
        saved = saver.saved
        exact = "found" in saved or not saved and exact_is_cheaper(operator, goal, max_matvecs)
        if exact:
            used = saved.get("spent", 0)
        elif saved:
            used, goal, unit = saved["matvecs"], min(saved["goal"], max_matvecs), saved["unit"]
            mean.copy_(saved["mean"])
            square.copy_(saved["square"])
        while not exact:
            while used < goal:      # Welford's update
                z = operator.random(generator, "rademacher")
                sample = operator.matvec(z).mul_(z)
                saver.changing()
                unit = unit if used else operator.unit_for(sample)      # squares must not over- or underflow
                used += 1
                sample.mul_(unit).sub_(mean)
                mean.add_(sample, alpha=1 / used)
                square.addcmul_(sample, sample, value=1 - 1 / used)
                saver.tick({"mean": mean, "square": square, "goal": goal, "unit": unit, "matvecs": used})
                report(used, f"of about {goal}", goal - used)
            spread = math.sqrt(float(operator.reduce(square.sum(dtype=torch.float64))) / (max(used - 1, 1) * used))
            length = operator.norm(mean)
            error = spread / length if length else (0.0 if spread == 0 else math.inf)
            if error <= rtol or used >= max_matvecs:
                break
            exact = exact_is_cheaper(operator, used * (error / rtol) ** 2 - used, max_matvecs - used)
            goal = min(max_matvecs, max(used + 2, min(4 * used, math.ceil(1.1 * used * min(error / rtol, 2) ** 2))))
        if exact:
            entries, _ = over_coordinates(operator, lambda w, i: float(w[i]), saver, report, spent=used)
            mean, used, error, unit = torch.tensor(entries).to(mean), used + len(entries), 0.0, 1.0
            square.zero_()
    stderr = (square / (max(used - 1, 1) * used)).sqrt_().div_(unit)
    return Diagonal(values=operator.split(mean.div_(unit)), stderr=operator.split(stderr), relative_error=error,
                    matvecs=used, converged=error <= rtol, settings=operator.describe() | {
                        "rtol": rtol, "method": "exact" if exact else "random signs"})
