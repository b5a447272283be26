"""CurvatureOperator: a symmetric matrix that is never built, known by its products, and what is made of several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from .. import vectors

Vectors = Tensor | Sequence[Tensor]
Forms = tuple[Tensor, Tensor]
"""For A = Σ_b n_b A_b / Σ_b n_b over batches b: the weights n_b and the values vᵀA_b v, (B,) float64 on the CPU."""


class CurvatureOperator(ABC):
    """A symmetric n × n matrix A with ``size`` n, of which only v ↦ Av is known.

    Vectors are lists of tensors in the order of the parameters, or one flat tensor of n numbers; the answer comes in
    the form of the question. ``A @ v``, ``A + B``, ``2 * A``, ``-A``, ``A - B`` are products, sums and scalings,
    ``A.restrict(names)`` a principal block, ``A.preconditioned(d)`` is D^½ A D^½.

    A subclass gives ``_product`` (flat in, a new flat tensor out) and, when it is worth it, ``_products`` for several
    vectors, ``_product_with_forms`` where A is a mean over batches, and ``session`` to keep what products share. Where
    parameters are sharded over ranks, so are vectors: a flat one is this rank's ``length`` of the ``size`` numbers, and
    ``dot``, ``norm`` and ``reduce`` are over all of them.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device,
                 names: Sequence[str] = (), dtypes: Sequence[torch.dtype] = ()):
        self.shapes = [torch.Size(s) for s in shapes]
        self.names = list(names)
        self.numels = [s.numel() for s in self.shapes]
        self.size = self.length = sum(self.numels)
        self.device = device
        self.rank = 0
        self.dtype = torch.float32 if dtype in vectors.HALF else dtype
        self._dtypes = list(dtypes) or [self.dtype] * len(self.shapes)
        if self.size == 0:
            raise ValueError("the operator has no coordinates: no parameter requires a gradient")

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """Av for a flat v of n numbers, as a new tensor."""

    def _products(self, block: Tensor) -> Tensor:
        """Rows v ↦ Av, for (b, n) → (b, n)."""
        return torch.stack([self._product(v) for v in block])

    def _product_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        """Av, and vᵀA_b v of every batch b; None where A is no mean over batches, or its batches are not seen."""
        return self._product(v), None

    @contextmanager
    def session(self, *, check: bool = True) -> Iterator[None]:
        """Products inside may share work; the weights must stay as they are until it ends.

        ``check``: first make sure that two evaluations agree, where that can fail.
        """
        yield

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Products inside share nothing with those before: what was kept is forgotten."""
        with self.session():
            yield

    def reduce(self, t: Tensor, op: str = "sum") -> Tensor:
        """The sum ("max": the maximum) of t over the ranks that hold the other shards of vectors; may overwrite t."""
        return t

    def agree(self, number: int) -> int:
        """The smallest ``number`` of all ranks that compute together."""
        return number

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
        """A power of two that brings a flat vector to a size whose squares neither over- nor underflow; mostly 1."""
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
        for i, piece in enumerate(out.split(self.numels)):
            piece.copy_(self._draw(i, generator, kind))
        return out

    def _draw(self, i: int, generator: torch.Generator, kind: str) -> Tensor:
        n, device = self.shapes[i].numel(), generator.device
        if kind == "normal":
            return torch.randn(n, generator=generator, dtype=self.dtype, device=device)
        return vectors.signs(n, generator, self.dtype)

    @property
    def exact(self) -> bool:
        """Whether products are exact to rounding."""
        return True

    @property
    def trusted(self) -> bool:
        """Whether no check has found that products are of another matrix."""
        return True

    def describe(self) -> dict[str, Any]:
        """Settings for the record of a measurement."""
        return {"operator": type(self).__name__, "size": self.size}

    def fingerprint(self) -> str:
        """What tells this matrix from another one of the same description, for a checkpoint."""
        v = self.random(vectors.seeded(0))
        w = self._product(v)
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
            return self._product(vectors.detach().to(self.device, self.dtype)).to(vectors)
        return self.split(self._product(self.join(vectors)))

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
                return self._products(vectors.detach().to(self.device, self.dtype).T.contiguous()).T.to(vectors)
        return self.matvec(vectors)

    def join(self, vectors: Sequence[Tensor]) -> Tensor:
        """A list of tensors as one flat tensor."""
        vectors = list(vectors)
        if [v.shape for v in vectors] != self.shapes:
            raise ValueError(f"expected one tensor for each of the {len(self.shapes)} parameters that require a "
                             f"gradient, of their shapes; got {len(vectors)} tensors"
                             + "".join(f"; number {i} has shape {tuple(v.shape)}, not {tuple(s)}" for i, (v, s) in
                                       enumerate(zip(vectors, self.shapes, strict=False)) if v.shape != s))
        return torch.cat([v.detach().reshape(-1).to(self.device, self.dtype) for v in vectors])

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor as a list of tensors: views of it, where the parameters share its dtype."""
        return [part.view(shape).to(dtype) for part, shape, dtype in
                zip(flat.split(self.numels), self.shapes, self._dtypes, strict=True)]

    def restrict(self, parameters: str | nn.Module | Sequence[str | nn.Module]) -> CurvatureOperator:
        """The principal block of some parameters: names, names of modules (all parameters below), or modules."""
        return Restricted(self, self.select(parameters))

    def select(self, parameters: str | nn.Module | Sequence[str | nn.Module]) -> list[int]:
        """The positions of named parameters in the list."""
        wanted = [parameters] if isinstance(parameters, (str, nn.Module)) else list(parameters)
        found: set[int] = set()
        for name in wanted:
            if isinstance(name, nn.Module):
                raise ValueError("modules can only be named over an Objective; pass parameter names")
            here = {i for i, n in enumerate(self.names) if n == name or n.startswith(name.rstrip(".") + ".")}
            if not here:
                raise ValueError(f"no parameter is called or lies below {name!r}; there are "
                                 f"{', '.join(self.names[:8])}{', ...' if len(self.names) > 8 else ''}")
            found |= here
        return sorted(found)

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
        """The matrix itself, (n, n), from n products; symmetrised. For small n."""
        if self.length != self.size:
            raise ValueError("the parameters are sharded over ranks, so no rank can hold the dense matrix: use "
                             "eigenpairs or trace, or gather the model first")
        with self.session():
            a = self._products(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return (a + a.T) / 2

    def to_numpy(self) -> Any:
        """The dense matrix as a NumPy array."""
        return self.dense().cpu().numpy()

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` of the same products."""
        from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]

        def matvec(x: Any) -> Any:
            return self._product(torch.as_tensor(x.reshape(-1), dtype=self.dtype).to(self.device)).cpu().numpy()

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
        super().__init__([matrix.shape[:1]], matrix.dtype, matrix.device)
        self.matrix = matrix.detach().to(self.dtype)

    def _product(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _products(self, block: Tensor) -> Tensor:
        return block @ self.matrix


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

    def _product_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        (av, a), (bv, b) = (operator._product_with_forms(v) for operator in self.operators)
        av.add_(bv)     # batch by batch where both are means over batches of the same weights
        return av, (a[0], a[1] + b[1]) if a is not None and b is not None and torch.equal(a[0], b[0]) else None

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

    def _product_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        av, forms = self.operators[0]._product_with_forms(v)
        return av.mul_(self.factor), forms and (forms[0], forms[1] * self.factor)

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

    def _product_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        av, forms = self.operators[0]._product_with_forms(v * self.root)
        return av.mul_(self.root), forms


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
        return self._block(self.operators[0]._product(self._padded(v)))

    def _product_with_forms(self, v: Tensor) -> tuple[Tensor, Forms | None]:
        av, forms = self.operators[0]._product_with_forms(self._padded(v))
        return self._block(av), forms

    def _padded(self, v: Tensor) -> Tensor:
        padded = self.operators[0].empty().zero_()
        pieces = padded.split(self.operators[0].numels)
        for i, part in zip(self.where, v.split(self.numels), strict=True):
            pieces[i].copy_(part)
        return padded

    def _block(self, whole: Tensor) -> Tensor:
        rows = whole.split(self.operators[0].numels)
        return torch.cat([rows[i] for i in self.where])


def require_operator(operator: Any) -> None:
    """Raise a TypeError that says what to write where something else is given to an algorithm."""
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(f"expected a CurvatureOperator, got {type(operator).__name__}: write Hessian(objective), with "
                        "objective = Objective(model, loss_fn, data)")
