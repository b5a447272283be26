"""Curvature matrices that are never built, and algorithms that see only their products with vectors."""

from .hessian import Hessian
from .lanczos import Spectrum, eigenpairs
from .operator import CurvatureOperator, Matrix

__all__ = ["CurvatureOperator", "Hessian", "Matrix", "Spectrum", "eigenpairs"]
