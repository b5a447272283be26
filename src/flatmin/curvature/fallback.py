"""Products that are exact where torch can differentiate twice, and differences where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import parallel, vectors
from ..objective import Objective
from .differences import Differences
from .objective_operator import require_objective
from .product_check import ProductCheck
from .products import Linearize, NoSecondDerivative, ObjectiveOperator, Product


class Inexact(ObjectiveOperator):
    """An operator over an objective with ``product="finite_difference"`` too, which "auto" is under FSDP2.

    "auto" becomes that, with a warning, for a model without a second derivative.
    """

    def __init__(self, objective: Objective, linearize: Linearize,
                 differences: Callable[[ObjectiveOperator], Differences], *,
                 parameters: str | nn.Module | Sequence[str | nn.Module] | None, product: Product,
                 products: tuple[str, ...]):
        require_objective(objective)
        if objective.ranks.in_step and product == "auto":
            product = "finite_difference"
        self._asked = product
        self._differences: Differences | None = None
        super().__init__(objective, linearize, parameters=parameters, product=product,
                         products=(*products, "finite_difference"))
        self._differences = differences(self)

    def differences(self) -> Differences | None:
        return self._differences

    @property
    def exact(self) -> bool:
        return self.product != "finite_difference"

    @property
    def error(self) -> float | None:
        """The relative error of differences, as far as it has been estimated."""
        return self._differences and self._differences.error

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({} if self.error is None else {"product_error": self.error})

    def fingerprint(self) -> str:
        if self._asked != "finite_difference":
            return super().fingerprint()
        w = [parallel.local(p.detach()) for p in self.parameters]
        size = float(self.reduce(vectors.sums_of_squares(w).sum().reshape(1)).sqrt())
        return f"{float(self.objective.value()):.9e} {size:.9e}"

    def _fall_back(self, why: str) -> None:
        warnings.warn(why, stacklevel=2)
        self.product, self.vmap = "finite_difference", False
        self._forget()

    def _check(self) -> None:
        super()._check()
        if self.checked is not None and self.checked.impossible and self.product == "auto":
            self._fall_back("the model has no second derivative, so products are differences; their error is in the "
                            f"record. ({self.checked.impossible})")

    def _disagreement(self, found: ProductCheck) -> None:
        if self.product != "auto" or not found.gradient:      # else differences would be as wrong
            return super()._disagreement(found)
        self._fall_back(f"{found}. So products are differences of gradients; their error is in the record")

    def _forget(self) -> None:
        super()._forget()
        if self._differences is not None:
            self._differences.forget()

    def _mean(self, v: Tensor) -> Tensor:
        if self.product != "finite_difference":
            try:
                return super()._mean(v)
            except NoSecondDerivative as error:
                if self.product != "auto":
                    raise
                self._fall_back(f"the model has no second derivative, so products are differences; their error is in "
                                f"the record. ({error})")
        assert self._differences is not None
        return self._differences.product(v, keep=self._depth > 0)
