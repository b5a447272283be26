"""How much the loss rises along the gradient, beside what its first two derivatives say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import perturbed, vectors
from ..objective import Objective
from ..results import Scalar


@dataclass(frozen=True, kw_only=True)
class OneStep(Scalar):
    """``value`` = L(w + ρĝ) − L(w), with the parts it is made of; ``remainder`` is what the two do not explain."""

    first_order: float
    second_order: float | None
    loss: float
    perturbed_loss: float
    gradient_norm: float

    @property
    def remainder(self) -> float:
        """value − first_order − second_order, which falls eightfold when ρ is halved; nan without a second order."""
        return math.nan if self.second_order is None else self.value - self.first_order - self.second_order


def one_step(objective: Objective, rho: float = 0.05, *, second_order: bool = True) -> OneStep:
    """One-step sharpness, the rise of the loss over a step of length ρ along the gradient.

    S = L(w + ρĝ) − L(w) = ρ‖g‖ + ½ρ² ĝᵀHĝ + O(ρ³), with ĝ = g / ‖g‖. It is not ½ρ² λ₁: the first term leads wherever
    ‖g‖ > ½ρ ĝᵀHĝ, and ĝ is seldom the top eigenvector.

    Args:
        objective: L; the losses are summed over its batches in float64.
        rho: the length of the step, > 0.
        second_order: also compute ½ρ² ĝᵀHĝ, by one product with the Hessian.

    Returns:
        ``.value .first_order .second_order .remainder .loss .perturbed_loss .gradient_norm``. Two forward passes and a
        backward one, and the product. Where g = 0 there is no direction, and all parts are 0.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(1, 1), model.weight.detach() - 1))
    >>> s = one_step(objective, rho=0.1)              # L = (u + 1)², g = 2, H = 2
    >>> round(s.value, 4), round(s.first_order, 4), round(s.second_order, 4)
    (0.21, 0.2, 0.01)
    """
    from ..curvature import Hessian

    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    w = objective.parameters
    space = vectors.Space(w)
    with objective.session():
        loss, g = objective.trainable_gradient()
        g = [vectors.local(t) for t in g]
        length = space.norm(g)
        second = None
        if length > 0:
            vectors.scale(1 / length, g)
            if second_order:
                second = 0.5 * rho**2 * float(space.dot(g, Hessian(objective).matvec(g)))
            with perturbed.displaced(w, g, rho):
                moved = objective.value()
        else:
            moved, second = loss, 0.0 if second_order else None
    return OneStep(value=float(moved - loss), first_order=rho * float(length), second_order=second, loss=float(loss),
                   perturbed_loss=float(moved), gradient_norm=float(length),
                   settings={"rho": rho, "mode": objective.mode})
