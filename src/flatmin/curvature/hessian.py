"""The Hessian of a loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..evaluation import WeightedBatch
from ..objective import Objective
from .double_backward import derivative_of_gradient
from .finite_differences import Differences, GradientDifference
from .functional import of_parameters
from .linearization import Linearization, LinearMap, Parts
from .objective_operator import ObjectiveOperator, Parameters, Product, require_objective


def Hessian(objective: Objective, *, parameters: Parameters = None, product: Product = "auto",
            vmap: bool | None = None, place: Literal["device", "disk"] = "device",
            folder: str | None = None) -> ObjectiveOperator:
    """H = ∇²L(w) over the parameters that require a gradient, in the order of ``model.parameters()``.

    Args:
        objective: L, an ``Objective``; averages over its batches are exact, so a ragged last batch changes nothing.
        parameters: only a block of H: names of parameters or of modules, or modules.
        product: how Hv is computed. "cached": reverse over reverse, on graphs kept while an algorithm runs.
            "recomputed": the same, one batch's graph at a time. "forward": forward over reverse. "finite_difference":
            (∇L(w + hv) − ∇L(w − hv)) / 2h, for what has no second derivative, with its relative error estimated in
            ``error`` and in records. "auto": cached as far as half of the free memory allows, then recomputed; finite
            differences under FSDP2, and, with a warning, where the model has no second derivative.
        vmap: whether several vectors go through a graph at once; by default on accelerators only, where it pays. Not
            by forward mode, nor in the modes "train" and "as_is" or through custom autograd functions, which torch
            may be unable to batch: there they go one after the other.
        place: "disk" puts what finite differences need beside the weights and the result (the exact weights, a second
            result to compare with) into files in ``folder``; use it with ``eigenpairs(place="disk")``.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> H = Hessian(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1))))
    >>> H.dense().tolist()                          # (2/N) XᵀX
    [[1.0, 0.0], [0.0, 4.0]]
    """
    if place == "disk" and product != "finite_difference":
        raise ValueError('place="disk" is for product="finite_difference"')
    require_objective(objective)
    linearization = Linearization(
        name="Hessian", reverse=_reverse_over_reverse, forward=_forward_over_reverse,
        differences=lambda operator, objective: Differences(operator, objective, GradientDifference(
            operator, objective), on_disk=place == "disk", folder=folder))
    return ObjectiveOperator(objective, linearization, parameters=parameters, product=product,
                             vmap=objective.device.type != "cpu" if vmap is None else vmap)


def _reverse_over_reverse(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    loss = batch.loss(batch.outputs())
    if not loss.requires_grad:
        warnings.warn("autograd sees no parameter behind the loss, so its Hessian is zero: is something detached, or "
                      "run under no_grad?", stacklevel=2)
    return derivative_of_gradient(loss, w)


def _forward_over_reverse(batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
    loss, at = of_parameters(batch, w, lambda t: t.loss(t.outputs()))

    def derivative(v: Sequence[Tensor], retain_graph: bool) -> Parts:
        out: Any = torch.func.jvp(torch.func.grad(loss), (at,), (tuple(v),))[1]
        return out

    return LinearMap(derivative)
