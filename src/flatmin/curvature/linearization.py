"""What a matrix over an objective is: its linear map on one batch, by autograd or from first derivatives alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..evaluation import WeightedBatch
from ..linalg.operator import CurvatureOperator
from ..objective import Objective
from .finite_differences import Differences

Parts = Sequence[Tensor | None]
"""One tensor a parameter; None is zero."""


@dataclass(frozen=True)
class LinearMap:
    """The linear map v ↦ A_b v of one batch.

    ``matvec(v, retain_graph)`` takes one tensor a parameter. ``matmat`` takes several vectors at once, along a new
    first dimension of each tensor; it is None where they must go through the graph one after the other.
    """

    matvec: Callable[[Sequence[Tensor], bool], Parts]
    matmat: Callable[[Sequence[Tensor], bool], Parts] | None = None


ZERO = LinearMap(lambda v, retain_graph: [None] * len(v))

Linearize = Callable[[WeightedBatch, list[nn.Parameter]], LinearMap]
"""A batch and parameters ↦ the linear map of that batch."""


@dataclass(frozen=True, kw_only=True)
class Linearization:
    """One kind of matrix over an objective, and the ways to multiply by it.

    ``reverse`` makes a batch's map by reverse over reverse, ``forward`` with forward mode (None: not offered), and
    ``differences`` replaces both for an operator by first derivatives alone. ``settings`` go to the record.
    """

    name: str
    reverse: Linearize
    forward: Linearize | None = None
    differences: Callable[[CurvatureOperator, Objective], Differences]
    settings: Mapping[str, Any] = field(default_factory=dict)


class OverObjective(Protocol):
    """What the check of a matrix reads of an operator over an objective."""

    objective: Objective
    parameters: list[nn.Parameter]
    names: list[str]
    numels: list[int]
    product: Any
    device: Any

    def matvec(self, vectors: Tensor) -> Tensor: ...
    def differences(self) -> Differences: ...
    def restrict(self, parameters: Any) -> Any: ...
