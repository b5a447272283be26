"""CurvatureOperator: a symmetric matrix known by its matvecs, never built; and sums, scalings and blocks of such."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from .. import parallel, vectors

Vectors = Tensor | Sequence[Tensor]
Forms = tuple[Tensor, Tensor]
"""Quadratic forms batch by batch. For A = Σ_b n_b A_b / Σ_b n_b: the weights n_b and vᵀA_b v, (B,) float64, CPU."""


class CurvatureOperator(ABC):
    """A symmetric n × n matrix A with ``size`` n, of which only matvecs v ↦ Av are known.

    Vectors are lists of tensors in the order of the parameters, or one flat tensor of n numbers; the answer has the
    form of the argument. ``A @ v``, ``A + B``, ``2 * A``, ``-A``, ``A - B`` are matvecs, sums and scalings,
    ``A.restrict(names)`` is a principal block, ``A.preconditioned(d)`` is D^½ A D^½.

    A subclass implements ``_matvec`` (flat in, a new flat tensor out). It may override ``matmat`` for several vectors,
    ``matvec_with_forms`` where A is a mean over batches, and ``session`` where matvecs share work. Where the parameters
    are sharded over ranks, so are vectors: a flat one is this rank's ``length`` of the ``size`` numbers, and ``dot``,
    ``norm`` and ``reduce`` are over all of them.

    Args:
        like: tensors whose shapes, dtypes and sharding the parts of a vector have.
        names: of these parts.
        dtype: of flat vectors; by default the widest of ``like``, and float32 for half precisions.
        device: of flat vectors; by default that of the first tensor.
    """

    def __init__(self, like: Sequence[Tensor], names: Sequence[str] = (), *, dtype: torch.dtype | None = None,
                 device: torch.device | None = None):
        self.like: list[Any] = list(like)
        local = [parallel.local(t.detach()) for t in self.like]
        self.shapes, self.names = [t.shape for t in self.like], list(names)
        self.numels = [t.numel() for t in local]
        self.size, self.length = sum(s.numel() for s in self.shapes), sum(self.numels)
        if self.size == 0:
            raise ValueError("the operator has no coordinates: no parameter requires a gradient")
        widest = functools.reduce(torch.promote_types, (t.dtype for t in local))
        self.dtype = dtype or (torch.float32 if widest in vectors.HALF else widest)
        self.device = device or local[0].device
        groups = {parallel.shard_groups(t) for t in self.like}
        if len(groups) > 1:
            raise ValueError("some parameters are sharded over other ranks than others, or not at all: pass "
                             "parameters= with those of one kind")
        self._shard_groups = groups.pop()

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """Av for a flat v, as a new tensor."""

    def matmat(self, rows: Tensor) -> Tensor:
        """Av for each row v of a block (b, n), as the rows of another one."""
        return torch.stack([self._matvec(v) for v in rows])

    def matvec_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        """Av, and vᵀA_b v of every batch b; None where A is no mean over batches that are seen one by one."""
        return self._matvec(v), None

    @contextmanager
    def session(self, *, check: bool = True) -> Iterator[None]:
        """Matvecs inside may share work; the weights must not change until it ends.

        ``check``: first make sure that two evaluations agree, where that can fail.
        """
        yield

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Matvecs inside share no work with those before."""
        with self.session():
            yield

    @property
    def rank(self) -> int:
        """The number of this process among those that compute together."""
        return 0

    def smallest(self, number: int) -> int:
        """The smallest ``number`` of all ranks that compute together."""
        return number

    def reduce(self, t: Tensor, op: str = "sum") -> Tensor:
        """The sum ("max": the maximum) of t over the ranks that hold the other shards of vectors; may overwrite t."""
        for group in self._shard_groups:
            dist = torch.distributed
            dist.all_reduce(t, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
        return t

    def dot(self, a: Tensor, b: Tensor) -> float:
        """aᵀb of flat vectors, blocks summed in float64."""
        return float(self.reduce(vectors.dots([a], [b]))[0])

    def norm(self, a: Tensor) -> float:
        """‖a‖ of a flat vector, blocks summed in float64; also where squares in its dtype would over- or underflow."""
        length = float(self.reduce(vectors.sums_of_squares([a])).sqrt()[0])
        if 1e-12 < length < 1e15:
            return length
        unit = self.unit_for(a)
        return length if unit == 1 else float(self.reduce(vectors.sums_of_squares([a * unit])).sqrt()[0]) / unit

    def unit_for(self, a: Tensor) -> float:
        """A power of two by which squares of a flat vector neither over- nor underflow; mostly 1."""
        peak = torch.linalg.vector_norm(a, math.inf) if a.numel() else a.new_zeros(())
        top, limit = float(self.reduce(peak, "max")), 100 if a.dtype == torch.float32 else 1000
        if not math.isfinite(top) or top == 0 or 1e-9 < top < 1e9:
            return 1.0
        return 2.0 ** min(max(-round(math.log2(top)), -limit), limit)

    def empty(self) -> Tensor:
        """Memory for a flat vector."""
        return torch.empty(self.length, dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator, kind: str = "normal") -> Tensor:
        """A random flat vector ("normal" or "rademacher"), the same for a seed on every device and sharding."""
        out = self.empty()
        for piece, tensor in zip(out.split(self.numels), self.like, strict=True):
            if parallel.is_sharded(tensor):
                drawn = vectors.Space([tensor]).random(generator, kind)[0].reshape(-1)
            elif kind == "normal":
                drawn = torch.randn(len(piece), generator=generator, dtype=self.dtype, device=generator.device)
            else:
                drawn = vectors.signs(len(piece), generator, self.dtype)
            piece.copy_(drawn)
        return out

    @property
    def exact(self) -> bool:
        """Whether matvecs are exact to rounding."""
        return True

    @property
    def trusted(self) -> bool:
        """Whether no check has found that matvecs are of another matrix."""
        return True

    @property
    def name(self) -> str:
        """What records call this matrix."""
        return type(self).__name__

    def describe(self) -> dict[str, Any]:
        """Settings for the record of a measurement."""
        return {"operator": self.name, "size": self.size}

    def fingerprint(self) -> str:
        """What tells this matrix from another one of the same description, for a checkpoint."""
        v = self.random(vectors.seeded(0))
        w = self._matvec(v)
        return f"{self.norm(w):.6e} {self.dot(v, w):.6e}"

    @overload
    def matvec(self, vectors: Tensor) -> Tensor: ...
    @overload
    def matvec(self, vectors: Sequence[Tensor]) -> list[Tensor]: ...
    def matvec(self, vectors: Vectors) -> Vectors:
        """Av: a list of tensors for a list of tensors, a flat tensor (n,) for a flat tensor."""
        if isinstance(vectors, Tensor):
            if vectors.shape != (self.length,):
                raise ValueError(f"expected {self.length} numbers in one flat tensor, got shape {tuple(vectors.shape)}")
            return self._matvec(vectors.detach().to(self.device, self.dtype)).to(vectors)
        return self.split(self._matvec(self.join(vectors)))

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, vectors: Sequence[Tensor]) -> list[Tensor]: ...
    def __matmul__(self, vectors: Vectors) -> Vectors:
        """``A @ v`` as ``matvec``, and ``A @ V`` for a matrix (n, b) of columns."""
        if isinstance(vectors, Tensor) and vectors.dim() == 2:
            if vectors.shape[0] != self.length:
                raise ValueError(f"expected {self.length} rows, got shape {tuple(vectors.shape)}")
            with self.session():
                return self.matmat(vectors.detach().to(self.device, self.dtype).T.contiguous()).T.to(vectors)
        return self.matvec(vectors)

    def join(self, vs: Sequence[Tensor]) -> Tensor:
        """A list of tensors as one flat tensor; sharded parameters take sharded tensors, or local parts of them."""
        vs = list(vs)
        allowed = [(t.shape, parallel.local(t).shape) for t in self.like]
        if len(vs) != len(allowed) or any(v.shape not in shapes for v, shapes in zip(vs, allowed, strict=True)):
            raise ValueError(f"expected one tensor for each of the {len(self.shapes)} parameters that require a "
                             f"gradient, of their shapes; got {len(vs)} tensors"
                             + "".join(f"; number {i} has shape {tuple(v.shape)}, not {tuple(s)}" for i, (v, s) in
                                       enumerate(zip(vs, self.shapes, strict=False)) if v.shape != s))
        return torch.cat([parallel.local(v.detach()).reshape(-1).to(self.device, self.dtype) for v in vs])

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor as a list of tensors: views of it, where the parameters share its dtype."""
        return [parallel.like(part.view(parallel.local(t).shape).to(t.dtype), t) for part, t in
                zip(flat.split(self.numels), self.like, strict=True)]

    def restrict(self, parameters: str | nn.Module | Sequence[str | nn.Module]) -> CurvatureOperator:
        """The principal block of some parameters: names, names of modules (all parameters below), or modules."""
        return Restricted(self, positions(parameters, self.like, self.names))

    def preconditioned(self, diagonal: Vectors) -> CurvatureOperator:
        """D^½ A D^½ for a non-negative diagonal D: Adam's metric, |w|² for adaptive sharpness, ..."""
        return Preconditioned(self, diagonal if isinstance(diagonal, Tensor) else self.join(diagonal))

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        return Sum(self, other)

    def __sub__(self, other: CurvatureOperator) -> CurvatureOperator:
        return Sum(self, Scaled(other, -1.0))

    def __mul__(self, factor: float) -> CurvatureOperator:
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> CurvatureOperator:
        return Scaled(self, 1.0 / float(divisor))

    def __neg__(self) -> CurvatureOperator:
        return Scaled(self, -1.0)

    def dense(self) -> Tensor:
        """The matrix itself, (n, n), by n matvecs; symmetrised. For small n."""
        if self.length != self.size:
            raise ValueError("the parameters are sharded over ranks, so no rank can hold the dense matrix: use "
                             "eigenpairs or trace, or gather the model first")
        with self.session():
            a = self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return (a + a.T) / 2

    def to_numpy(self) -> Any:
        """The dense matrix as a NumPy array."""
        return self.dense().cpu().numpy()

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` of the same matvecs."""
        from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]

        def matvec(x: Any) -> Any:
            return self._matvec(torch.as_tensor(x.reshape(-1), dtype=self.dtype).to(self.device)).cpu().numpy()

        dtype = str(self.dtype).removeprefix("torch.")
        return LinearOperator((self.size, self.size), matvec=matvec, rmatvec=matvec, dtype=dtype)  # type: ignore[call-arg]


class Matrix(CurvatureOperator):
    """A dense symmetric tensor (n, n) as an operator.

    >>> A = Matrix(torch.diag(torch.tensor([3.0, 1.0])))
    >>> (A @ torch.ones(2)).tolist()
    [3.0, 1.0]
    """

    def __init__(self, matrix: Tensor):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
        self.matrix = matrix.detach().float() if matrix.dtype in vectors.HALF else matrix.detach()
        super().__init__([self.matrix.new_empty(len(matrix))])

    def _matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def matmat(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix


class _Combination(CurvatureOperator):
    """A matrix made of others on the same coordinates, or of one on some of them (``where``)."""

    def __init__(self, *operators: CurvatureOperator, where: Sequence[int] | None = None):
        first = operators[0]
        for other in operators[1:]:
            if other.shapes != first.shapes:
                raise ValueError(f"operators on different coordinates: sizes {first.size} and {other.size}")
        where = range(len(first.like)) if where is None else where
        super().__init__([first.like[i] for i in where], [first.names[i] for i in where] if first.names else [],
                         dtype=first.dtype, device=first.device)
        self.operators = operators

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

    @property
    def rank(self) -> int:
        return self.operators[0].rank

    def smallest(self, number: int) -> int:
        return self.operators[0].smallest(number)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"of": [operator.describe() for operator in self.operators]}


class Sum(_Combination):
    """A + B."""

    def _matvec(self, v: Tensor) -> Tensor:
        a, b = self.operators
        return a._matvec(v).add_(b._matvec(v))

    def matmat(self, rows: Tensor) -> Tensor:
        a, b = self.operators
        return a.matmat(rows).add_(b.matmat(rows))

    def matvec_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        (av, a), (bv, b) = (operator.matvec_with_forms(v) for operator in self.operators)
        av.add_(bv)     # batch by batch where both are means over batches of the same weights
        return av, (a[0], a[1] + b[1]) if a is not None and b is not None and torch.equal(a[0], b[0]) else None

    def restrict(self, parameters: Any) -> CurvatureOperator:
        a, b = self.operators
        return a.restrict(parameters) + b.restrict(parameters)


class Scaled(_Combination):
    """αA."""

    def __init__(self, operator: CurvatureOperator, factor: float):
        super().__init__(operator)
        self.factor = factor

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operators[0]._matvec(v).mul_(self.factor)

    def matmat(self, rows: Tensor) -> Tensor:
        return self.operators[0].matmat(rows).mul_(self.factor)

    def matvec_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        av, forms = self.operators[0].matvec_with_forms(v)
        return av.mul_(self.factor), forms and (forms[0], forms[1] * self.factor)

    def restrict(self, parameters: Any) -> CurvatureOperator:
        return self.operators[0].restrict(parameters) * self.factor

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"factor": self.factor}


class Preconditioned(_Combination):
    """D^½ A D^½ for a diagonal D ≥ 0, given as a flat tensor."""

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor):
        super().__init__(operator)
        if diagonal.shape != (self.length,) or bool((diagonal < 0).any()):
            raise ValueError(f"the diagonal must be {self.length} numbers, none negative")
        self.root = diagonal.detach().to(self.device, self.dtype).sqrt()

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operators[0]._matvec(v * self.root).mul_(self.root)

    def matmat(self, rows: Tensor) -> Tensor:
        return self.operators[0].matmat(rows * self.root).mul_(self.root)

    def matvec_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        av, forms = self.operators[0].matvec_with_forms(v * self.root)
        return av.mul_(self.root), forms


class Restricted(_Combination):
    """The principal block of the parameters at given positions, by padding with zeros."""

    def __init__(self, operator: CurvatureOperator, where: Sequence[int]):
        super().__init__(operator, where=where)
        self.where = list(where)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._block(self.operators[0]._matvec(self._padded(v)))

    def matvec_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        av, forms = self.operators[0].matvec_with_forms(self._padded(v))
        return self._block(av), forms

    def _padded(self, v: Tensor) -> Tensor:
        padded = self.operators[0].empty().zero_()
        parts = padded.split(self.operators[0].numels)
        for i, part in zip(self.where, v.split(self.numels), strict=True):
            parts[i].copy_(part)
        return padded

    def _block(self, whole: Tensor) -> Tensor:
        parts = whole.split(self.operators[0].numels)
        return torch.cat([parts[i] for i in self.where])


def positions(parameters: str | nn.Module | Sequence[str | nn.Module], like: Sequence[Tensor],
              names: Sequence[str]) -> list[int]:
    """Where in a list the parameters are that are named, lie below a named module, or belong to a module."""
    wanted = [parameters] if isinstance(parameters, (str, nn.Module)) else list(parameters)
    modules = [m for m in wanted if isinstance(m, nn.Module)]
    owned = {id(p) for m in modules for p in m.parameters()}
    found = {i for i, t in enumerate(like) if id(t) in owned}
    if modules and not found:
        raise ValueError("none of the modules holds a parameter of this operator")
    for name in (name for name in wanted if isinstance(name, str)):
        here = {i for i, n in enumerate(names) if n == name or n.startswith(name.rstrip(".") + ".")}
        if not here:
            raise ValueError(f"no parameter is called or lies below {name!r}; there are "
                             f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
        found |= here
    return sorted(found)


def require_operator(operator: Any) -> None:
    """Raise a TypeError that says what to write where something else is given to an algorithm."""
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(f"expected a CurvatureOperator, got {type(operator).__name__}: write Hessian(objective), with "
                        "objective = Objective(model, loss_fn, data)")
