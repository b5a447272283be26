"""Exact products of matrices that are means over batches, with the work that products share kept while it fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..batches import equal
from ..linalg import memory
from ..linalg.operator import CurvatureOperator, Forms
from ..objective import Objective, WeightedBatch
from ..parallel import unwrapped
from .objective_operator import OverParameters
from .product_check import ProductCheck, check_product

if TYPE_CHECKING:
    from .differences import Differences

Product = Literal["auto", "cached", "recomputed", "forward", "finite_difference"]
LinearMap = Callable[[Sequence[Tensor], bool, bool], Sequence[Tensor | None]]
"""(v, keep, batched) ↦ one tensor, or None for zero, a parameter. ``keep``: the map will be used again; ``batched``:
each tensor holds a block of vectors along a new first dimension."""

Linearize = Callable[[WeightedBatch, list[nn.Parameter]], LinearMap]
"""A batch and parameters ↦ the linear map of that batch."""


class NoSecondDerivative(RuntimeError):
    """Autograd cannot differentiate the gradient of this model, or is known to do it wrong."""


class ObjectiveOperator(OverParameters):
    """A = Σ_b n_b A_b / Σ_b n_b over the batches of an objective, each A_b a linear map that autograd makes.

    Inside ``session()`` the maps (their graphs) are made once and kept as far as half of the free memory allows,
    unless ``product`` says "recomputed"; outside, every product starts afresh.
    """

    def __init__(self, objective: Objective, linearize: Linearize, *,
                 parameters: str | nn.Module | Sequence[str | nn.Module] | None, product: Product,
                 products: tuple[str, ...]):
        if product not in products:
            raise ValueError(f"product must be one of {', '.join(products)}, got {product!r}")
        super().__init__(objective, parameters)
        self.product: Product = product
        self.vmap = False
        self._linearize = linearize
        self._depth = 0
        self._forms: list[tuple[float, Tensor]] | None = None       # noted while it is a list
        self.checked: ProductCheck | None = None
        self._taken: str = product
        self._batched = False       # whether a block of vectors has gone through the graph at once
        self._forget()
        if product != "finite_difference" and (objective.ranks.in_step or any(map(parallel.is_sharded,
                                                                                  self.parameters))):
            raise ValueError('torch has no exact products under FSDP2 (its gathered weights are gone when a gradient '
                             'is differentiated again): product="auto" takes differences there, "finite_difference"')

    def restrict(self, parameters: Any) -> CurvatureOperator:
        block = self._again([self.names[i] for i in self.select(parameters)])
        block.checked = self.checked
        return block

    def _again(self, names: list[str]) -> ObjectiveOperator:
        return type(self)(self.objective, parameters=names, product=self.product)  # type: ignore[call-arg]

    def describe(self) -> dict[str, Any]:
        taken = self._taken if self.product == "auto" else self.product
        return super().describe() | {"product": taken, "mode": self.objective.mode} | (
            {} if self.checked is None else {"product_check": self.checked.to_dict()})

    @property
    def trusted(self) -> bool:
        return self.checked is None or self.checked.agrees or self.checked.gradient and not self.exact

    @contextmanager
    def session(self, *, check: bool = True) -> Iterator[None]:
        if self._depth:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self.objective.session())
            stack.enter_context(self._kernels())
            if check:
                self.objective.check()
                self._check()
            self._forget()
            self._depth = 1
            try:
                yield
            finally:
                self._depth = 0
                self._forget()

    def _check(self) -> None:
        """Compare a product with differences of gradients, once."""
        if self.checked is not None or self.product == "finite_difference":
            return
        key = type(self), self.product == "forward", tuple(self.names), self._variant()
        known = self.objective.product_checks
        if key not in known:
            known[key] = check_product(self)
        found: ProductCheck = known[key]
        self.checked = found
        if not found.agrees:
            self._disagreement(found)

    def differences(self) -> Differences | None:
        """Products by differences of gradients, where there are any."""
        return None

    def _variant(self) -> str:
        """What distinguishes matrices of one class on one objective."""
        return ""

    def _disagreement(self, found: ProductCheck) -> None:
        warnings.warn(f"{found}. The result is not certified", stacklevel=2)

    def _kernels(self) -> AbstractContextManager[None]:
        return nullcontext() if self.product == "finite_difference" else second_derivatives(self.objective)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        self._forget()
        with self.session():
            yield

    def _forget(self) -> None:
        self._kept: dict[int, tuple[float, LinearMap, Any]] = {}
        self._weights: list[float] | None = None
        self._room: float | None = None

    def _product(self, v: Tensor) -> Tensor:
        if self._depth:
            return self._mean(v)
        with self.objective.session(), self._kernels():
            return self._mean(v)

    def _product_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        self._forms = noted = []
        try:
            out = self._product(v)
        finally:
            self._forms = None
        return out, self._of_all_ranks(noted)

    def _of_all_ranks(self, noted: list[tuple[float, Tensor]]) -> Forms | None:
        """Weights and forms of the batches of all ranks; values are so that λ = Σ n_b q_b / Σ n_b for sums too."""
        ranks = self.objective.ranks
        most = -ranks.least(-len(noted))
        if most == 0:       # differences of gradients
            return None
        table = torch.zeros(most, ranks.world, 2, dtype=torch.float64)
        for i, (weight, form) in enumerate(noted):
            table[i, ranks.rank, 0], table[i, ranks.rank, 1] = weight, form.cpu()
        table = torch.tensor(ranks.total(*table.flatten().tolist()), dtype=torch.float64).view(-1, 2)
        weights, forms = table[table[:, 0] > 0].unbind(1)
        return weights, forms * len(forms) if self.objective.sums else forms

    def _products(self, block: Tensor) -> Tensor:
        with self.session():
            if not self.vmap or len(block) < 2:
                return torch.stack([self._mean(v) for v in block])
            if self._batched:
                return self._mean(block)
            rows = [self._mean(block[0])[None]]
            if self.vmap:       # what one vector can and a block cannot is a matter of batching
                try:
                    rows.append(self._mean(block[1:]))
                    self._batched = True
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:
                    self.vmap = False
            return torch.cat(rows if self._batched else [*rows, *(self._mean(v)[None] for v in block[1:])])

    def _mean(self, v: Tensor) -> Tensor:
        """Σ n_b A_b v / Σ n_b, for v of shape (n,) or a block (b, n)."""
        batched = v.dim() == 2
        vs = [part.reshape(v.shape[:-1] + shape).to(dtype) for part, shape, dtype in
              zip(v.split(self.numels, -1), self.shapes, self._dtypes, strict=True)]
        out, first = None, 1.0
        if self._forms is not None:
            self._forms.clear()
        for weight, apply, keep in self._maps():
            rows = [_dense(row) for row in apply(vs, keep, batched)]
            if self._forms is not None:
                self._forms.append((weight, _form(vs, rows)))
            if out is None:
                out, first = self._flat(rows, v), weight
                continue
            for piece, row in zip(out.split(self.numels, -1), rows, strict=True):
                if row is not None:
                    piece.add_(row.detach().reshape(piece.shape).to(self.device), alpha=weight / first)
        assert self._weights is not None
        out = torch.zeros_like(v) if out is None else out
        share = first / self.objective.normalizer(self._weights)
        return self.objective.ranks.sum_(out.mul_(share) if share != 1 else out)

    def _flat(self, rows: Sequence[Tensor | None], v: Tensor) -> Tensor:
        parts = v.split(self.numels, -1)
        return torch.cat([torch.zeros_like(part) if row is None else
                          row.detach().reshape(part.shape).to(self.device, self.dtype)
                          for row, part in zip(rows, parts, strict=True)], -1)

    def _maps(self) -> Iterator[tuple[float, LinearMap, bool]]:
        """Weight and linear map of each batch, and whether the map will be used again."""
        if self._weights is not None and len(self._kept) == len(self._weights):
            for weight, apply, _ in self._kept.values():
                yield weight, apply, True
            return
        if self._room is None:
            caching = self._depth and self.product in ("auto", "cached")
            self._room = memory.available(self.device) / 2 if caching else -1.0
        weights = []
        for batch in self.objective.weighted_batches():
            weights.append(batch.weight)
            if batch.index in self._kept:
                weight, apply, data = self._kept[batch.index]
                if equal(data, batch.data):
                    yield weight, apply, True
                    continue
                self._keep_none()
            apply = self._linearized(batch)
            if keep := self._room > 0:
                self._kept[batch.index] = (batch.weight, apply, batch.data)
            yield batch.weight, apply, keep
            del apply
        if self._weights is None:
            self._weights = weights
            self._taken = "cached" if len(self._kept) == len(weights) else "recomputed"

    def _keep_none(self) -> None:
        """The batches come in another order than in the last pass, so that no kept graph belongs to the next one."""
        warnings.warn("the data give other batches in each pass, so graphs of batches are not kept between products: "
                      "each product evaluates the model anew. Pass list(data), or shuffle=False", stacklevel=2)
        self._kept, self._room = {}, -1.0

    def _linearized(self, batch: WeightedBatch) -> LinearMap:
        assert self._room is not None
        with torch.enable_grad():
            if self._room <= 0 or self.objective.single:    # one batch: its graph is needed in any case
                return self._linearize(batch, self.parameters)
            with memory.Meter() as meter:
                apply = self._linearize(batch, self.parameters)
        self._room -= meter.bytes
        return apply


def _dense(row: Tensor | None) -> Tensor | None:
    """The same where it is not the sparse row of an embedding."""
    return row if row is None or row.layout is torch.strided else row.to_dense()


def _form(v: Sequence[Tensor], rows: Sequence[Tensor | None]) -> Tensor:
    """vᵀ · rows, a 0-d float64 tensor."""
    pairs = [(x, row.detach()) for x, row in zip(v, rows, strict=True) if row is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    return vectors.dots([x for x, _ in pairs], [row.to(x.dtype) for x, row in pairs]).sum()


class _Call(nn.Module):
    """A function of one batch as the forward of a module, so that ``functional_call`` can exchange its parameters."""

    def __init__(self, model: nn.Module, function: Callable[[WeightedBatch], Any]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: WeightedBatch) -> Any:
        return self.function(batch)


def on_module(batch: WeightedBatch, w: list[nn.Parameter],
              function: Callable[[WeightedBatch], Any]) -> tuple[Callable[..., Any], Any]:
    """A function of one batch as a pure function of a tuple of parameters, and the parameters as they are."""
    names = {id(p): name for name, p in batch.model.named_parameters()}
    keys = [f"model.{names[id(p)]}" for p in w]
    module = _Call(batch.model, function)
    module.training = batch.model.training

    def pure(values: tuple[Tensor, ...]) -> Any:
        buffers = {name: b.clone() for name, b in module.named_buffers()}     # running statistics change in place
        return torch.func.functional_call(module, buffers | dict(zip(keys, values, strict=True)), (batch,))

    return pure, tuple(p.detach() for p in w)


@contextmanager
def second_derivatives(objective: Objective) -> Iterator[None]:
    """Inside, kernels are used that can be differentiated twice: plain attention, native recurrent layers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop because we have not yet implemented.*")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if objective.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in
                                                   unwrapped(objective.model).modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
