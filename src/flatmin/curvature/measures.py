"""The curvature measures by name; what each is and costs stands in ``flatmin.measures``."""

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

TRACE_ERROR, TRACE_MATVECS = 0.05, 1000
"""The relative standard error that the trace is measured to, and the most matvecs spent on it."""


@dataclass(frozen=True, kw_only=True)
class LargestEigenvalue(Scalar):
    """``value`` = λ₁ of the Hessian; ``stderr`` is its residual, which bounds the distance to an eigenvalue."""

    data_stderr: float = math.nan   # over batches; nan where there are fewer than five
    per_batch: PerBatch = PerBatch()


def _largest(objective: Objective, options: Options) -> LargestEigenvalue:
    found = eigenpairs(Hessian(objective), 1, tol=1e-2 if options.quick else options.tol, certify=not options.quick,
                       seed=options.seed)
    error = math.nan if found.data_stderr is None else float(found.data_stderr[-1])
    return LargestEigenvalue(value=found.largest, stderr=float(found.residuals[-1]), data_stderr=error)


MEASURES = bind("curvature", {
    "spectrum": lambda o, a: eigenpairs(Hessian(o), a.k, tol=a.tol, seed=a.seed, progress=a.progress,
                                        checkpoint=a.checkpoint),
    "largest_eigenvalue": _largest,
    "trace": lambda o, a: trace(Hessian(o), rtol=TRACE_ERROR, max_matvecs=TRACE_MATVECS, seed=a.seed,
                                progress=a.progress, checkpoint=a.checkpoint),
    "density": lambda o, a: spectral_density(Hessian(o), seed=a.seed, progress=a.progress, checkpoint=a.checkpoint),
})
