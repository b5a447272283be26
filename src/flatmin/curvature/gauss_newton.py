"""The Gauss-Newton matrix, and what the Hessian has beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..objective import Objective, WeightedBatch
from .fallback import Inexact
from .hessian import derivative_of_gradient, differentiable_gradient
from .outputs import FrozenDifferences, OutputHessian, TangentDifferences, outputs_and_loss
from .products import LinearMap, Product, on_module


class GaussNewton(Inexact):
    """G = Σ_b n_b Jᵀ (∂²L_b/∂z²) J / Σ_b n_b, with J = ∂z/∂w the Jacobian of the outputs z.

    The part of the Hessian that goes through the curvature of the loss in the outputs (the *logit* path); positive
    semi-definite for losses that are convex in z. Exact and matrix-free: u = Jv, then the second derivative of the loss
    at z, then Jᵀ. z is the tensor that the model returns, or its ``logits``.

    Args:
        objective: L.
        parameters: only a block: names of parameters or of modules, or modules.
        product: "cached" (graphs stay while an algorithm runs), "recomputed", "forward" (Jv by forward
            differentiation), or "finite_difference": Jv = (z(w + hv) − z(w − hv)) / 2h, the rest as before, with the
            relative error of the product estimated in ``error`` and in records. "auto": as for ``Hessian``.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> G = GaussNewton(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1))))
    >>> G.dense().tolist()                          # linear in w: G = H
    [[1.0, 0.0], [0.0, 4.0]]
    """

    def __init__(self, objective: Objective, *, parameters: str | nn.Module | Sequence[str | nn.Module] | None = None,
                 product: Product = "auto"):
        super().__init__(objective, _forward if product == "forward" else _linearize,
                         lambda operator: TangentDifferences(operator, lambda _, z, loss: loss_curvature(z, loss)),
                         parameters=parameters, product=product, products=("auto", "cached", "recomputed", "forward"))


class FunctionalPart(Inexact):
    """H − G = Σ_c (∂L/∂z_c) ∇²z_c: the part of the Hessian from the curvature of the model (the *functional* path).

    It is the Hessian of ⟨∂L/∂z held fixed, z(w)⟩, exact where the loss depends on w through z alone.

    Args:
        objective: L.
        parameters, product: as for ``GaussNewton`` (without "forward"); "finite_difference" is one of the gradients of
            ⟨∂L/∂z, z(w)⟩.
    """

    def __init__(self, objective: Objective, *, parameters: str | nn.Module | Sequence[str | nn.Module] | None = None,
                 product: Product = "auto"):
        super().__init__(objective, _functional, FrozenDifferences, parameters=parameters, product=product,
                         products=("auto", "cached", "recomputed"))


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
        return lambda v, keep, batched: [None] * len(w)
    output_hessian = make()
    u = torch.zeros_like(z, requires_grad=True)
    roots, used = differentiable_gradient(z, w, u)

    def apply(v: Sequence[Tensor], keep: bool, batched: bool) -> Sequence[Tensor | None]:
        assert not batched
        jv, = torch.autograd.grad(roots, u, [v[i] for i in used], retain_graph=True)
        return torch.autograd.grad(z, w, output_hessian(jv), retain_graph=keep, allow_unused=True)

    return apply


def _linearize(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    z, loss = outputs_and_loss(batch)
    return sandwich(z, w, lambda: loss_curvature(z, loss))


def _forward(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    logits, at = on_module(batch, w, lambda t: t.logits(t.outputs()))
    z, loss = outputs_and_loss(batch)
    if not z.requires_grad:
        return lambda v, keep, batched: [None] * len(w)
    output_hessian = loss_curvature(z, loss)

    def apply(v: Sequence[Tensor], keep: bool, batched: bool) -> Sequence[Tensor | None]:
        jv = torch.func.jvp(logits, (at,), (tuple(v),))[1]
        return torch.autograd.grad(z, w, output_hessian(jv), retain_graph=keep, allow_unused=True)

    return apply


def _functional(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    z, loss = outputs_and_loss(batch)
    if not z.requires_grad:
        return lambda v, keep, batched: [None] * len(w)
    c, = torch.autograd.grad(loss, z, retain_graph=True)
    return derivative_of_gradient((c * z).sum(), w)
