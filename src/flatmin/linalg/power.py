"""The power method: the fewest vectors and the slowest convergence, with its rate."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .. import vectors
from ..progress import Progress, left, reporter
from .checkpoint import Checkpoint
from .confidence import Measured, about_data, data_stderr
from .operator import CurvatureOperator, require_operator

PLAIN = 10
"""Plain steps before the shift is known."""


@dataclass(frozen=True, kw_only=True)
class PowerIteration(Measured):
    """One eigenpair; ``rate`` is the factor by which the residual fell in a late step, ``residual`` ‖Av − λv‖.

    ``data_stderr`` as of a ``Spectrum``.
    """

    vector: Tensor = field(repr=False)
    residual: float
    converged: bool
    matvecs: int
    rate: float

    def __str__(self) -> str:
        return f"PowerIteration({self.value:.6g} (residual {self.residual:.1e}" \
               f"{about_data(self.data_stderr, self.batches)}{'' if self.converged else ', not converged'}))"


def power_iteration(operator: CurvatureOperator, which: Literal["largest", "magnitude"] = "largest", *,
                    tol: float = 1e-3, max_matvecs: int = 1000, seed: int | torch.Generator = 0,
                    progress: Progress = False, checkpoint: str | None = None) -> PowerIteration:
    """One eigenpair by v ← (A + σI) v / ‖·‖.

    Plain power iteration (σ = 0, "magnitude") finds the eigenvalue of largest |λ|, which for a Hessian may well be a
    negative one, and does not converge on a ±λ pair. For the algebraically "largest" σ is the largest ‖Av‖ of ten plain
    steps, so that the lower end of the spectrum is damped. The residual falls by (λ₂ + σ) / (λ₁ + σ) a step;
    ``eigenpairs`` needs far fewer matvecs for the price of more vectors.

    Args:
        operator: any ``CurvatureOperator``.
        tol: stop when ‖Av − λv‖ is at most ``tol`` · max(|λ|, σ).
        max_matvecs: matvecs at most; beyond, a warning, and ``converged`` is False.
        seed: of the start vector.
        checkpoint: a file for the state, written each minute and on Ctrl-C, from which the same call resumes to the
            same result; removed with it.

    >>> from flatmin.curvature import Matrix
    >>> p = power_iteration(Matrix(torch.diag(torch.tensor([1.0, -5.0]))), tol=1e-6)
    >>> round(p.value, 4), p.converged
    (1.0, True)
    """
    require_operator(operator)
    if which not in ("largest", "magnitude"):
        raise ValueError(f'which must be "largest" or "magnitude", got {which!r}')
    v = operator.random(vectors.seeded(seed))
    v.div_(operator.norm(v))
    start = v.clone() if which == "largest" else v
    value = residual = math.inf
    top = 0.0
    rate = math.nan
    converged, forms = False, None
    used, history = 0, list[tuple[int, float, float]]()
    with operator.session(), reporter(progress, "power iteration") as report, \
            Checkpoint(checkpoint, operator, method="power", which=which, tol=tol, seed=seed) as saver:
        if saved := saver.take():
            v, start = (saved[name].to(operator.device) for name in ("v", "start"))
            value, residual, top, rate, used = (saved[name] for name in ("value", "residual", "top", "rate", "matvecs"))
        while used < max_matvecs:
            w, forms = operator.matvec_with_forms(v)
            used += 1
            value, length, before = operator.dot(v, w), operator.norm(w), residual
            if not math.isfinite(length):
                raise ValueError("a matvec is not finite: the loss overflows at these weights")
            top = max(top, length)
            residual = operator.norm(w - value * v)
            rate = residual / before if before < math.inf and before > 0 else rate
            converged = residual <= tol * top and (which == "magnitude" or used > PLAIN or value >= top * (1 - tol))
            history.append((used, residual, tol * top))
            report(used, f"{value:.6g}, residual {residual:.1e}, wanted {tol * top:.1e}", left(history))
            if converged or length == 0 or used == max_matvecs:
                break
            if which == "largest" and used <= PLAIN:
                w = start.clone() if used == PLAIN else w
            elif which == "largest":
                w.add_(v, alpha=top)
            v = w.div_(operator.norm(w))
            saver.tick({"v": v, "start": start, "value": value, "residual": residual, "top": top, "rate": rate,
                       "matvecs": used})
    if not converged:
        warnings.warn(f"power iteration did not converge in {used} matvecs (residual {residual:.1e}, falling by "
                      f"{rate:.3f} a step): eigenpairs() needs fewer", stacklevel=2)
    return PowerIteration(value=value, vector=v, residual=residual, converged=converged, matvecs=used, rate=rate,
                          settings=operator.describe() | {"which": which, "tol": tol},
                          data_stderr=data_stderr(forms), batches=None if forms is None else len(forms[0]))
