"""Curvature matrices that are never built, and algorithms that see only their products with vectors."""

from .fisher import Fisher
from .gauss_newton import FunctionalPart, GaussNewton
from .hessian import Hessian
from .lanczos import Spectrum, eigenpairs
from .operator import CurvatureOperator, Matrix

__all__ = ["CurvatureOperator", "Fisher", "FunctionalPart", "GaussNewton", "Hessian", "Matrix", "Spectrum",
           "eigenpairs"]
