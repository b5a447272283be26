"""How much the loss rises along the gradient, beside what its first two derivatives say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import parallel, perturbed, vectors
from ..curvature import Hessian
from ..objective import Objective
from ..results import PerBatch, Scalar
from .cautions import warn_of, warn_of_rounded_step, warn_of_rounding


@dataclass(frozen=True, kw_only=True)
class OneStep(Scalar):
    """``value`` = L(w + ρĝ) − L(w), with its first- and second-order parts; ``remainder`` is the rest."""

    first_order: float
    second_order: float | None
    loss: float
    perturbed_loss: float
    gradient_norm: float
    radius: float           # ‖Δw‖ really taken: less than ρ where half precision rounds it away
    data_stderr: float = math.nan           # over batches, for this step; nan where there are fewer than five
    expansion_holds: bool | None = None     # |remainder| ≤ ½(|first order| + |second order|); None without the latter
    warnings: tuple[str, ...] = ()
    rises: tuple[float, ...] = field(default=(), repr=False)        # of this rank's batches
    weights: tuple[float, ...] = field(default=(), repr=False)      # how many terms each is a mean of

    @property
    def per_batch(self) -> PerBatch:
        """The rise on each of this rank's batches."""
        return PerBatch(values=self.rises, weights=self.weights)

    @property
    def remainder(self) -> float:
        """value − first_order − second_order, which falls eightfold when ρ is halved; nan without a second order."""
        return math.nan if self.second_order is None else self.value - self.first_order - self.second_order

    @property
    def curvature(self) -> float:
        """ĝᵀHĝ, the curvature along the gradient; nan without a second order."""
        return math.nan if self.second_order is None else 2 * self.second_order / self.settings["rho"] ** 2

    @property
    def parts(self) -> dict[str, float]:
        """The share of the first order, the second order and the remainder in the sum of their sizes."""
        sizes = {"first_order": abs(self.first_order), "second_order": abs(self.second_order or 0.0),
                 "remainder": abs(self.remainder) if self.second_order is not None else 0.0}
        total = math.fsum(sizes.values())
        return {name: size / total if total else math.nan for name, size in sizes.items()}

    def __str__(self) -> str:
        """The value as the sum of its parts, to the decimals that give the largest of them three digits."""
        error = f", data ± {self.data_stderr:.2g}" if math.isfinite(self.data_stderr) else ""
        if self.second_order is None:
            return f"{self.value:.3g} (first order {self.first_order:.3g}){error}"
        terms = ((self.first_order, "first order"), (self.second_order, "second order"), (self.remainder, "rest"))
        size = max(abs(self.value), *(abs(term) for term, _ in terms))
        digits = max(0, 2 - math.floor(math.log10(size))) if math.isfinite(size) and 1e-5 <= size < 1e5 else None
        shown = [f"{x:.3g}" if digits is None else f"{x:.{digits}f}" for x in (self.value, *(x for x, _ in terms))]
        parts = " + ".join(f"{x} ({name})" for x, (_, name) in zip(shown[1:], terms, strict=True))
        return f"{shown[0]} = {parts.replace('+ -', '− ')}{error}"

    @property
    def dominant(self) -> str:
        """Which part is the largest: "first_order", "second_order" or "remainder"; "none" where all are 0.

        "remainder" wherever the expansion does not hold.
        """
        if self.expansion_holds is False:
            return "remainder"
        parts = self.parts
        return "none" if any(map(math.isnan, parts.values())) else max(parts, key=lambda name: parts[name])


def scaled_radius(epsilon: float, size: int) -> float:
    """ρ = ε √(d / 10⁶): the radius for d parameters that moves each by as much, in the mean square, as ε does for 10⁶.

    A step of length ρ moves a coordinate by ρ/√d in the root mean square; this holds ε/1000 fixed. It is a convention
    of this library.

    >>> scaled_radius(0.01, 1_000_000), round(scaled_radius(0.01, 1_500_000_000), 3)
    (0.01, 0.387)
    """
    return epsilon * math.sqrt(size / 1e6)


