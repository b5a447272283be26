"""The Gauss-Newton matrix, and the rest of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..evaluation import WeightedBatch
from ..objective import Objective
from .double_backward import derivative_of_gradient, differentiable_gradient
from .finite_differences import Differences
from .functional import of_parameters
from .linearization import ZERO, Linearization, LinearMap, Parts
from .objective_operator import ObjectiveOperator, Parameters, Product
from .output_differences import (
    FrozenDifference,
    OutputDifference,
    OutputHessian,
    TangentDifference,
    outputs_and_loss,
)


def GaussNewton(objective: Objective, *, parameters: Parameters = None, product: Product = "auto") -> ObjectiveOperator:
    """G = Σ_b n_b Jᵀ (∂²L_b/∂z²) J / Σ_b n_b, with J = ∂z/∂w the Jacobian of the outputs z.

    The part of the Hessian that goes through the curvature of the loss in the outputs (the *logit* path); positive
    semi-definite for losses that are convex in z. Exact and matrix-free: u = Jv, then the second derivative of the loss
    at z, then Jᵀ. z is the tensor that the model returns, or its ``logits``.

    Args:
        objective: L.
        parameters: only a block: names of parameters or of modules, or modules.
        product: "cached" (graphs are kept while an algorithm runs), "recomputed", "forward" (Jv by forward
            differentiation), or "finite_difference": Jv = (z(w + hv) − z(w − hv)) / 2h, the rest as before, with the
            relative error estimated in ``error`` and in records. "auto": as for ``Hessian``.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> G = GaussNewton(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1))))
    >>> G.dense().tolist()                          # linear in w: G = H
    [[1.0, 0.0], [0.0, 4.0]]
    """
    return ObjectiveOperator(objective, _GAUSS_NEWTON, parameters=parameters, product=product)


def FunctionalPart(objective: Objective, *, parameters: Parameters = None,
                   product: Product = "auto") -> ObjectiveOperator:
    """H − G = Σ_c (∂L/∂z_c) ∇²z_c: the part of the Hessian from the curvature of the model (the *functional* path).

    It is the Hessian of ⟨∂L/∂z held fixed, z(w)⟩, exact where the loss depends on w through z alone.

    Args:
        objective: L.
        parameters, product: as for ``GaussNewton`` (without "forward"); "finite_difference" is one of the gradients of
            ⟨∂L/∂z, z(w)⟩.
    """
    return ObjectiveOperator(objective, _FUNCTIONAL_PART, parameters=parameters, product=product)


def loss_curvature(z: Tensor, loss: Tensor) -> OutputHessian:
    """u ↦ (∂²loss/∂z²) u."""
    c, = torch.autograd.grad(loss, z, create_graph=True)

    def output_hessian(u: Tensor) -> Tensor:
        if not c.requires_grad:
            return torch.zeros_like(u)
        out, = torch.autograd.grad(c, z, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if out is None else out

    return output_hessian


def sandwich(z: Tensor, w: list[nn.Parameter], make: Callable[[], OutputHessian]) -> LinearMap:
    """v ↦ Jᵀ M J v. Jv is the derivative along v of u ↦ Jᵀu, which is linear: two reverse passes on a kept graph."""
    if not z.requires_grad:
        return ZERO
    output_hessian = make()
    u = torch.zeros_like(z, requires_grad=True)
    roots, used = differentiable_gradient(z, w, u)

    def product(v: Sequence[Tensor], retain_graph: bool) -> Parts:
        jv, = torch.autograd.grad(roots, u, [v[i] for i in used], retain_graph=True)
        return torch.autograd.grad(z, w, output_hessian(jv), retain_graph=retain_graph, allow_unused=True)

    return LinearMap(product)


def _reverse(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    z, loss = outputs_and_loss(batch)
    return sandwich(z, w, lambda: loss_curvature(z, loss))


def _forward(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    logits, at = of_parameters(batch, w, lambda t: t.logits(t.outputs()))
    z, loss = outputs_and_loss(batch)
    if not z.requires_grad:
        return ZERO
    output_hessian = loss_curvature(z, loss)

    def product(v: Sequence[Tensor], retain_graph: bool) -> Parts:
        jv = torch.func.jvp(logits, (at,), (tuple(v),))[1]
        return torch.autograd.grad(z, w, output_hessian(jv), retain_graph=retain_graph, allow_unused=True)

    return LinearMap(product)


def _functional(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    z, loss = outputs_and_loss(batch)
    if not z.requires_grad:
        return ZERO
    c, = torch.autograd.grad(loss, z, retain_graph=True)
    return derivative_of_gradient((c * z).sum(), w)


_GAUSS_NEWTON = Linearization(
    name="GaussNewton", reverse=_reverse, forward=_forward,
    differences=lambda operator, objective: Differences(operator, objective, OutputDifference(
        operator, objective, TangentDifference(lambda _, z, loss: loss_curvature(z, loss)))))

_FUNCTIONAL_PART = Linearization(
    name="FunctionalPart", reverse=_functional,
    differences=lambda operator, objective: Differences(operator, objective, OutputDifference(
        operator, objective, FrozenDifference())))
