"""The Hessian of a loss, by automatic differentiation or by differences of gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..objective import Objective, WeightedBatch
from .differences import Differences
from .fallback import Inexact
from .products import LinearMap, NoSecondDerivative, Product, on_module


class Hessian(Inexact):
    """H = ∇²L(w) over the parameters that require a gradient, in the order of ``model.parameters()``.

    Args:
        objective: L, an ``Objective``; averages over its batches are exact, so a ragged last batch changes nothing.
        parameters: only a block of H: names of parameters or of modules, or modules.
        product: how Hv is made. "cached": reverse over reverse, on graphs that stay while an algorithm runs.
            "recomputed": the same, one batch's graph at a time. "forward": forward over reverse. "finite_difference":
            (∇L(w + hv) − ∇L(w − hv)) / 2h, for what has no second derivative, with its relative error estimated in
            ``error`` and in records. "auto": cached as far as half of the free memory allows, then recomputed; finite
            differences under FSDP2, and, with a warning, where the model has no second derivative.
        vmap: whether several vectors go through the graph at once; by default on accelerators only, where it pays.
        place: "disk" keeps what finite differences need beside the weights and the result (the exact weights, a second
            result to compare with) in files in ``folder``; to be taken with ``eigenpairs(place="disk")``.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> H = Hessian(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1))))
    >>> H.dense().tolist()                          # (2/N) XᵀX
    [[1.0, 0.0], [0.0, 4.0]]
    """

    def __init__(self, objective: Objective, *, parameters: str | nn.Module | Sequence[str | nn.Module] | None = None,
                 product: Product = "auto", vmap: bool | None = None, place: Literal["device", "disk"] = "device",
                 folder: str | None = None):
        if place == "disk" and product != "finite_difference":
            raise ValueError('place="disk" is for product="finite_difference"')
        self.place: Literal["device", "disk"] = place
        self.folder = folder
        super().__init__(objective, _forward if product == "forward" else _reverse,
                         lambda operator: Differences(operator, place == "disk", folder), parameters=parameters,
                         product=product, products=("auto", "cached", "recomputed", "forward"))
        self.vmap = self.product != "finite_difference" and (objective.device.type != "cpu" if vmap is None else vmap)

    def _again(self, names: list[str]) -> Hessian:
        return Hessian(self.objective, parameters=names, product=self.product, vmap=self.vmap, place=self.place,
                       folder=self.folder)


def _reverse(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    loss = batch.loss(batch.outputs())
    if not loss.requires_grad:
        warnings.warn("autograd sees no parameter behind the loss, so its Hessian is zero: is something detached, or "
                      "run under no_grad?", stacklevel=2)
    return derivative_of_gradient(loss, w)


def derivative_of_gradient(loss: Tensor, w: list[nn.Parameter]) -> LinearMap:
    """v ↦ ∇²loss · v by a second reverse pass over the graph of the gradient."""
    if not loss.requires_grad:
        return lambda v, keep, batched: [None] * len(w)
    one = torch.ones_like(loss, requires_grad=True)     # of a constant once_differentiable makes constants, in silence
    roots, used = differentiable_gradient(loss, w, one)

    def apply(v: Sequence[Tensor], keep: bool, batched: bool) -> Sequence[Tensor | None]:
        if not roots:
            return [None] * len(w)
        return torch.autograd.grad(roots, w, [v[i] for i in used], retain_graph=keep, allow_unused=True,
                                   is_grads_batched=batched)

    return apply


def differentiable_gradient(z: Tensor, w: list[nn.Parameter], u: Tensor) -> tuple[list[Tensor], list[int]]:
    """The parts of ∂⟨u, z⟩/∂w that depend on anything, with their graph, and their positions in w.

    Raises ``NoSecondDerivative`` where that graph is cut off (such a node has no way back to the parameters, so that
    autograd leaves its part out in silence), or has a derivative that torch has wrong.
    """
    if wrong := {name for name in _nodes([z]) if name.startswith(_WRONG_THIRD_DERIVATIVE)}:
        raise NoSecondDerivative(f"torch has wrong third derivatives of {', '.join(sorted(wrong))}, which this loss "
                                 "needs because it differentiates inside")
    g = torch.autograd.grad(z, w, u, create_graph=True, allow_unused=True)
    used = [i for i, t in enumerate(g) if t is not None and t.requires_grad]
    roots: list[Any] = [g[i] for i in used]
    if _nodes(roots) & {"torch::autograd::Error", "torch::autograd::NotImplemented"}:
        raise NoSecondDerivative("a function of this model is marked once_differentiable, or torch has no derivative "
                                 "of its backward pass")
    return roots, used


_WRONG_THIRD_DERIVATIVE = tuple(f"{kind}NormBackwardBackward" for kind in ("NativeLayer", "NativeBatch", "CudnnBatch",
                                                                 "MiopenBatch"))


def _nodes(roots: Sequence[Tensor]) -> set[str]:
    """The names of all nodes of a graph."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return {node.name() for node in seen}


def _forward(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    """v ↦ the derivative of ∇loss along v, forward over reverse."""
    loss, at = on_module(batch, w, lambda t: t.loss(t.outputs()))

    def apply(v: Sequence[Tensor], keep: bool, batched: bool) -> Sequence[Tensor | None]:
        def one(tangent: tuple[Tensor, ...]) -> Any:
            return torch.func.jvp(torch.func.grad(loss), (at,), (tangent,))[1]

        return torch.func.vmap(one)(tuple(v)) if batched else one(tuple(v))

    return apply
