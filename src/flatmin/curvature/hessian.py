"""The Hessian of a loss, by automatic differentiation or by differences of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import Objective, Term
from .products import Apply, ObjectiveOperator, Product


class Hessian(ObjectiveOperator):
    """H = ∇²L(w) over the parameters that require a gradient, in the order of ``model.parameters()``.

    Args:
        objective: L, an ``Objective``; averages over its batches are exact, so a ragged last batch changes nothing.
        parameters: only a block of H: names of parameters or of modules, or modules.
        product: how Hv is made. "cached": reverse over reverse on graphs that stay while an algorithm runs;
            "recomputed": the same, one batch's graph at a time; "auto": cached as far as half of the free memory
            allows; "forward": forward over reverse; "finite_difference": (∇L(w + hv) − ∇L(w − hv)) / 2h, for what has no second
            derivative, with its error estimated in ``error`` and in records.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> H = Hessian(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1))))
    >>> H.dense().tolist()                          # (2/N) XᵀX
    [[1.0, 0.0], [0.0, 4.0]]
    """

    def __init__(self, objective: Objective, *, parameters: str | nn.Module | Sequence[str | nn.Module] | None = None,
                 product: Product = "auto"):
        super().__init__(objective, _linearize, parameters=parameters, product=product,
                         products=("auto", "cached", "recomputed"))


def _linearize(term: Term, w: list[nn.Parameter]) -> tuple[Tensor, Apply]:
    loss = term.loss(term.outputs())
    return loss.detach(), derivative_of_gradient(loss, w)


def derivative_of_gradient(loss: Tensor, w: list[nn.Parameter]) -> Apply:
    """v ↦ ∇²loss · v by a second reverse pass over the graph of the gradient."""
    if not loss.requires_grad:
        return lambda v, keep, batched: [None] * len(w)
    g = torch.autograd.grad(loss, w, create_graph=True, allow_unused=True)
    used = [i for i, t in enumerate(g) if t is not None and t.requires_grad]
    roots: list[Any] = [g[i] for i in used]
    if not used:
        return lambda v, keep, batched: [None] * len(w)

    def apply(v: Sequence[Tensor], keep: bool, batched: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(roots, w, [v[i] for i in used], retain_graph=keep, allow_unused=True,
                                   is_grads_batched=batched)

    return apply
