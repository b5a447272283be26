"""Critical sharpness along an update, and the distance to the edge of stability."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import parallel, perturbed, vectors
from ..curvature import Hessian, eigenpairs
from ..evaluation import Pass
from ..objective import Objective
from ..results import Scalar
from .cautions import warn_of, warn_of_rounded_step


@dataclass(frozen=True, kw_only=True)
class CriticalSharpness(Scalar):
    """``value`` = λ_c = 2/η_c; ``ratio`` = η/η_c = λ_c η/2 for a learning rate η: 1 is the edge of rising loss."""

    critical_rate: float        # η_c: the smallest found step along the update at which the loss exceeds L(w)
    bracket: tuple[float, float]
    ratio: float
    evaluations: int
    data_stderr: float = math.nan   # over batches, along this update; nan where there are fewer than five


def critical_sharpness(objective: Objective, update: Sequence[Tensor] | None = None, *, lr: float | None = None,
                       rtol: float = 0.02, most: int = 60) -> CriticalSharpness:
    """λ_c = 2/η_c, where η_c is the smallest step η along an update Δ with L(w − ηΔ) > L(w).

    On a quadratic λ_c = ΔᵀHΔ / gᵀΔ, so with Δ = g the curvature ĝᵀHĝ ≤ λ₁. Doubling or halving from ``lr`` brackets
    η_c and bisection narrows it: forward passes only, about 6 to 12, no second derivative.

    Args:
        objective: L.
        update: Δ, tensors in the order of the parameters that require a gradient, so that the weights become w − ηΔ
            (``update_of(optimizer)`` gives an optimizer's own). The gradient by default, one backward pass.
        lr: η, where the search begins and what ``ratio`` is of; nan in the ratio where it is not given.
        rtol: width of the bracket at the end, relative.
        most: evaluations at most.

    Returns:
        ``.value .critical_rate .bracket .ratio .evaluations .data_stderr`` (over batches, along this update, where
        there are five or more). Where no step along Δ lowers the loss, λ_c is inf; where
        the loss never exceeds L(w), 0.

    Raises:
        ValueError: tensors of other shapes, or a zero or non-finite update.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(8, 1), (model.weight.detach() - 1).expand(8, 1)
    >>> s = critical_sharpness(Objective(model, torch.nn.MSELoss(), data), lr=0.5)      # H = 2
    >>> abs(s.value - 2) < 0.05, abs(s.ratio - 0.5) < 0.02
    (True, True)
    """
    w = objective.parameters
    with objective.session(check=True):
        at = objective.evaluate(gradient=update is None)
        direction = at.gradient if update is None else [parallel.local(t.detach()) for t in update]
        if [t.shape for t in direction] != [parallel.local(p.detach()).shape for p in w]:
            raise ValueError(f"the update needs one tensor for each of the {len(w)} parameters that require a gradient")
        loss, length, realised = float(at.loss), float(vectors.Space(w).norm(direction)), []
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"the update has length {length}")
        seen: dict[float, Pass] = {0.0: at}

        def rise(eta: float) -> float:
            nonlocal realised
            with perturbed.displaced(w, direction, -eta) as displacement:
                seen[eta] = objective.evaluate()
            realised = displacement.realised
            return float(seen[eta].loss) - loss

        noise = 4 * at.eps * abs(loss)
        low, high, used = _bracket(rise, noise, lr or 1e-2 / length, most)
        while high - low > rtol * high and used < most and 0 < low and math.isfinite(high):
            middle = math.sqrt(low * high)
            low, high, used = (low, middle, used + 1) if not rise(middle) <= 0 else (middle, high, used + 1)
        error = _data_stderr(objective, seen, low, high)
    warn_of(objective, at)
    warn_of_rounded_step(objective, realised)       # of the last step looked at
    rate = math.sqrt(low * high) if 0 < low and math.isfinite(high) else (0.0 if low == 0 else math.inf)
    value = 2 / rate if rate else math.inf
    return CriticalSharpness(value=value, critical_rate=rate, bracket=(low, high), evaluations=used,
                             data_stderr=error, ratio=math.nan if lr is None else value * lr / 2,
                             settings={"lr": lr, "rtol": rtol, "mode": objective.mode,
                                       "update": "gradient" if update is None else "given"})


def _data_stderr(objective: Objective, seen: Mapping[float, Pass], low: float, high: float) -> float:
    """The standard error of 2/η_c over batches: that of the rise at η_c by the slope of the rise there."""
    if not (0 < low and math.isfinite(high)):
        return math.nan
    at, below, above = seen[0.0], seen[low], seen[high]
    rises = [b - a for a, b in zip(at.losses, above.losses, strict=True)]
    slope = (above.loss - below.loss).item() / (high - low)
    return 2 / (low * high) * objective.data_stderr(rises, at.weights) / slope if slope > 0 else math.nan


def _bracket(rise: Callable[[float], float], noise: float, eta: float, most: int) -> tuple[float, float, int]:
    """η with a loss not above L(w) and one above it, by doubling or halving; 0 or inf where there is none.

    Halving ends where the rise is within the rounding of the loss.
    """
    used, change = 1, rise(eta)
    if not change <= 0:
        while used < most:
            used, change = used + 1, rise(eta / 2)
            if abs(change) <= noise:
                return 0.0, eta, used
            if change < 0:
                return eta / 2, eta, used
            eta /= 2
        return 0.0, eta, used
    while used < most:
        used += 1
        if not rise(2 * eta) <= 0:
            return eta, 2 * eta, used
        eta *= 2
    return eta, math.inf, used


def update_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Δ = (w − w')/η for the w' that the optimizer's next step would give from the gradients in ``.grad`` now.

    The step is taken by a copy of the optimizer on copies of the weights: one more set of weights and of its state
    for the moment. η is the learning rate of the first group. Zero where a parameter has no gradient.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> model.weight.grad = torch.ones(1, 1)
    >>> [round(t.item(), 4) for t in update_of(torch.optim.SGD(model.parameters(), lr=0.1))]
    [1.0]
    """
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in state}       # deepcopy does not know sharded tensors
    twin = copy.deepcopy(optimizer, memo | {id(p): p.detach().clone().requires_grad_(p.requires_grad) for p in owned})
    copies = [p for group in twin.param_groups for p in group["params"]]
    for p, q in zip(owned, copies, strict=True):
        q.grad = None if p.grad is None else p.grad.detach().clone()
    type(optimizer).step(twin)      # type(...): a scheduler wraps the method of the original instance
    lr = float(optimizer.param_groups[0]["lr"])
    moved = {id(p): (p.detach() - q.detach()) / lr for p, q in zip(owned, copies, strict=True)}
    wanted = owned if parameters is None else list(parameters)
    return [moved[id(p)] if id(p) in moved else torch.zeros_like(p) for p in wanted]


