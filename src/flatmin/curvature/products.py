"""Exact products of matrices that are means over batches, with the work that products share kept while it fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batches import unwrapped
from ..objective import Objective, Term
from . import memory
from .operator import CurvatureOperator

Product = Literal["auto", "cached", "recomputed", "forward", "finite_difference"]
Apply = Callable[..., Sequence[Tensor | None]]
"""(v, keep, batched) ↦ one tensor, or None for zero, a parameter; ``keep`` says that the map will be used again."""

Linearize = Callable[[Term, list[nn.Parameter]], tuple[Tensor, Apply]]
"""A batch and parameters ↦ the loss and the linear map of that batch."""


@dataclass
class _Kept:
    """What stays of one batch between products: its weight and, where memory allows, its linear map."""

    weight: float
    apply: Apply | None


class ObjectiveOperator(CurvatureOperator):
    """A = Σ_b n_b A_b / Σ_b n_b over the batches of an objective, each A_b a linear map that autograd makes.

    Inside ``session()`` the maps (their graphs) are made once and kept as far as half of the free memory allows,
    unless ``product`` says "recomputed"; outside, every product starts afresh.
    """

    def __init__(self, objective: Objective, linearize: Linearize, *,
                 parameters: str | nn.Module | Sequence[str | nn.Module] | None, product: Product,
                 products: tuple[str, ...]):
        if product not in products:
            raise ValueError(f"product must be one of {', '.join(products)}, got {product!r}")
        chosen = [(n, p) for n, p in objective.model.named_parameters() if p.requires_grad]
        dtypes = [p.dtype for _, p in chosen]
        super().__init__([p.shape for _, p in chosen], _widest(dtypes), objective.device, [n for n, _ in chosen], dtypes)
        self.objective, self.product = objective, product
        self.parameters = [p for _, p in chosen]
        self._linearize = linearize
        self._kept: list[_Kept] | None = None
        self._normalizer = 1.0
        self._depth = 0
        if parameters is not None:
            where = self.select(parameters)
            self.parameters = [self.parameters[i] for i in where]
            super().__init__([self.shapes[i] for i in where], _widest([dtypes[i] for i in where]), objective.device,
                             [self.names[i] for i in where], [dtypes[i] for i in where])

    def select(self, parameters: str | nn.Module | Sequence[str | nn.Module]) -> list[int]:
        wanted = [parameters] if isinstance(parameters, (str, nn.Module)) else list(parameters)
        inside: set[int] = set()
        names = [name for name in wanted if isinstance(name, str)]
        for module in wanted:
            if isinstance(module, nn.Module):
                ids = {id(p) for p in module.parameters()}
                inside |= {i for i, p in enumerate(self.parameters) if id(p) in ids}
        if len(names) < len(wanted) and not inside:
            raise ValueError("none of the modules holds a parameter of this operator")
        return sorted(inside.union(super().select(names) if names else []))

    def restrict(self, parameters: Any) -> CurvatureOperator:
        names = [self.names[i] for i in self.select(parameters)]
        return self._again(names)

    def _again(self, names: list[str]) -> CurvatureOperator:
        return type(self)(self.objective, parameters=names, product=self.product)  # type: ignore[call-arg]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"product": self.product, "mode": self.objective.mode}

    @contextmanager
    def session(self) -> Iterator[None]:
        if self._depth:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self.objective.session())
            stack.enter_context(second_derivatives(self.objective))
            self.objective.check()
            self._depth = 1
            try:
                yield
            finally:
                self._depth, self._kept = 0, None

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Products inside share nothing with those before."""
        kept, self._kept = self._kept, None
        try:
            with self.session():
                yield
        finally:
            self._kept = kept if self._depth else None

    def _product(self, v: Tensor) -> Tensor:
        if self._depth:
            return self._mean(v)
        with self.objective.session(), second_derivatives(self.objective):
            return self._mean(v)

    def _products(self, block: Tensor) -> Tensor:
        return super()._products(block)

    def _mean(self, v: Tensor) -> Tensor:
        vs = self.split(v)
        out: Tensor | None = None
        for weight, apply, keep in self._maps():
            out = self._add(out, apply(vs, keep), weight)
        assert out is not None
        return out.div_(self._normalizer) if self._normalizer != 1 else out

    def _add(self, out: Tensor | None, rows: Sequence[Tensor | None], weight: float) -> Tensor:
        if out is None:
            flat = [torch.zeros(n, dtype=self.dtype, device=self.device) if r is None
                    else r.detach().reshape(-1).to(self.device, self.dtype) for r, n in zip(rows, self.numels, strict=True)]
            out = torch.cat(flat)
            return out.mul_(weight) if weight != 1 else out
        for piece, row in zip(out.split(self.numels), rows, strict=True):
            if row is not None:
                piece.add_(row.detach().reshape(-1).to(self.device), alpha=weight)
        return out

    def _maps(self) -> Iterator[tuple[float, Apply, bool]]:
        """The linear map of each batch, with its share and whether it will be used again."""
        if self._kept is not None and all(k.apply is not None for k in self._kept):
            for k in self._kept:
                assert k.apply is not None
                yield k.weight, k.apply, True
            return
        first = self._kept is None
        kept: list[_Kept] = [] if self._kept is None else self._kept
        room = memory.available(self.device) // 2 if self._depth and self.product != "recomputed" else 0
        weights = []
        single = None
        for i, term in enumerate(self.objective.terms()):
            weights.append(term.weight)
            if not first and kept[i].apply is not None:
                yield kept[i].weight, kept[i].apply, True  # type: ignore[misc]
                continue
            with memory.Meter() as meter, torch.enable_grad():
                _, apply = self._linearize(term, self.parameters)
            room -= meter.bytes
            keep = first and room >= 0
            if first:
                kept.append(_Kept(term.weight, apply if keep else None))
            del single
            single = apply
            yield term.weight, apply, keep
            del apply
        self._normalizer = self.objective.normalizer(weights)
        if len(weights) == 1:
            self._normalizer, kept[0].weight = 1.0, 1.0
        if first and self._depth:
            self._kept = kept


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    out = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        out = torch.promote_types(out, dtype)
    return out


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
