"""Which gradient is kept? A rule says which passes a step takes, and how their two gradients are combined.

g is the gradient at w, g_p the one of the last pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from .. import vectors
from ..vectors import Space
from .passes import (
    FixedOutputGradients,
    LargestRises,
    LossGradient,
    OutputGradients,
    Pass,
    RecordOutputGradients,
    SampleLosses,
)


class Rule(Protocol):
    """``rule(space, perturbed, gradient)`` turns g_p in place into the gradient to descend on.

    ``first`` runs at w, ``second`` at w + ε, ``third``, if there is one, at w again. ``needs_gradient``: g is kept for
    the call.
    """

    @property
    def first(self) -> Pass: ...
    @property
    def second(self) -> Pass: ...
    @property
    def third(self) -> Pass | None: ...
    @property
    def needs_gradient(self) -> bool: ...

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None: ...


@final
@dataclass(frozen=True)
class Plain:
    """∇L(w + ε) (arXiv:2010.01412, eq. 3)."""

    first = LossGradient()
    second = LossGradient()
    third = None
    needs_gradient = False

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        pass


@final
@dataclass(frozen=True)
class Functional:
    """J(w + ε)ᵀ ∂L/∂z(w): the output gradient of the first pass through the network at w + ε (arXiv:2502.02407).

    To first order it descends on L + ρ ε̂ᵀ(H − G)ε̂: the functional part of sharpness, without the part that confident
    outputs alone can lower. The equation is derived here; the paper's text was not available beyond its abstract.
    """

    first = RecordOutputGradients()
    second = FixedOutputGradients()
    third = None
    needs_gradient = False

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        pass


@final
@dataclass(frozen=True)
class LogitOnly:
    """J(w)ᵀ ∂L/∂z(w + ε): the mirror of the functional rule, for ablations; costs a third forward."""

    first = LossGradient()
    second = OutputGradients()
    third = FixedOutputGradients()
    needs_gradient = False

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        pass


@final
@dataclass(frozen=True)
class SurrogateGap:
    """g_p − α g⊥, where g⊥ is the part of g orthogonal to g_p (GSAM, arXiv:2203.08065).

    Lowers the gap L(w + ε) − L(w) without raising L(w + ε). ``alpha`` = 0 is SAM; 0.6 is the authors' setting for
    ViT-B/32 on ImageNet.
    """

    alpha: float = 0.6
    first = LossGradient()
    second = LossGradient()
    third = None
    needs_gradient = True

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        along = space.share(gradient, perturbed)
        vectors.combine(1 + self.alpha * along, perturbed, -self.alpha, gradient)


@final
@dataclass(frozen=True)
class Weighted:
    """a g_p + (1 − a) g with a = γ/(1 − γ) (WSAM, arXiv:2305.15817, in its coupled form).

    γ = ½ is SAM, γ = 0 the plain gradient. The paper's default, decoupled form adds the sharpness part to the weights
    after the base optimizer's step; that is not a gradient, so adaptive base optimizers differ from it.
    """

    gamma: float = 0.9
    first = LossGradient()
    second = LossGradient()
    third = None
    needs_gradient = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), got {self.gamma}")

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        a = self.gamma / (1 - self.gamma)
        vectors.combine(a, perturbed, 1 - a, gradient)


@final
@dataclass(frozen=True)
class Selected:
    """∇ of the mean loss at w + ε over the samples whose loss rose most (ESAM's data selection, arXiv:2110.03141).

    Of a batch of n the ⌊γ n⌋ samples (at least one) with the largest l_i(w + ε) − l_i(w) are kept. ``forward`` takes
    a subset, ``slice(None)`` or an index tensor, and yields one loss a sample:
    ``backward(lambda s: cross_entropy(model(x[s]), y[s], reduction="none"))``.
    """

    gamma: float = 0.5
    first = SampleLosses()
    third = None
    needs_gradient = False

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {self.gamma}")

    @property
    def second(self) -> Pass:
        return LargestRises(self.gamma)

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        pass
