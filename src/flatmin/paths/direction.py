"""The unit vector ε* along which sharpness is split: SAM's, the preconditioned form's, or a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parallel, vectors
from ..ascent.directions import Preconditioned
from ..ascent.parameters import list_parameters
from ..ascent.steepest import AscentInfo
from ..curvature import CurvatureOperator
from ..objective import Objective


@dataclass(frozen=True)
class Unit:
    """ε* = P g / ``length`` as a flat tensor of this rank's numbers, P the diagonal ``metric`` (None: the identity).

    ``follows`` says whether ε* changes with the gradient; a given direction does not.
    """

    vector: Tensor
    length: float
    metric: Tensor | None
    follows: bool


def along(operator: CurvatureOperator, g: Tensor, direction: str | Tensor | Sequence[Tensor],
          metric: Tensor | None) -> Unit:
    """ε* along P g for a direction that is a name, else along the tensors given; zero where those are zero."""
    if isinstance(direction, str):
        moved = g if metric is None else g * metric
    elif isinstance(direction, Tensor):
        if direction.shape != g.shape:
            raise ValueError(f"the direction must be {len(g)} numbers in one flat tensor, or one tensor for each "
                             f"parameter; got shape {tuple(direction.shape)}")
        moved = direction.detach().to(g)
    else:
        moved = operator.join(direction)
    length = operator.norm(moved)
    return Unit(moved / length if length > 0 else torch.zeros_like(moved), length, metric, isinstance(direction, str))


def inverse_metric(objective: Objective, optimizer: torch.optim.Optimizer | None,
                   preconditioner: Preconditioned | None) -> list[Tensor]:
    """diag(M⁻¹), local tensors in the order of ``objective.parameters``: what ``Preconditioned`` makes of ones.

    Raises:
        ValueError: no optimizer, or one that has no second moment of any parameter of the objective yet.
    """
    w = objective.parameters
    if optimizer is None:
        raise ValueError("the preconditioned direction reads Adam's second moment: pass optimizer=")
    if not any(optimizer.state.get(p) for p in w):
        raise ValueError("the optimizer has no state for any parameter of this objective: pass the one that trains "
                         "this model, after its first step")
    infos = {id(p.parameter): p for p in list_parameters(objective.model, None, {})}
    local = [parallel.local(p.detach()) for p in w]
    ones = [torch.ones_like(t, dtype=torch.float32 if t.dtype in vectors.HALF else t.dtype) for t in local]
    info = AscentInfo([infos[id(p)] for p in w], vectors.Space(w), local, ones, None, {}, 0, optimizer)
    return (preconditioner or Preconditioned())(info).d
