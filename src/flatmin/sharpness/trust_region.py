"""The exact maximum of a quadratic over a ball, the ground truth of worst-case sharpness on small problems."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..results import Scalar


@dataclass(frozen=True, kw_only=True)
class TrustRegion(Scalar):
    """``value`` = max gᵀe + ½eᵀHe over ‖e‖ ≤ ρ, reached at ``maximizer`` with the multiplier μ."""

    maximizer: Tensor = field(repr=False)       # (d,) float64
    multiplier: float
    hard_case: bool


def trust_region(gradient: Tensor, hessian: Tensor, rho: float) -> TrustRegion:
    """max gᵀe + ½ eᵀHe over ‖e‖₂ ≤ ρ, by one eigendecomposition and bisection.

    The maximiser solves (μI − H) e = g with μ ≥ max(λ₁, 0) and μ (ρ − ‖e‖) = 0; ‖e(μ)‖ falls in μ. In the hard case g
    has no part along the top eigenvectors and ‖e(λ₁)‖ < ρ: the rest of the radius goes along one of them.

    Args:
        gradient: g, (d,).
        hessian: H, (d, d), symmetric, possibly indefinite.
        rho: the radius.

    >>> float(trust_region(torch.zeros(2), torch.diag(torch.tensor([4.0, 1.0])), 0.5))     # ½ρ²λ₁
    0.5

    J. Moré, D. Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983) 553-572.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    g, h = gradient.detach().double().cpu().reshape(-1), hessian.detach().double().cpu()
    values, basis = torch.linalg.eigh((h + h.T) / 2)
    b, top = basis.T @ g, float(values[-1])
    low = max(top, 0.0)
    size = max(float(values.abs().max()), float(g.norm()) / rho, torch.finfo(torch.float64).tiny)
    e, hard = _at(low, values, b, size), False
    if float(e.norm()) > rho or bool((b[(low - values) <= 1e-14 * size].abs() > 1e-14 * size * rho).any()):
        lower, mu = low, low + float(b.norm()) / rho
        for _ in range(200):
            middle = (lower + mu) / 2
            lower, mu = (middle, mu) if float(_at(middle, values, b, 0.0).norm()) > rho else (lower, middle)
        e = _at(mu, values, b, 0.0)
    else:
        mu = low
        if top > 0:
            hard = True
            e[-1] += (rho**2 - float(e.norm()) ** 2) ** 0.5
    value = float(b @ e + 0.5 * (values * e * e).sum())
    return TrustRegion(value=value, maximizer=basis @ e, multiplier=mu, hard_case=hard, settings={"rho": rho})


def _at(mu: float, values: Tensor, b: Tensor, size: float) -> Tensor:
    """(μ − Λ)⁻¹ b, with zeros where the denominator vanishes."""
    gap = mu - values
    return torch.where(gap > 1e-14 * size, b / torch.where(gap > 0, gap, torch.ones_like(gap)), torch.zeros_like(b))
