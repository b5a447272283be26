"""Measures of the whole matrix, for small models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..composite_norms import CompositeNorms
from ..linalg.eigenpairs import eigenpairs
from ..linalg.operator import CurvatureOperator, require_operator
from ..objective import Objective
from ..results import Scalar
from .double_backward import second_derivatives
from .functional import of_parameters
from .hessian import Hessian

SMALL = 2000


def dense_hessian(objective: Objective) -> Tensor:
    """The Hessian (n, n) by ``torch.func.hessian``, n² numbers: slow; matvecs are tested against it.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> dense_hessian(Objective(model, torch.nn.MSELoss(), (torch.full((1, 1), 3.0), torch.zeros(1, 1)))).tolist()
    [[18.0]]
    """
    w = objective.parameters
    total, weights = None, []
    with objective.session(), second_derivatives(objective), CompositeNorms():
        for batch in objective.weighted_batches():
            loss, at = of_parameters(batch, w, lambda t: t.loss(t.outputs()))
            rows = torch.func.hessian(loss)(at)
            h = torch.cat([torch.cat([block.reshape(p.numel(), q.numel()) for block, q in zip(row, w, strict=True)], 1)
                           for row, p in zip(rows, w, strict=True)]) * batch.weight
            total = h if total is None else total + h
            weights.append(batch.weight)
    assert total is not None
    return total.detach() / objective.normalizer(weights)


def compute_hessian_sharpness(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor,
                              top_k: int = 5) -> dict[str, Any]:
    """Largest eigenvalue, top eigenvalues, trace and Frobenius norm of the exact Hessian, as plain numbers.

    For at most a few thousand parameters: n² memory and n³ time. (The widely copied version of this function assigns
    ``p.data`` inside the differentiated function, which autograd does not see, and returns zeros for every model.)

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> compute_hessian_sharpness(model, torch.nn.MSELoss(), torch.full((1, 1), 3.0), torch.zeros(1, 1))["trace"]
    18.0
    """
    h = dense_hessian(Objective(model, loss_fn, (inputs, targets)))
    eigenvalues = torch.linalg.eigvalsh(h.double())
    return {"max_eigenvalue": float(eigenvalues[-1]), "top_k_eigenvalues": eigenvalues[-top_k:].tolist(),
            "trace": float(h.double().trace()), "frobenius_norm": float(h.double().norm())}


@dataclass(frozen=True, kw_only=True)
class ConditionNumber(Scalar):
    """λ_max / λ_min where that has a meaning; else ``value`` is nan and ``reason`` says why."""

    largest: float
    smallest: float
    reason: str


def condition_number(operator: CurvatureOperator | Objective, *, tol: float = 1e-4, **options: Any) -> ConditionNumber:
    """λ_max / λ_min of a positive definite matrix; of any other there is none, and the record says so.

    Exact for up to 2000 coordinates; beyond, from both ends by ``eigenpairs(which="both", tol=tol, **options)``, where
    a smallest eigenvalue below its residual cannot be told from zero.

    >>> from flatmin.curvature import Matrix
    >>> condition_number(Matrix(torch.diag(torch.tensor([4.0, 1.0])))).value
    4.0
    >>> condition_number(Matrix(torch.diag(torch.tensor([4.0, -1.0])))).reason
    'indefinite: the smallest eigenvalue is -1'
    """
    if isinstance(operator, Objective):
        operator = Hessian(operator)
    require_operator(operator)
    if operator.size <= SMALL:
        spectrum = torch.linalg.eigvalsh(operator.dense().double())
        low, high = float(spectrum[0]), float(spectrum[-1])
        error = operator.size * torch.finfo(operator.dtype).eps * max(abs(low), abs(high))
    else:
        found = eigenpairs(operator, 2, "both", tol=tol, **options)
        low, high, error = found.smallest, found.largest, float(found.residuals.max())
    reason, value = "", math.nan
    if low < -error:
        reason = f"indefinite: the smallest eigenvalue is {low:.4g}"
    elif low <= error:
        reason = f"singular: the smallest eigenvalue is zero within {error:.1g}"
    else:
        value = high / low
    return ConditionNumber(value=value, largest=high, smallest=low, reason=reason, settings=operator.describe() | {
        "method": "exact" if operator.size <= SMALL else "lanczos"})
