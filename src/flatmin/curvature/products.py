"""Exact products of matrices that are means over batches, with the work that products share kept while it fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from .. import vectors
from ..batches import unwrapped
from ..objective import Objective, Term
from . import memory
from .operator import CurvatureOperator
from .smooth import Smooth

Product = Literal["auto", "cached", "recomputed", "forward", "finite_difference"]
Apply = Callable[[Sequence[Tensor], bool, bool], Sequence[Tensor | None]]
"""(v, keep, batched) ↦ one tensor, or None for zero, a parameter. ``keep``: the map will be used again; ``batched``:
each tensor holds a block of vectors along a new first dimension."""

Linearize = Callable[[Term, list[nn.Parameter]], Apply]
"""A batch and parameters ↦ the linear map of that batch."""


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
        objective.ranks.reshard()
        chosen = [(n, p) for n, p in objective.model.named_parameters() if p.requires_grad]
        dtypes = [p.dtype for _, p in chosen]
        super().__init__([p.shape for _, p in chosen], _widest(dtypes), objective.device,
                         [n for n, _ in chosen], dtypes)
        self.objective = objective
        self.product: Product = product
        self.vmap = False
        self.parameters = [p for _, p in chosen]
        self._linearize = linearize
        self._depth = 0
        self._smooth = True
        self._forget()
        if parameters is not None:
            where = self.select(parameters)
            self.parameters = [self.parameters[i] for i in where]
            super().__init__([self.shapes[i] for i in where], _widest([dtypes[i] for i in where]), objective.device,
                             [self.names[i] for i in where], [dtypes[i] for i in where])
        self._groups = self._shard()
        self.rank = objective.ranks.rank
        if product != "finite_difference" and (objective.ranks.in_step or any(map(vectors.is_sharded,
                                                                                  self.parameters))):
            raise ValueError('torch has no exact products under FSDP2 (its gathered weights are gone when a gradient '
                             'is differentiated again): product="auto" takes differences there, "finite_difference"')

    def _shard(self) -> Sequence[Any]:
        """Vectors sharded as the parameters are; the process groups that hold the other shards."""
        local = [vectors.local(p.detach()) for p in self.parameters]
        self.numels, self.length = [t.numel() for t in local], sum(t.numel() for t in local)
        groups = {vectors._shard_groups(p) for p in self.parameters}
        if len(groups) > 1:
            raise ValueError("some parameters are sharded over other ranks than others, or not at all: pass "
                             "parameters= with those of one kind")
        return groups.pop()

    def reduce(self, t: Tensor, op: str = "sum") -> Tensor:
        for group in self._groups:
            dist = torch.distributed
            dist.all_reduce(t, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
        return t

    def agree(self, number: int) -> int:
        return self.objective.ranks.least(number)

    def _draw(self, i: int, generator: torch.Generator, kind: str) -> Tensor:
        if not vectors.is_sharded(self.parameters[i]):
            return super()._draw(i, generator, kind)
        return vectors.Space([self.parameters[i]]).random(generator, kind)[0].reshape(-1)

    def join(self, vs: Sequence[Tensor]) -> Tensor:
        if not any(map(vectors.is_sharded, self.parameters)):
            return super().join(vs)
        pairs = list(zip(vs, self.parameters, strict=True))
        if any(v.shape not in (p.shape, vectors.local(p).shape) for v, p in pairs):
            raise ValueError("expected one tensor for each parameter that requires a gradient, sharded as it is")
        return torch.cat([vectors.local(v.detach()).reshape(-1).to(self.device, self.dtype) for v, _ in pairs])

    def split(self, flat: Tensor) -> list[Tensor]:
        return [vectors.like(part.view(vectors.local(p).shape).to(dtype), p) for part, p, dtype in
                zip(flat.split(self.numels), self.parameters, self._dtypes, strict=True)]

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
    def session(self, *, check: bool = True) -> Iterator[None]:
        if self._depth:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self.objective.session())
            stack.enter_context(self._kernels())
            if check:
                self.objective.check()
            self._forget()
            self._depth = 1
            try:
                yield
            finally:
                self._depth = 0
                self._forget()

    def _kernels(self) -> AbstractContextManager[None]:
        return nullcontext() if self.product == "finite_difference" else second_derivatives(self.objective)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        self._forget()
        with self.session():
            yield

    def _forget(self) -> None:
        self._kept: dict[int, tuple[float, Apply]] = {}
        self._weights: list[float] | None = None
        self._room: float | None = None

    def _product(self, v: Tensor) -> Tensor:
        if self._depth:
            return self._mean(v)
        with self.objective.session(), self._kernels():
            return self._mean(v)

    def _products(self, block: Tensor) -> Tensor:
        with self.session():
            if self.vmap and len(block) > 1:
                try:
                    return self._mean(block)
                except RuntimeError as error:
                    if "vmap" not in str(error) and "batching rule" not in str(error).lower():
                        raise
                    self.vmap = False
            return torch.stack([self._mean(v) for v in block])

    def _mean(self, v: Tensor) -> Tensor:
        """Σ n_b A_b v / Σ n_b, for v of shape (n,) or a block (b, n)."""
        try:
            return self._weighted(v)
        except CheckpointError:     # checkpointed layers run again outside ``Smooth``
            if not self._smooth:
                raise
        self._smooth = False
        self._forget()
        return self._weighted(v)

    def _weighted(self, v: Tensor) -> Tensor:
        batched = v.dim() == 2
        vs = [part.reshape(v.shape[:-1] + shape).to(dtype) for part, shape, dtype in
              zip(v.split(self.numels, -1), self.shapes, self._dtypes, strict=True)]
        out, first = None, 1.0
        for weight, apply, keep in self._maps():
            rows = apply(vs, keep, batched)
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

    def _maps(self) -> Iterator[tuple[float, Apply, bool]]:
        """Weight and linear map of each batch, and whether the map will be used again."""
        if self._weights is not None and len(self._kept) == len(self._weights):
            for weight, apply in self._kept.values():
                yield weight, apply, True
            return
        if self._room is None:
            caching = self._depth and self.product in ("auto", "cached")
            self._room = memory.available(self.device) / 2 if caching else -1.0
        weights = []
        for term in self.objective.terms():
            weights.append(term.weight)
            if term.index in self._kept:
                yield *self._kept[term.index], True
                continue
            apply = self._linearized(term)
            if keep := self._room > 0:
                self._kept[term.index] = (term.weight, apply)
            yield term.weight, apply, keep
            del apply
        if self._weights is None:
            self._weights = weights

    def _linearized(self, term: Term) -> Apply:
        assert self._room is not None
        with torch.enable_grad(), Smooth() if self._smooth else nullcontext():
            if self._room <= 0 or self.objective.single:    # one batch: its graph is needed in any case
                return self._linearize(term, self.parameters)
            with memory.Meter() as meter:
                apply = self._linearize(term, self.parameters)
        self._room -= meter.bytes
        return apply


class _Call(nn.Module):
    """A function of one batch as the forward of a module, so that ``functional_call`` can exchange its parameters."""

    def __init__(self, model: nn.Module, function: Callable[[Term], Any]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, term: Term) -> Any:
        return self.function(term)


def on_module(term: Term, w: list[nn.Parameter], function: Callable[[Term], Any]) -> tuple[Callable[..., Any], Any]:
    """A function of one batch as a pure function of a tuple of parameters, and the parameters as they are."""
    names = {id(p): name for name, p in term.objective.model.named_parameters()}
    keys = [f"model.{names[id(p)]}" for p in w]
    module = _Call(term.objective.model, function)
    module.training = term.objective.model.training

    def pure(values: tuple[Tensor, ...]) -> Any:
        return torch.func.functional_call(module, dict(zip(keys, values, strict=True)), (term,))

    return pure, tuple(p.detach() for p in w)


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
