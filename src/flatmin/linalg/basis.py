"""The rows of an orthonormal basis: on the device, on the host or in a file."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import memory
from .checkpoint import Journal
from .operator import CurvatureOperator

Place = Literal["device", "host", "disk"]

_COLUMNS = 1 << 16
_STREAM = 1 << 20
"""Numbers of a row handled at once: float32 sums over more of them lose digits."""


class Basis:
    """Room for ``count`` vectors of an operator, ``rows`` (count, n), contiguous; coefficients are float64 on the CPU.

    Where vectors are sharded over ranks so are the rows, and coefficients are sums over the ranks.
    """

    def __init__(self, operator: CurvatureOperator, count: int, place: Place = "device", folder: str | None = None,
                 file: str | None = None):
        assert count > 0
        self.operator, self.device, self.folder, self.on_disk = operator, operator.device, folder, place == "disk"
        n = operator.length
        if self.on_disk:
            self.rows = memory.mapped(count * n, operator.dtype, folder, file).view(count, n)
            return
        where = self.device if place == "device" else torch.device("cpu")
        needed = count * n * torch.empty(0, dtype=operator.dtype).element_size()
        memory.require(needed, where, f"a basis of {count} vectors", 'take a smaller basis= or k, or place="host" or '
                                                                    '"disk", or eigenvalues() for values alone')
        self.rows = torch.empty(count, n, dtype=operator.dtype, device=where)

    @classmethod
    def of(cls, operator: CurvatureOperator, rows: Tensor) -> Basis:
        """Orthonormal rows that exist already."""
        basis = cls.__new__(cls)
        basis.operator, basis.rows, basis.device, basis.on_disk, basis.folder = operator, rows, operator.device, \
            False, None
        return basis

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, i: int) -> Tensor:
        """Row i on the operator's device."""
        return self.rows[i].to(self.device)

    def put(self, i: int, v: Tensor, factor: float = 1.0) -> None:
        """Row i ← factor · v."""
        if v.device == self.rows.device:
            torch.mul(v, factor, out=self.rows[i])
        else:
            self.rows[i].copy_(v.mul(factor))

    def project(self, w: Tensor, count: int) -> Tensor:
        """The coefficients (count,) of w along the first rows."""
        w = w.to(self.rows.device)
        if len(w) <= _STREAM:
            return self.operator.reduce(torch.mv(self.rows[:count], w))
        c = torch.zeros(count, dtype=torch.float64, device=w.device)
        for a in range(0, len(w), _STREAM):
            piece = w[a:a + _STREAM]
            if self.on_disk:    # one row after the other, so that the file is read in long pieces
                c += torch.stack([torch.dot(row[a:a + _STREAM], piece) for row in self.rows[:count]])
            else:
                c += torch.mv(self.rows[:count, a:a + _STREAM], piece)
        return self.operator.reduce(c)

    def remove(self, w: Tensor, count: int) -> Tensor:
        """w ← w − VᵀV w for the first rows, in place; the coefficients that were removed, float64 on the CPU."""
        if count == 0:
            return torch.zeros(0, dtype=torch.float64)
        c = self.project(w, count)
        if self.on_disk and w.device == self.rows.device and len(w) > _STREAM:
            for a in range(0, len(w), _STREAM):
                piece = w[a:a + _STREAM]
                for row, factor in zip(self.rows[:count], c.tolist(), strict=True):
                    piece.add_(row[a:a + _STREAM], alpha=-factor)
        elif w.device == self.rows.device:
            w.addmv_(self.rows[:count].T, c.to(w.dtype), alpha=-1)
        else:
            w.sub_(torch.mv(self.rows[:count].T, c.to(w.dtype)).to(w.device))
        return c.to("cpu", torch.float64)

    def rotate(self, s: Tensor, count: int, waiting: int = 0, journal: Journal | None = None) -> None:
        """The first p rows ← sᵀ · first ``count`` rows, for s of shape (count, p), in place; then those that wait.

        With a ``journal`` the same call resumes where a killed one was.
        """
        p = s.shape[1]
        s = s.to(self.rows.device, self.rows.dtype)
        for i, columns in enumerate(self.rows.split(_COLUMNS, 1)):
            if journal is not None and not journal.enter(i, columns[:p + waiting]):
                continue
            tail = columns[count:count + waiting].clone()
            columns[:p] = s.T @ columns[:count]
            columns[p:p + waiting] = tail

    def combine(self, s: Tensor, count: int) -> Tensor:
        """sᵀ · first ``count`` rows as a new tensor (p, n) where the basis is."""
        s = s.to(self.rows.device, self.rows.dtype)
        if not self.on_disk:
            return s.T @ self.rows[:count]
        p, n = s.shape[1], self.rows.shape[1]
        out = memory.mapped(p * n, self.rows.dtype, self.folder).view(p, n)
        for a in range(0, n, _STREAM):
            out[:, a:a + _STREAM] = s.T @ self.rows[:count, a:a + _STREAM]
        return out
