"""Curvature matrices that are never built, and algorithms that see only their matvecs.

* matrices over an ``Objective``: ``Hessian``, ``GaussNewton``, ``FunctionalPart`` (H − G), ``Fisher``;
* the ends of a spectrum: ``eigenpairs``, ``power_iteration``, ``eigenvalues`` (three vectors of memory);
* sums over it, with their errors: ``trace``, ``diagonal``, ``frobenius``, ``spectral_density``;
* small ones: ``dense_hessian``, ``compute_hessian_sharpness``, ``condition_number``.
"""

from ..linalg.confidence import Estimate
from ..linalg.density import SpectralDensity, spectral_density
from ..linalg.eigenpairs import Spectrum, eigenpairs
from ..linalg.eigenvalues import Eigenvalues, eigenvalues
from ..linalg.operator import CurvatureOperator, Matrix
from ..linalg.power import PowerIteration, power_iteration
from ..linalg.trace import Diagonal, diagonal, frobenius, trace
from .dense import ConditionNumber, compute_hessian_sharpness, condition_number, dense_hessian
from .fisher import Fisher
from .gauss_newton import FunctionalPart, GaussNewton
from .hessian import Hessian

__all__ = [
    "ConditionNumber", "CurvatureOperator", "Diagonal", "Eigenvalues", "Estimate", "Fisher", "FunctionalPart",
    "GaussNewton", "Hessian", "Matrix", "PowerIteration", "SpectralDensity", "Spectrum", "compute_hessian_sharpness",
    "condition_number", "dense_hessian", "diagonal", "eigenpairs", "eigenvalues", "frobenius", "power_iteration",
    "spectral_density", "trace",
]
