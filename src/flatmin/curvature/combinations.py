"""Operators that are made of others: sums, multiples, preconditioned forms and blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .operator import CurvatureOperator


class _Over(CurvatureOperator):
    """An operator made of others on the same coordinates."""

    def __init__(self, *operators: CurvatureOperator):
        first = operators[0]
        for other in operators[1:]:
            if other.shapes != first.shapes:
                raise ValueError(f"operators on different coordinates: sizes {first.size} and {other.size}")
        super().__init__(first.shapes, first.dtype, first.device, first.names, first._dtypes)
        self.operators, self.numels, self.length = operators, first.numels, first.length
        self.rank = first.rank

    @property
    def exact(self) -> bool:
        return all(operator.exact for operator in self.operators)

    @property
    def trusted(self) -> bool:
        return all(operator.trusted for operator in self.operators)

    @contextmanager
    def session(self, *, check: bool = True) -> Iterator[None]:
        with ExitStack() as stack:
            for operator in self.operators:
                stack.enter_context(operator.session(check=check))
            yield

    @contextmanager
    def fresh(self) -> Iterator[None]:
        with ExitStack() as stack:
            for operator in self.operators:
                stack.enter_context(operator.fresh())
            yield

    def reduce(self, t: Tensor, op: str = "sum") -> Tensor:
        return self.operators[0].reduce(t, op)

    def agree(self, number: int) -> int:
        return self.operators[0].agree(number)

    def _draw(self, i: int, generator: torch.Generator, kind: str) -> Tensor:
        return self.operators[0]._draw(i, generator, kind)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"of": [operator.describe() for operator in self.operators]}


class Sum(_Over):
    """A + B."""

    def _product(self, v: Tensor) -> Tensor:
        a, b = self.operators
        return a._product(v).add_(b._product(v))

    def _products(self, block: Tensor) -> Tensor:
        a, b = self.operators
        return a._products(block).add_(b._products(block))

    def restrict(self, parameters: Any) -> CurvatureOperator:
        a, b = self.operators
        return a.restrict(parameters) + b.restrict(parameters)


class Scaled(_Over):
    """αA."""

    def __init__(self, operator: CurvatureOperator, factor: float):
        super().__init__(operator)
        self.factor = factor

    def _product(self, v: Tensor) -> Tensor:
        return self.operators[0]._product(v).mul_(self.factor)

    def _products(self, block: Tensor) -> Tensor:
        return self.operators[0]._products(block).mul_(self.factor)

    def restrict(self, parameters: Any) -> CurvatureOperator:
        return self.operators[0].restrict(parameters) * self.factor

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"factor": self.factor}


class Preconditioned(_Over):
    """D^½ A D^½ for a diagonal D ≥ 0, given as a flat tensor."""

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor):
        super().__init__(operator)
        if diagonal.shape != (self.length,) or bool((diagonal < 0).any()):
            raise ValueError(f"the diagonal must be {self.length} numbers, none negative")
        self.root = diagonal.detach().to(self.device, self.dtype).sqrt()

    def _product(self, v: Tensor) -> Tensor:
        return self.operators[0]._product(v * self.root).mul_(self.root)

    def _products(self, block: Tensor) -> Tensor:
        return self.operators[0]._products(block * self.root).mul_(self.root)


class Restricted(_Over):
    """The principal block of the parameters at given positions, by padding with zeros."""

    def __init__(self, operator: CurvatureOperator, where: Sequence[int]):
        CurvatureOperator.__init__(self, [operator.shapes[i] for i in where], operator.dtype, operator.device,
                                   [operator.names[i] for i in where], [operator._dtypes[i] for i in where])
        self.operators, self.where = (operator,), list(where)
        self.numels = [operator.numels[i] for i in where]
        self.length, self.rank = sum(self.numels), operator.rank

    def _draw(self, i: int, generator: torch.Generator, kind: str) -> Tensor:
        return self.operators[0]._draw(self.where[i], generator, kind)

    def _product(self, v: Tensor) -> Tensor:
        whole = self.operators[0]
        padded = torch.zeros(whole.length, dtype=v.dtype, device=v.device)
        pieces = padded.split(whole.numels)
        for i, part in zip(self.where, v.split(self.numels), strict=True):
            pieces[i].copy_(part)
        rows = whole._product(padded).split(whole.numels)
        return torch.cat([rows[i] for i in self.where])
