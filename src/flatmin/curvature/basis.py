"""The rows of an orthonormal basis: on the device, on the host or in a file, with products by blocks of columns."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Literal

import torch
from torch import Tensor

from . import memory

Place = Literal["device", "host", "disk"]

_COLUMNS = 1 << 16


class Basis:
    """Room for ``rows`` vectors of n numbers, one contiguous tensor (rows, n); coefficients are float64 on the CPU."""

    def __init__(self, rows: int, n: int, dtype: torch.dtype, device: torch.device, place: Place = "device",
                 folder: str | None = None):
        assert rows > 0
        self.device = device
        needed = rows * n * torch.empty(0, dtype=dtype).element_size()
        remedy = 'take a smaller basis= or k, or place="host" or "disk", or eigenvalues() for values alone'
        if place == "disk":
            folder = folder or tempfile.gettempdir()
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise MemoryError(f"a basis of {memory.size(needed)} for {folder}, where {memory.size(free)} are free")
            handle, file = tempfile.mkstemp(prefix="flatmin-basis-", dir=folder)
            os.truncate(handle, needed)
            os.close(handle)
            self.rows = torch.from_file(file, shared=True, size=rows * n, dtype=dtype).view(rows, n)
            os.unlink(file)  # the mapping keeps it alive, and nothing is left behind after a kill
        else:
            where = device if place == "device" else torch.device("cpu")
            memory.require(needed, where, f"a basis of {rows} vectors", remedy)
            self.rows = torch.empty(rows, n, dtype=dtype, device=where)

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> Basis:
        """Orthonormal rows that exist already."""
        basis = cls.__new__(cls)
        basis.rows, basis.device = rows, device
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
        return torch.mv(self.rows[:count], w.to(self.rows.device))

    def remove(self, w: Tensor, count: int) -> Tensor:
        """w ← w − VᵀV w for the first rows, in place; the coefficients that were removed, float64 on the CPU."""
        if count == 0:
            return torch.zeros(0, dtype=torch.float64)
        c = self.project(w, count)
        if w.device == self.rows.device:
            w.addmv_(self.rows[:count].T, c, alpha=-1)
        else:
            w.sub_(torch.mv(self.rows[:count].T, c).to(w.device))
        return c.to("cpu", torch.float64)

    def rotate(self, s: Tensor, count: int) -> None:
        """The first p rows ← sᵀ · first ``count`` rows, for s of shape (count, p), in place."""
        s = s.to(self.rows.device, self.rows.dtype)
        for columns in self.rows.split(_COLUMNS, 1):
            columns[:s.shape[1]] = s.T @ columns[:count]

    def combine(self, s: Tensor, count: int) -> Tensor:
        """sᵀ · first ``count`` rows as a new tensor (p, n) where the basis is."""
        return s.to(self.rows.device, self.rows.dtype).T @ self.rows[:count]
