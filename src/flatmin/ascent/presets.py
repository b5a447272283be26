"""Named algorithms: each a combination of a direction, a rule and a cadence, with its paper.

Each takes the model, its own numbers and any option of :class:`flatmin.Sharpener`. Defaults are the paper's or, where
that was not available, its authors' or a third party's code's, as the table in the documentation says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class Preset:
    """A named algorithm: ``build(model, ...)`` makes its sharpener, the rest says where it comes from."""

    name: str
    title: str
    formula: str  # of ε, or of the gradient where that is what differs from SAM
    authors: str
    arxiv: str  # the paper's number
    build: Callable[..., Sharpener]
    equation: str = ""  # its number in the paper
    note: str = ""

    def __str__(self) -> str:
        equation = f", {self.equation}" if self.equation else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.title}: {self.formula} ({self.authors}, arXiv:{self.arxiv}{equation}){note}."


CATALOGUE: dict[str, Preset] = {}
"""Every preset by name, with its paper."""

Build = TypeVar("Build", bound=Callable[..., Sharpener])


def _preset(title: str, formula: str, authors: str, arxiv: str, **more: str) -> Callable[[Build], Build]:
    """Enter a function into the catalogue, and the entry into its docstring."""

    def enter(build: Build) -> Build:
        preset = CATALOGUE[build.__name__] = Preset(build.__name__, title, formula, authors, arxiv, build, **more)
        build.__doc__ = str(preset)
        return build

    return enter


@_preset("SAM", "ε = ρ g/‖g‖", "Foret et al.", "2010.01412", equation="eq. 2")
def sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, **options)


@_preset("ASAM", "ε = ρ T²g/‖T g‖, T = |w| + η on weights, 1 on biases", "Kwon et al.", "2102.11600")
def asam(model: nn.Module, *, rho: Any = 0.5, eta: float = 0.01, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Adaptive(eta=eta), **options)


@_preset("ESAM", "ε on a random fraction β of the tensors, descent on the fraction γ of samples whose loss rose most",
         "Du et al.", "2110.03141")
def esam(model: nn.Module, *, rho: Any = 0.1, beta: float = 0.5, gamma: float = 0.5, seed: int = 0,
         **options: Any) -> Sharpener:
    rule = Selected(gamma) if gamma < 1 else Plain()
    return Sharpener(model, rho=rho, direction=RandomFraction(Gradient(), beta, seed), rule=rule, **options)


@_preset("LookSAM", "SAM every k steps, g + α (‖g‖/‖g_v‖) g_v between", "Liu et al.", "2203.02714")
def looksam(model: nn.Module, *, rho: Any = 0.05, k: int = 5, alpha: float = 0.7, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, cadence=Every(k, Reuse(alpha)), **options)


@_preset("Layer-SAM", "ε_j = ρ ‖w_j‖ g_j/‖g_j‖ for each tensor", "Liu et al.", "2203.02714")
def layer_sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Layerwise(), **options)


@_preset("Momentum-SAM", "ε = −ρ v/‖v‖, one pass", "Becker et al.", "2401.12033",
         note="the radius is the paper's; small networks need less, 0.3 to 1")
def momentum_sam(model: nn.Module, *, optimizer: Any = None, rho: Any = 3.0, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Momentum(), optimizer=optimizer, **options)


@_preset("Fisher SAM", "ε = ρ F⁻¹g/√(gᵀF⁻¹g), F = 1 + η g²", "Kim et al.", "2206.04920")
def fisher_sam(model: nn.Module, *, rho: Any = 0.1, eta: float = 1.0, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Fisher(eta), **options)


@_preset("Functional-SAM", "J(w + ε)ᵀ ∂L/∂z(w)", "Singh et al.", "2502.02407")
def functional_sam(model: nn.Module, *, rho: Any = 0.1, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, rule=Functional(), **options)


@_preset("Preconditioned SAM", "ε = ρ M⁻¹g/‖M⁻¹g‖, M from Adam's second moment", "Singh et al.", "2502.02407")
def preconditioned_sam(model: nn.Module, *, optimizer: Any = None, rho: Any = 0.1, power: float = 0.5,
                       norm: str = "l2", **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Preconditioned(power, norm=norm), optimizer=optimizer, **options)


@_preset("Preconditioned Functional-SAM", "J(w + ε)ᵀ ∂L/∂z(w), ε = ρ M⁻¹g/‖M⁻¹g‖", "Singh et al.", "2502.02407")
def preconditioned_functional_sam(model: nn.Module, *, optimizer: Any = None, rho: Any = 0.1, power: float = 0.5,
                                  norm: str = "l2", **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Preconditioned(power, norm=norm), rule=Functional(),
                     optimizer=optimizer, **options)


@_preset("GSAM", "g_p − α g⊥", "Zhuang et al.", "2203.08065",
         note="ρ may be ``RhoFollowsLearningRate``, as in the paper")
def gsam(model: nn.Module, *, rho: Any = 0.6, alpha: float = SurrogateGap.alpha, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, rule=SurrogateGap(alpha), **options)


@_preset("Friendly-SAM", "ε along g − σ m, m the running mean of g", "Li et al.", "2403.12350")
def friendly_sam(model: nn.Module, *, rho: Any = 0.2, sigma: float = Friendly.sigma, decay: float = Friendly.decay,
                 **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Friendly(sigma, decay), **options)


@_preset("WSAM, coupled", "a g_p + (1 − a) g, a = γ/(1 − γ)", "Yue et al.", "2305.15817")
def wsam(model: nn.Module, *, rho: Any = 0.05, gamma: float = 0.9, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, rule=Weighted(gamma), **options)


@_preset("SAM-ON", "SAM (or ASAM, biases too) on normalization layers alone", "Müller et al.", "2306.04226")
def sam_on(model: nn.Module, *, rho: Any = 0.5, adaptive: bool = False, eta: float = 0.0,
           **options: Any) -> Sharpener:
    layers = [m for m in model.modules() if is_normalization(m) and any(True for _ in m.parameters(recurse=False))]
    if not layers:
        raise ValueError("sam_on perturbs normalization layers and this model has none with parameters: use sam")
    direction = Adaptive(eta, biases=True) if adaptive else Gradient()
    return Sharpener(model, rho=0.0, groups=[{"modules": layers, "rho": rho}], direction=direction, **options)


@_preset("Random perturbation", "ε = ρ z/‖z‖ with z normal, one pass", "Andriushchenko & Flammarion", "2206.06232",
         note="the paper's control")
def random_sam(model: nn.Module, *, rho: Any = 0.05, seed: int = 0, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Random(seed), **options)


@_preset("USAM", "ε = ρ g", "Andriushchenko & Flammarion", "2206.06232")
def unnormalized_sam(model: nn.Module, *, rho: Any = 0.05, **options: Any) -> Sharpener:
    return Sharpener(model, rho=rho, direction=Gradient(normalized=False), **options)


PRESETS: dict[str, Callable[..., Sharpener]] = {name: preset.build for name, preset in CATALOGUE.items()}
"""The function of every preset by name."""
