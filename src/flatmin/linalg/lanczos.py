"""Thick-restart band Lanczos with full re-orthogonalisation: the recurrence alone, without a stopping rule.

A V_m = V_m T + V_b R, with V orthonormal rows in the operator's dtype, V_b the next b of them (b = 1 is the usual
Lanczos recurrence; b start vectors see b copies of a multiple eigenvalue) and T, R small float64 matrices. Where the
Krylov space is exhausted (R = 0) it continues from a random vector orthogonal to V, which is how further copies come
in. K. Wu, H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616; A. Ruhe, Math. Comp. 33 (1979) 680-687.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .basis import Basis
from .checkpoint import Journal, State
from .operator import CurvatureOperator, Forms

_KEPT = ("count", "filled", "matvecs", "breakdowns", "thick", "scale", "unit", "forms")


class BandLanczos:
    """The first ``count`` of ``filled`` orthonormal vectors V have been multiplied by A; the others, at most b, wait.

    ``F`` (filled, filled) holds VᵀAV as far as it is known: T its leading block of ``count``, R the rows below that.
    """

    def __init__(self, operator: CurvatureOperator, basis: Basis, generator: torch.Generator, *, block: int = 1,
                 locked: Basis | None = None, start: bool = True):
        self.operator, self.V, self.generator = operator, basis, generator
        self.locked = locked
        self.room = operator.size - (0 if locked is None else len(locked))
        self.block = min(block, self.room)
        self.capacity = min(len(basis) - self.block, self.room)
        self.F = torch.zeros(len(basis), len(basis), dtype=torch.float64)
        self.count = self.filled = self.matvecs = self.breakdowns = self.thick = 0
        self.scale = 0.0        # the largest ‖Av‖ seen: what "small" is measured by
        self.unit = 1.0         # a power of two that A is multiplied by, so that squares neither over- nor underflow
        self.forms: Forms | None = None     # of the first vector, where it is multiplied alone
        self.eps = torch.finfo(operator.dtype).eps
        self._waiting: list[Tensor] = []
        for _ in range(self.block if start else 0):     # what is resumed has its vectors
            self._append_random()

    @property
    def complete(self) -> bool:
        """Whether V spans the whole space, so that T has all eigenvalues."""
        return self.count == self.room

    def step(self) -> None:
        """One matvec; T grows by a row."""
        j = self.count
        assert j < self.capacity
        v = self.V[j]
        w = self._multiply(v)
        alpha = self.operator.dot(w, v)
        if not math.isfinite(alpha):
            raise ValueError("a matvec is not finite: the loss overflows at these weights")
        self.F[j, j] = alpha
        w.add_(v, alpha=-alpha)
        for i in range(max(self.thick, j - self.block), j):
            w.add_(self.V[i], alpha=-float(self.F[j, i]))
        removed = self._clean(w, couple=j)
        beta = self.operator.norm(w)
        if removed > 0.1 * beta:
            self._clean(w)
            beta = self.operator.norm(w)
        if not math.isfinite(beta):
            raise ValueError("a matvec is not finite: the loss overflows at these weights")
        self.scale = max(self.scale, abs(alpha), removed, beta)
        self.count = j + 1
        if self.filled == self.room:
            return
        if beta <= 20 * self.eps * self.scale:
            self.breakdowns += 1
            self._append_random()
            return
        if beta <= 1e3 * self.eps * self.scale:     # mostly rounding: make sure that it is orthogonal
            w.div_(beta)
            self._clean(w)
            self.V.put(self.filled, w, 1 / self.operator.norm(w))
        else:
            self.V.put(self.filled, w, 1 / beta)
        self.F[self.filled, j] = self.F[j, self.filled] = beta
        self.filled += 1

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,), coefficients (m, m) of the Ritz vectors as columns, and residual norms (m,)."""
        m = self.count
        theta, s = torch.linalg.eigh(self.F[:m, :m])
        return theta, s, torch.linalg.vector_norm(self.F[m:self.filled, :m] @ s, dim=0)

    def restart(self, s: Tensor, theta: Tensor, journal: Journal | None = None) -> None:
        """Keep the Ritz vectors with coefficients s (m, p) and values θ (p,), and the vectors that wait."""
        p, m, waiting = s.shape[1], self.count, self.filled - self.count
        couplings = self.F[m:self.filled, :m] @ s
        self.V.rotate(s, m, waiting, journal)
        self.F.zero_()
        self.F[range(p), range(p)] = theta
        self.F[p:p + waiting, :p] = couplings
        self.F[:p, p:p + waiting] = couplings.T
        self.count, self.filled, self.thick = p, p + waiting, p
        self._waiting = []

    def state(self, with_basis: bool = True) -> State:
        """What ``resume`` needs, as tensors and numbers; the basis too, unless it is kept elsewhere."""
        rows = self.V.rows
        rows = rows[:self.filled] if with_basis else rows.new_empty(0, rows.shape[1])     # a view would be saved whole
        return {name: getattr(self, name) for name in _KEPT} | {
            "F": self.F, "V": rows, "generator": self.generator.get_state()}

    def resume(self, state: State) -> None:
        """Continue from a ``state``."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.F.copy_(state["F"])
        self.V.rows[:len(state["V"])].copy_(state["V"])
        self.generator.set_state(state["generator"])
        self._waiting = []

    def _multiply(self, v: Tensor) -> Tensor:
        if not self._waiting:
            ready = self.V.rows[self.count:min(self.filled, self.capacity)]
            if len(ready) > 1:
                self._waiting = list(self.operator.matmat(ready.to(self.V.device)))
            elif self.matvecs == 0:
                w, self.forms = self.operator.matvec_with_forms(v)
                self._waiting = [w]
            else:
                self._waiting = [self.operator.matvec(v)]
        w = self._waiting.pop(0)
        self.matvecs += 1
        if self.matvecs == 1:
            self.unit = self.operator.unit_for(w)
        return w.mul_(self.unit) if self.unit != 1 else w

    def _clean(self, w: Tensor, couple: int | None = None) -> float:
        """Make w orthogonal to the locked vectors and to V; how much was removed.

        With ``couple=j``, w is Av_j, and what it has along vectors that wait is an entry of VᵀAV.
        """
        removed = 0.0 if self.locked is None else float(self.locked.remove(w, len(self.locked)).norm())
        c = self.V.remove(w, self.filled)
        if couple is not None and couple + 1 < self.filled:
            new = c[couple + 1:]
            self.F[couple + 1:self.filled, couple] = new
            self.F[couple, couple + 1:self.filled] = new
        return max(removed, float(c.norm()))

    def _append_random(self) -> None:
        """One more row: a random unit vector orthogonal to all others."""
        if self.filled == self.room:
            return
        for _ in range(5):
            w = self.operator.random(self.generator)
            w.div_(self.operator.norm(w))
            for _ in range(3):
                self._clean(w)
                length = self.operator.norm(w)
                if length < 1e-3 / math.sqrt(self.operator.size):
                    break
                w.div_(length)
            else:
                self.V.put(self.filled, w)
                self.filled += 1
                return
        raise ArithmeticError("no direction orthogonal to the basis was found in this precision: use float64")
