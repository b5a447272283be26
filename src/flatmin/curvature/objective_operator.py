"""ObjectiveOperator: a matrix over the parameters of an objective, and how its matvecs are computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..linalg.operator import CurvatureOperator, Forms, positions
from ..objective import Objective
from .autograd_matvec import AutogradMatvec
from .double_backward import NoSecondDerivative, second_derivatives
from .finite_differences import Differences
from .linearization import Linearization
from .product_check import ProductCheck, check_product

Product = Literal["auto", "cached", "recomputed", "forward", "finite_difference"]
Parameters = str | nn.Module | Sequence[str | nn.Module] | None


@final
class ObjectiveOperator(CurvatureOperator):
    """A = Σ_b n_b A_b / Σ_b n_b over the batches of an objective; ``linearization`` says which matrix that is.

    ``product`` says how a matvec is computed, as for ``Hessian``. Inside ``session()`` the graphs of the batches are
    made once and kept as far as half of the free memory allows, unless it is "recomputed"; outside, every matvec makes
    its own. "auto" is decided here alone: it becomes "finite_difference" under FSDP2 (``__init__``), and with a warning
    (``_use_differences``) where the model has no second derivative or the check finds that it is wrong.
    """

    def __init__(self, objective: Objective, linearization: Linearization, *, parameters: Parameters = None,
                 product: Product = "auto", vmap: bool = False):
        require_objective(objective)
        offered = ["auto", "cached", "recomputed", *(["forward"] if linearization.forward else []), "finite_difference"]
        if product not in offered:
            raise ValueError(f"product must be one of {', '.join(offered)}, got {product!r}")
        objective.ranks.reshard()
        chosen = [(n, p) for n, p in objective.model.named_parameters() if p.requires_grad]
        if parameters is not None:
            chosen = [chosen[i] for i in positions(parameters, [p for _, p in chosen], [n for n, _ in chosen])]
        super().__init__([p for _, p in chosen], [n for n, _ in chosen], device=objective.device)
        self.objective, self.linearization, self.parameters = objective, linearization, self.like
        self.product: Product = "finite_difference" if objective.ranks.in_step and product == "auto" else product
        if self.exact and (objective.ranks.in_step or any(map(parallel.is_sharded, self.parameters))):
            raise ValueError('torch has no exact matvecs under FSDP2 (its gathered weights are gone when a gradient '
                             'is differentiated again): product="auto" takes differences there, "finite_difference"')
        self.requested = self.product
        self.vmap = vmap and self.exact and objective.mode not in ("train", "as_is")   # which may draw inside the graph
        self.checked: ProductCheck | None = None
        linearize = linearization.forward if product == "forward" else None
        self._autograd = AutogradMatvec(self, objective, self.parameters, linearize or linearization.reverse)
        self._differences = linearization.differences(self, objective)
        self._in_session = False

    def __repr__(self) -> str:
        return f"{self.name}({self.objective!r}, product={self.product!r})"

    def restrict(self, parameters: Any) -> ObjectiveOperator:
        block = ObjectiveOperator(self.objective, self.linearization, product=self.product, vmap=self.vmap,
                                  parameters=[self.names[i] for i in positions(parameters, self.like, self.names)])
        block.checked = self.checked
        return block

    @property
    def name(self) -> str:
        return self.linearization.name

    @property
    def rank(self) -> int:
        return self.objective.ranks.rank

    def smallest(self, number: int) -> int:
        return self.objective.ranks.least(number)

    @property
    def exact(self) -> bool:
        return self.product != "finite_difference"

    @property
    def trusted(self) -> bool:
        return self.checked is None or self.checked.agrees or self.checked.gradient and not self.exact

    @property
    def error(self) -> float | None:
        """The relative error of differences, as far as it has been estimated."""
        return self._differences.error

    def differences(self) -> Differences:
        """Matvecs by finite differences."""
        return self._differences

    def describe(self) -> dict[str, Any]:
        taken = self._autograd.taken if self.product == "auto" else self.product
        return super().describe() | {"product": taken, "mode": self.objective.mode} | (
            {} if self.checked is None else {"product_check": self.checked.to_dict()}) | (
            {} if self.error is None else {"product_error": self.error}) | dict(self.linearization.settings)

    def fingerprint(self) -> str:
        if self.requested != "finite_difference":
            return super().fingerprint()
        w = [parallel.local(p.detach()) for p in self.parameters]
        size = float(self.reduce(vectors.sums_of_squares(w).sum().reshape(1)).sqrt())
        return f"{float(self.objective.value()):.9e} {size:.9e}"

    @contextmanager
    def session(self, *, check: bool = True) -> Iterator[None]:
        if self._in_session:
            yield
            return
        with self._evaluating():
            if check:
                self.objective.check()
                self._check()
            self._forget()
            self._in_session = True
            try:
                yield
            finally:
                self._in_session = False
                self._forget()

    @contextmanager
    def fresh(self) -> Iterator[None]:
        self._forget()
        with self.session():
            yield

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.objective.session())
            if self.exact:
                stack.enter_context(second_derivatives(self.objective))
            yield

    def _forget(self) -> None:
        self._autograd.cache.clear()
        self._differences.forget()

    def _check(self) -> None:
        """Compare a matvec with differences of gradients, once for each matrix over an objective."""
        if self.checked is not None or not self.exact:
            return
        key = self.name, self.product == "forward", tuple(self.names), repr(self.linearization.settings)
        known = self.objective.product_checks
        if key not in known:
            known[key] = check_product(self)
        found: ProductCheck = known[key]
        self.checked = found
        if not found.agrees and self.product == "auto" and found.gradient:
            self._use_differences(f"{found}. So matvecs are differences of gradients")
        elif not found.agrees:      # differences of a wrong gradient would be as wrong
            warnings.warn(f"{found}. The result is not certified", stacklevel=2)
        if found.impossible and self.product == "auto":
            self._no_second_derivative(found.impossible)

    def _no_second_derivative(self, why: object) -> None:
        self._use_differences(f"the model has no second derivative ({why}), so matvecs are differences of gradients")

    def _use_differences(self, why: str) -> None:
        warnings.warn(f"{why}; their error is in the record", stacklevel=2)
        self.product, self.vmap = "finite_difference", False
        self._forget()

    def matmat(self, rows: Tensor) -> Tensor:
        with self.session():
            return self._matvec(rows) if self.vmap and len(rows) > 1 else super().matmat(rows)

    def matvec_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        forms: list[tuple[float, Tensor]] = []
        out = self._matvec(v, forms)
        return out, self._of_all_ranks(forms)

    def _matvec(self, v: Tensor, forms: list[tuple[float, Tensor]] | None = None) -> Tensor:
        """Av for v of shape (n,) or a block (b, n); ``forms`` as for ``AutogradMatvec.matvec``."""
        with ExitStack() as stack:
            if not self._in_session:
                stack.enter_context(self._evaluating())
            if self.exact:
                keep_graphs = self._in_session and self.product in ("auto", "cached")
                try:
                    return self._autograd.matvec(v, keep_graphs=keep_graphs, forms=forms)
                except NoSecondDerivative as error:
                    if self.product != "auto":
                        raise
                    self._no_second_derivative(error)
            if forms is not None:
                forms.clear()
            return self._differences.matvec(v, same_weights=self._in_session)

    def _of_all_ranks(self, forms: list[tuple[float, Tensor]]) -> Forms | None:
        """Weights and forms of the batches of all ranks; values are so that λ = Σ n_b q_b / Σ n_b for sums too."""
        ranks = self.objective.ranks
        most = -ranks.least(-len(forms))
        if most == 0:       # finite differences
            return None
        table = torch.zeros(most, ranks.world, 2, dtype=torch.float64)
        for i, (weight, form) in enumerate(forms):
            table[i, ranks.rank, 0], table[i, ranks.rank, 1] = weight, form.cpu()
        table = torch.tensor(ranks.total(*table.flatten().tolist()), dtype=torch.float64).view(-1, 2)
        weights, values = table[table[:, 0] > 0].unbind(1)
        return weights, values * len(values) if self.objective.sums else values


def require_objective(objective: Any) -> None:
    """Raise a TypeError that says what to write where something else is given to an operator."""
    if not isinstance(objective, Objective):
        raise TypeError(f"expected an Objective, got {type(objective).__name__}: write Objective(model, loss_fn, data)")
