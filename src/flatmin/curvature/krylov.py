"""Thick-restart Lanczos with full re-orthogonalisation: the recurrence alone, without a stopping rule.

It keeps A V = V T + r eᵀ, with V orthonormal, in the operator's dtype, and T a small float64 matrix. Where the Krylov
space is exhausted (r = 0) it goes on from a random vector orthogonal to V, which is how the other copies of a multiple
eigenvalue come in. K. Wu, H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import vectors
from .basis import Basis
from .operator import CurvatureOperator


def dot(a: Tensor, b: Tensor) -> float:
    """aᵀb, blocks summed in float64."""
    return float(vectors.dots([a], [b])[0])


def norm(a: Tensor) -> float:
    """‖a‖, blocks summed in float64."""
    return math.sqrt(float(vectors.sums_of_squares([a])[0]))


def random_vector(operator: CurvatureOperator, generator: torch.Generator, kind: str = "normal") -> Tensor:
    """A random flat vector, the same for a seed on every device."""
    dtype = torch.float64 if operator.dtype == torch.float64 else torch.float32
    if kind == "normal":
        v = torch.randn(operator.size, generator=generator, dtype=dtype, device=generator.device)
    else:
        v = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8, device=generator.device)
        v = v.to(dtype).mul_(2).sub_(1)
    return v.to(operator.device, operator.dtype)


class Krylov:
    """``count`` basis vectors have been multiplied by A; row ``count`` of V is the next one, unless V is complete."""

    def __init__(self, operator: CurvatureOperator, basis: Basis, generator: torch.Generator,
                 locked: Basis | None = None, locked_count: int = 0):
        self.operator, self.V, self.generator = operator, basis, generator
        self.locked, self.locked_count = locked, locked_count
        self.capacity = min(basis.rows.shape[0] - 1, operator.size - locked_count)
        self.T = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self.count = self.matvecs = self.breakdowns = 0
        self.thick = 0          # rows that are Ritz vectors of a restart, coupled to row ``thick`` only
        self.beta = 0.0         # length of r
        self.scale = 0.0        # largest |entry| of T and r seen: what "small" is measured by
        self.unit = 1.0         # a power of two that A is multiplied by, so that squares neither over- nor underflow
        self.eps = torch.finfo(operator.dtype).eps
        self._fresh_direction(0)

    @property
    def complete(self) -> bool:
        """Whether V spans the whole space, so that T has all eigenvalues."""
        return self.count + self.locked_count == self.operator.size

    def step(self) -> None:
        """One product; T grows by a row."""
        j = self.count
        assert j < self.capacity
        v = self.V[j]
        w = self._multiply(v)
        alpha = dot(w, v)
        if not math.isfinite(alpha):
            raise ValueError("a product with the matrix is not finite: the loss overflows at these weights")
        size = norm(w)
        self.T[j, j] = alpha
        w.add_(v, alpha=-alpha)
        if j > self.thick:
            w.add_(self.V[j - 1], alpha=-float(self.T[j, j - 1]))
        removed = self._clean(w, j + 1)
        beta = norm(w)
        if removed > 0.1 * beta:
            self._clean(w, j + 1)
            beta = norm(w)
        self.scale = max(self.scale, abs(alpha), size)
        self.count = j + 1
        if self.complete:
            self.beta = 0.0
        elif beta <= 20 * self.eps * self.scale:
            self.beta = 0.0
            self.breakdowns += 1
            self._fresh_direction(j + 1)
        else:
            self.beta = beta
            if beta <= 1e3 * self.eps * self.scale:     # mostly rounding: make sure that it is orthogonal
                w.div_(beta)
                self._clean(w, j + 1)
                beta = norm(w)
            self.V.put(j + 1, w, 1 / beta)
        if j + 1 < self.capacity:
            self.T[j, j + 1] = self.T[j + 1, j] = self.beta

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,), coefficients (m, m) of the Ritz vectors as columns, and residual norms (m,)."""
        theta, s = torch.linalg.eigh(self.T[:self.count, :self.count])
        return theta, s, self.beta * s[-1].abs()

    def restart(self, s: Tensor, theta: Tensor) -> None:
        """Keep the Ritz vectors with coefficients s (m, p) and values θ (p,), and the direction r."""
        p, m = s.shape[1], self.count
        last = self.V[m].clone()
        self.V.rotate(s, m)
        self.V.put(p, last)
        self.T.zero_()
        self.T[range(p), range(p)] = theta
        self.T[p, :p] = self.T[:p, p] = self.beta * s[-1]
        self.count = self.thick = p

    def _multiply(self, v: Tensor) -> Tensor:
        w = self.operator._product(v)
        self.matvecs += 1
        if self.matvecs == 1:
            top = float(w.abs().amax())
            if math.isfinite(top) and top > 0 and not 1e-9 < top < 1e9:
                limit = 100 if self.operator.dtype == torch.float32 else 1000
                self.unit = 2.0 ** min(max(-round(math.log2(top)), -limit), limit)
        return w.mul_(self.unit) if self.unit != 1 else w

    def _clean(self, w: Tensor, count: int) -> float:
        """Make w orthogonal to the locked vectors and the first ``count`` of V."""
        away = 0.0 if self.locked is None else self.locked.remove(w, self.locked_count)
        return max(self.V.remove(w, count), away)

    def _fresh_direction(self, i: int) -> None:
        """Row i ← a random unit vector orthogonal to all others."""
        if self.complete:
            return
        for _ in range(5):
            w = random_vector(self.operator, self.generator)
            w.div_(norm(w))
            for _ in range(3):
                self._clean(w, i)
                size = norm(w)
                if size < 1e-3 / math.sqrt(self.operator.size):
                    break
                w.div_(size)
            else:
                self.V.put(i, w)
                return
        raise ArithmeticError("no direction orthogonal to the basis was found in this precision: use float64")