def one_step(objective: Objective, rho: float = 0.05, *, second_order: bool = True,
             adaptive_epsilon: bool = False) -> OneStep:
    """One-step sharpness, the rise of the loss over a step of length ρ along the gradient.

    S = L(w + ρĝ) − L(w) = ρ‖g‖ + ½ρ² ĝᵀHĝ + O(ρ³), with ĝ = g / ‖g‖. It is not ½ρ² λ₁: the first term leads wherever
    ‖g‖ > ½ρ ĝᵀHĝ, and ĝ is seldom the top eigenvector.

    Args:
        objective: L; the losses are summed over its batches in float64.
        rho: the length of the step, > 0.
        second_order: also compute ½ρ² ĝᵀHĝ, by one Hessian-vector product. Without it the measure takes two forward
            passes and a backward one, and the memory of weights, one gradient and the activations.
        adaptive_epsilon: take ``rho`` as ε and scale it by model size, ρ = ε √(d / 10⁶) (``scaled_radius``).

    Returns:
        ``.value .first_order .second_order .remainder .parts .dominant .expansion_holds .loss .perturbed_loss
        .gradient_norm .radius .data_stderr``. Where g = 0 there is no direction, and all parts are 0.
        ``data_stderr`` is the standard error over batches of the rise for this step (the direction is not drawn anew),
        where the data are five batches or more. ``expansion_holds`` is False where the remainder is more than half of
        the two orders together, so that they do not explain the value.

    Raises:
        ValueError: rho not positive.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(8, 1), (model.weight.detach() - 1).expand(8, 1)
    >>> s = one_step(Objective(model, torch.nn.MSELoss(), data), rho=0.1)       # L = (u + 1)², g = 2, H = 2
    >>> round(s.value, 4), round(s.first_order, 4), round(s.second_order, 4), s.dominant
    (0.21, 0.2, 0.01, 'first_order')

    P. Foret et al., arXiv 2010.01412.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    w = objective.parameters
    space = vectors.Space(w)
    epsilon, rho = rho, scaled_radius(rho, _size(w)) if adaptive_epsilon else rho
    with objective.session(check=True):
        at = objective.evaluate(gradient=True)
        length = space.norm(at.gradient)
        second, moved, realised = None, at, None
        if second_order:
            second = 0.5 * rho**2 * _curvature(objective, space, at.gradient, length) if length > 0 else 0.0
        if not bool(length == 0):
            with stepped(w, at.gradient, rho / length) as displacement:
                moved = objective.evaluate()
            realised = displacement.realised
        rises = [b - a for a, b in zip(at.losses, moved.losses, strict=True)]
        error = objective.data_stderr(rises, at.weights)
    rise, loss, first = float(moved.loss - at.loss), float(at.loss), rho * float(length)
    found = warn_of(objective, at, value=rise, data_stderr=error)
    ratio, rounded = warn_of_rounded_step(objective, realised or ())
    found += rounded or warn_of_rounding(at, rise, expected=float(length))
    holds = None if second is None else not abs(rise - first - second) > (abs(first) + abs(second)) / 2
    settings = {"rho": rho, "mode": objective.mode, "samples": at.samples}
    return OneStep(value=rise, first_order=first, second_order=second, loss=loss, data_stderr=error,
                   expansion_holds=holds, radius=0.0 if realised is None else rho * ratio,
                   perturbed_loss=float(moved.loss), gradient_norm=float(length), warnings=tuple(found),
                   rises=tuple(rises), weights=at.weights,
                   settings=settings | ({"epsilon": epsilon} if adaptive_epsilon else {}))


@contextmanager
def stepped(w: Sequence[Tensor], direction: list[Tensor], scale: Tensor) -> Iterator[perturbed.Displacement]:
    """Inside, the weights are w + scale · direction; afterwards they are restored bit for bit.

    ``direction`` holds w meanwhile, so that nothing is allocated; its values are lost.
    """
    displacement = perturbed.Displacement()
    try:
        with torch.no_grad():
            displacement.move([parallel.local(p.detach()) for p in w], direction, scale, own=True)
        yield displacement
    finally:
        displacement.restore()


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Scalar):
    """``value`` = ρ‖g‖, the first-order rise of the loss; nothing is moved."""

    gradient_norm: float
    loss: float


def first_order(objective: Objective, rho: float = 1.0) -> FirstOrder:
    """ρ‖∇L(w)‖, the leading part of one-step sharpness, from one forward and one backward pass.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(8, 1), (model.weight.detach() - 1).expand(8, 1)
    >>> round(first_order(Objective(model, torch.nn.MSELoss(), data), rho=0.1).value, 4)
    0.2
    """
    with objective.session(check=True):
        at = objective.evaluate(gradient=True)
        length = float(vectors.Space(objective.parameters).norm(at.gradient))
    warn_of(objective, at)
    return FirstOrder(value=rho * length, gradient_norm=length, loss=float(at.loss),
                      settings={"rho": rho, "mode": objective.mode, "samples": at.samples})


def _size(w: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in w)


def _curvature(objective: Objective, space: vectors.Space, g: list[Tensor], length: Tensor) -> float:
    """ĝᵀHĝ."""
    direction = [t.to(p.dtype) for t, p in zip(torch._foreach_div(g, length.to(g[0].device)), space.parameters,
                                               strict=True)]
    product = [parallel.local(t) for t in Hessian(objective).matvec(direction)]
    return float(space.dot(direction, product))

