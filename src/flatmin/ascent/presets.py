"""Named algorithms: a name, a paper, and a point in the product of direction, rule and cadence.

Each takes the model, its own numbers and any option of :class:`flatmin.Sharpener`. Defaults are the paper's or, where
that was not available, its authors' or a third party's code's, as the table in the documentation says.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .cadences import Every, Reuse
from .directions import (
    Adaptive,
    Fisher,
    Friendly,
    Gradient,
    Layerwise,
    Momentum,
    Preconditioned,
    Random,
    RandomFraction,
)
from .parameters import is_normalization
from .rules import Functional, Plain, Selected, SurrogateGap, Weighted
from .sharpener import Sharpener


def sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    """SAM: ε = ρ g/‖g‖ (Foret et al., arXiv:2010.01412, eq. 2)."""
    return Sharpener(model, rho=rho, **options)


def asam(model: nn.Module, *, rho: Any = 0.5, eta: float = 0.01, **options: Any) -> Sharpener:
    """ASAM: ε = ρ T²g/‖T g‖, T = |w| + η on weights, 1 on biases (Kwon et al., arXiv:2102.11600)."""
    return Sharpener(model, rho=rho, direction=Adaptive(eta=eta), **options)


def esam(model: nn.Module, *, rho: Any = 0.1, beta: float = 0.5, gamma: float = 0.5, seed: int = 0,
         **options: Any) -> Sharpener:
    """ESAM: ε on a random fraction β of the tensors, descent on the fraction γ of samples whose loss rose most
    (Du et al., arXiv:2110.03141)."""
    rule = Selected(gamma) if gamma < 1 else Plain()
    return Sharpener(model, rho=rho, direction=RandomFraction(Gradient(), beta, seed), rule=rule, **options)


def looksam(model: nn.Module, *, rho: Any = 0.05, k: int = 5, alpha: float = 0.7, **options: Any) -> Sharpener:
    """LookSAM: SAM every k steps, g + α (‖g‖/‖g_v‖) g_v between (Liu et al., arXiv:2203.02714)."""
    return Sharpener(model, rho=rho, cadence=Every(k, Reuse(alpha)), **options)


def layer_sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    """Layer-SAM: ε_j = ρ ‖w_j‖ g_j/‖g_j‖ for each tensor (Liu et al., arXiv:2203.02714)."""
    return Sharpener(model, rho=rho, direction=Layerwise(), **options)


def momentum_sam(model: nn.Module, *, optimizer: Any = None, rho: Any = 3.0, **options: Any) -> Sharpener:
    """Momentum-SAM: ε = −ρ v/‖v‖, one pass (Becker et al., arXiv:2401.12033)."""
    return Sharpener(model, rho=rho, direction=Momentum(), optimizer=optimizer, **options)


def fisher_sam(model: nn.Module, *, rho: Any = 0.1, eta: float = 1.0, **options: Any) -> Sharpener:
    """Fisher SAM: ε = ρ F⁻¹g/√(gᵀF⁻¹g), F = 1 + η g² (Kim et al., arXiv:2206.04920)."""
    return Sharpener(model, rho=rho, direction=Fisher(eta), **options)


def functional_sam(model: nn.Module, *, rho: Any = 0.1, **options: Any) -> Sharpener:
    """Functional-SAM: J(w + ε)ᵀ ∂L/∂z(w) (Singh et al., arXiv:2502.02407)."""
    return Sharpener(model, rho=rho, rule=Functional(), **options)


def preconditioned_sam(model: nn.Module, *, optimizer: Any = None, rho: Any = 0.1, power: float = 0.5,
                       norm: str = "l2", **options: Any) -> Sharpener:
    """Preconditioned SAM: ε = ρ M⁻¹g/‖M⁻¹g‖, M from Adam's second moment (Singh et al., arXiv:2502.02407)."""
    return Sharpener(model, rho=rho, direction=Preconditioned(power, norm=norm), optimizer=optimizer, **options)


def preconditioned_functional_sam(model: nn.Module, *, optimizer: Any = None, rho: Any = 0.1, power: float = 0.5,
                                  norm: str = "l2", **options: Any) -> Sharpener:
    """Preconditioned Functional-SAM: both (Singh et al., arXiv:2502.02407)."""
    return Sharpener(model, rho=rho, direction=Preconditioned(power, norm=norm), rule=Functional(),
                     optimizer=optimizer, **options)


def gsam(model: nn.Module, *, rho: Any = 0.6, alpha: float = 0.6, **options: Any) -> Sharpener:
    """GSAM: g_p − α g⊥ (Zhuang et al., arXiv:2203.08065); ρ may be ``RhoFollowsLearningRate``, as in the paper."""
    return Sharpener(model, rho=rho, rule=SurrogateGap(alpha), **options)


def friendly_sam(model: nn.Module, *, rho: Any = 0.2, sigma: float = 1.0, decay: float = 0.6,
                 **options: Any) -> Sharpener:
    """Friendly-SAM: ε along g − σ m, m the running mean of g (Li et al., arXiv:2403.12350)."""
    return Sharpener(model, rho=rho, direction=Friendly(sigma, decay), **options)


def wsam(model: nn.Module, *, rho: Any = 0.05, gamma: float = 0.9, **options: Any) -> Sharpener:
    """WSAM, coupled: a g_p + (1 − a) g, a = γ/(1 − γ) (Yue et al., arXiv:2305.15817)."""
    return Sharpener(model, rho=rho, rule=Weighted(gamma), **options)


def sam_on(model: nn.Module, *, rho: Any = 0.5, adaptive: bool = False, eta: float = 0.0,
           **options: Any) -> Sharpener:
    """SAM-ON: SAM (or ASAM, biases too) on normalization layers alone (Müller et al., arXiv:2306.04226)."""
    layers = [m for m in model.modules() if is_normalization(m) and any(True for _ in m.parameters(recurse=False))]
    if not layers:
        raise ValueError("sam_on perturbs normalization layers and this model has none with parameters: use sam")
    direction = Adaptive(eta, biases=True) if adaptive else Gradient()
    return Sharpener(model, rho=0.0, groups=[{"modules": layers, "rho": rho}], direction=direction, **options)


def random_sam(model: nn.Module, *, rho: Any = 0.05, seed: int = 0, **options: Any) -> Sharpener:
    """Random perturbation: ε = ρ z/‖z‖ with z normal, one pass (the control of arXiv:2206.06232)."""
    return Sharpener(model, rho=rho, direction=Random(seed), **options)


def unnormalized_sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    """USAM: ε = ρ g (Andriushchenko & Flammarion, arXiv:2206.06232)."""
    return Sharpener(model, rho=rho, direction=Gradient(normalized=False), **options)


PRESETS = {f.__name__: f for f in (
    sam, asam, esam, looksam, layer_sam, momentum_sam, fisher_sam, functional_sam, preconditioned_sam,
    preconditioned_functional_sam, gsam, friendly_sam, wsam, sam_on, random_sam, unnormalized_sam,
)}
"""Every preset by name."""