@dataclass(frozen=True, kw_only=True)
class EdgeOfStability(Scalar):
    """``value`` = λ₁ / λ_edge; above 1 the top direction is unstable for a fixed quadratic."""

    largest_eigenvalue: float
    edge: float         # 2/η, (2 + 2β)/η with momentum, or SAM's own
    residual: float


def edge_of_stability(objective: Objective, lr: float, *, momentum: float = 0.0, rho: float = 0.0, tol: float = 1e-2,
                      seed: int | torch.Generator = 0) -> EdgeOfStability:
    """λ₁ / λ_edge: λ₁ η/2 for gradient descent, λ₁ η/(2 + 2β) with heavy-ball momentum β.

    With SAM's radius ρ the edge is (‖g‖/2ρ)(√(1 + 8ρ/(η‖g‖)) − 1), below 2/η and falling with the gradient.

    Args:
        objective: L; the edge is that of full-batch descent on exactly this loss.
        lr: η.
        momentum: β of heavy-ball momentum; with ρ it must be 0.
        rho: SAM's radius.
        tol: of the eigenvalue, relative.

    Raises:
        ValueError: lr not positive, or momentum together with rho.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(8, 1), torch.zeros(8, 1)
    >>> round(edge_of_stability(Objective(model, torch.nn.MSELoss(), data), lr=0.5).value, 4)      # λ₁ = 2
    0.5

    J. Cohen et al., arXiv 2103.00065; P. Long, P. Bartlett, arXiv 2309.12488 (SAM).
    """
    if not lr > 0 or not 0 <= momentum < 1 or rho < 0 or rho and momentum:
        raise ValueError(f"lr must be positive, momentum in [0, 1), rho at least 0 and not together with momentum; got "
                         f"lr={lr}, momentum={momentum}, rho={rho}")
    found = eigenpairs(Hessian(objective), 1, tol=tol, seed=seed)
    edge = (2 + 2 * momentum) / lr
    if rho:
        length = float(vectors.Space(objective.parameters).norm(objective.evaluate(gradient=True).gradient))
        edge = 4 / lr / (1 + math.sqrt(1 + 8 * rho / (lr * length))) if length else 0.0
    value = found.largest / edge if edge else math.inf
    return EdgeOfStability(value=value, largest_eigenvalue=found.largest, edge=edge,
                           residual=float(found.residuals[-1]),
                           settings={"lr": lr, "momentum": momentum, "rho": rho, "mode": objective.mode})
