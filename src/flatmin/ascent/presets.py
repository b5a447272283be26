"""Named algorithms: a name, a paper, and a point in the product of direction, rule and cadence."""

from __future__ import annotations

from typing import Any

from torch import nn

from .directions import Adaptive
from .sharpener import Sharpener


def sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    """SAM: ε = ρ g/‖g‖ (Foret et al., arXiv:2010.01412, eq. 2)."""
    return Sharpener(model, rho=rho, **options)


def asam(model: nn.Module, *, rho: Any = 0.5, eta: float = 0.01, **options: Any) -> Sharpener:
    """ASAM: ε = ρ T²g/‖T g‖, T = |w| + η on weights (Kwon et al., arXiv:2102.11600, eq. 5)."""
    return Sharpener(model, rho=rho, direction=Adaptive(eta=eta), **options)
