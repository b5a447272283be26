"""The curvature measures by name; each is described in ``flatmin.measures``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..linalg.density import spectral_density
from ..linalg.eigenpairs import eigenpairs
from ..linalg.trace import trace
from ..measures import Options, bind
from ..objective import Objective
from ..results import PerBatch, Scalar
from .hessian import Hessian
from .objective_operator import ObjectiveOperator

TRACE_MATVECS = 1000
"""The most matvecs spent on the trace to a relative error of 0.05; to other errors, in proportion to their number."""


@dataclass(frozen=True, kw_only=True)
class LargestEigenvalue(Scalar):
    """``value`` = λ₁ of the Hessian; ``stderr`` is its residual, which bounds the distance to an eigenvalue."""

    data_stderr: float = math.nan   # over batches; nan where there are fewer than five
    per_batch: PerBatch = PerBatch()


def _hessian(objective: Objective, options: Options) -> ObjectiveOperator:
    return Hessian(objective, product=options.product)


def _trace_matvecs(rtol: float) -> int:
    return math.ceil(TRACE_MATVECS * max(1.0, (0.05 / rtol) ** 2))


def _largest(objective: Objective, options: Options) -> LargestEigenvalue:
    found = eigenpairs(_hessian(objective, options), 1, tol=1e-2 if options.quick else options.tol,
                       certify=not options.quick, seed=options.seed)
    error = math.nan if found.data_stderr is None else float(found.data_stderr[-1])
    return LargestEigenvalue(value=found.largest, stderr=float(found.residuals[-1]), data_stderr=error)


MEASURES = bind("curvature", {
    "spectrum": lambda o, a: eigenpairs(_hessian(o, a), a.k, tol=a.tol, seed=a.seed, progress=a.progress,
                                        checkpoint=a.checkpoint),
    "largest_eigenvalue": _largest,
    "trace": lambda o, a: trace(_hessian(o, a), rtol=a.rtol, max_matvecs=_trace_matvecs(a.rtol), seed=a.seed,
                                progress=a.progress, checkpoint=a.checkpoint),
    "density": lambda o, a: spectral_density(_hessian(o, a), seed=a.seed, progress=a.progress,
                                               checkpoint=a.checkpoint),
})
