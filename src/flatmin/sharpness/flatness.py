"""Curvature measured in units of the weights: it does not change when a ReLU network is rescaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .. import parallel, vectors
from ..curvature import Hessian
from ..linalg.confidence import add_forms, data_stderr
from ..linalg.operator import CurvatureOperator, Forms
from ..objective import Objective
from ..results import PerBatch, Scalar
from .average_case import mean_and_error
from .cautions import warn_of

Kind = Literal["element", "row", "column", "row_column"]


@dataclass(frozen=True, kw_only=True)
class NormalizedFlatness(Scalar):
    """``value`` = Σᵢ wᵢ² Hᵢᵢ or a relative of it; ``layers`` its parts by parameter name."""

    data_stderr: float = math.nan   # over batches, of "element" alone; nan where there are fewer than five
    layers: dict[str, float]
    exact: bool         # the diagonal of H by one matvec a parameter, rather than from random vectors
    products: int
    clipped: float      # the share of |diagonal| that was negative and set to 0; only the relatives clip
    batches: Forms | None = field(default=None, repr=False)     # weights and values of the batches, of "element"

    @property
    def per_batch(self) -> PerBatch:
        """The value on each batch of all ranks."""
        n, values = self.batches or (torch.empty(0), torch.empty(0))
        return PerBatch(values=tuple(values.tolist()), weights=tuple(n.tolist()), of_all_ranks=True)


def normalized_flatness(objective: Objective, kind: Kind = "element", *, samples: int = 100,
                        seed: int | torch.Generator = 0) -> NormalizedFlatness:
    """Σᵢ wᵢ² Hᵢᵢ and its row- and column-wise relatives: large is sharp.

    With h the diagonal of H, per tensor W with rows i (its first dimension) and columns j (its second):

    * "element": Σ_ij h_ij W_ij², of either sign: 2/ρ² times element-adaptive average-case sharpness for small ρ.
    * "row": 2 Σᵢ ‖W_i·‖ √(Σⱼ h_ij), the least value of Σ_ij [h_ij σᵢ² + W_ij²/σᵢ²] over σ: a noise level a row.
    * "column": the same with a noise level a column.
    * "row_column": the least value of Σ_ij [h_ij (σᵢσ'ⱼ)² + W_ij²/(σᵢσ'ⱼ)²], convex in the logarithms.

    Multiplying the weights into a ReLU unit by a and those out of it by 1/a changes neither "element" nor
    "row_column". "row" is invariant to factors on rows only, "column" on columns only. Biases and other tensors of one
    dimension have a noise level an element. The idea of a noise that factors over rows and columns is that of
    Y. Tsuzuku et al., arXiv 1901.04653; these formulas are this library's and are not claimed to be that paper's.

    Args:
        objective: L.
        samples: Hessian-vector products at most. Where there are no more parameters than that, the diagonal is exact.
        seed: of the random signs z in c² ∘ h ≈ mean (c∘z) ∘ H(c∘z). "element" takes c = w: its sum is unbiased and has
            a standard error. The relatives take for c the size of w by row and column (its geometric means, or the one
            of them that ``kind`` has), so that the estimate is invariant to just what they are; they set its negative
            entries to 0 (``clipped``), which makes them too large for few samples, and have no standard error.

    Raises:
        ValueError: an unknown kind, fewer than two samples, or rows and columns of sharded parameters.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> with torch.no_grad(): _ = model.weight.fill_(3.0)
    >>> normalized_flatness(Objective(model, torch.nn.MSELoss(), (torch.ones(8, 1), torch.zeros(8, 1)))).value
    18.0
    """
    if kind not in ("element", "row", "column", "row_column"):
        raise ValueError(f'kind must be "element", "row", "column" or "row_column", got {kind!r}')
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    space = vectors.Space(objective.parameters)
    w = [parallel.local(p.detach()) for p in objective.parameters]
    if space.sharded and kind != "element":
        raise ValueError(f"kind={kind!r} needs whole parameters, and these are spread over ranks: gather the model, "
                         'or use kind="element"')
    names = [name for name, p in objective.model.named_parameters() if p.requires_grad]
    with objective.session(check=True):
        at = objective.evaluate()
        H = Hessian(objective)
        exact = H.size <= samples and not space.sharded
        stderr, clipped, products, forms = math.nan, 0.0, H.size if exact else samples, None
        if exact:
            h, forms = _diagonal(H, w if kind == "element" else None)
        else:
            c = w if kind == "element" else [_size(t, kind) for t in w]
            h, stderr, forms = _estimate(H, space, c, samples, vectors.seeded(seed))
            if kind != "element":
                h = [torch.where(b > 0, d.double() / b.double().square(), 0) for d, b in zip(h, c, strict=True)]
        if kind == "element":
            each = [(d.double() * (t.double().square() if exact else 1)).sum() for d, t in zip(h, w, strict=True)]
            parts = space.reduce_each(torch.stack(each)).tolist()
        else:
            size = math.fsum(float(d.abs().sum()) for d in h)
            clipped = math.fsum(float(d.clamp(max=0).abs().sum()) for d in h) / size if size else 0.0
            parts = [_least(d.double().clamp(min=0), t.double(), kind) for d, t in zip(h, w, strict=True)]
    warn_of(objective, at)
    element = kind == "element"
    error = data_stderr(forms) if element else None
    return NormalizedFlatness(value=math.fsum(parts), stderr=stderr if element else math.nan,
                              data_stderr=math.nan if error is None else error, batches=forms if element else None,
                              layers=dict(zip(names, parts, strict=True)), exact=exact, products=products,
                              clipped=clipped, settings={"kind": kind, "samples": samples, "mode": objective.mode})


def _estimate(H: CurvatureOperator, space: vectors.Space, c: Sequence[Tensor], samples: int,
              generator: torch.Generator) -> tuple[list[Tensor], float, Forms | None]:
    """The diagonal of CHC from random signs, the standard error of its sum, and its sum by batches."""
    total = [torch.zeros_like(t) for t in c]
    sums, forms = [], None
    with H.session():
        for _ in range(samples):
            z = space.random(generator, "rademacher")
            v = [a * b for a, b in zip(z, c, strict=True)]
            product, here = H.matvec_with_forms(H.join(v))
            forms = add_forms(forms, here, 1 / samples)
            row = [a * parallel.local(b) for a, b in zip(v, H.split(product), strict=True)]
            torch._foreach_add_(total, row, alpha=1 / samples)
            sums.append(float(space.reduce(torch.stack([t.sum(dtype=torch.float64) for t in row]))))
    return total, mean_and_error(sums)[1], forms


def _diagonal(H: CurvatureOperator, w: Sequence[Tensor] | None) -> tuple[list[Tensor], Forms | None]:
    """The diagonal of H by one product a parameter, and with w also Σ wᵢ² Hᵢᵢ by batches."""
    if w is None:
        return H.split(H.dense().diagonal()), None
    squares, forms = H.join(list(w)).square(), None
    diagonal = torch.zeros_like(squares)
    with H.session():
        for i, e in enumerate(torch.eye(H.size, dtype=H.dtype, device=H.device)):
            product, here = H.matvec_with_forms(e)
            diagonal[i] = product[i]
            forms = add_forms(forms, here and (here[0], here[1] * float(squares[i])))
    return H.split(diagonal), forms


def _size(w: Tensor, kind: str) -> Tensor:
    """The size of each weight that follows a rescaling of rows, columns or both; |w| of a tensor of one dimension.

    Rows and columns: exp(rᵢ + sⱼ) fitted to |W| by least squares in the logarithm, over the entries that are not zero.
    """
    if w.dim() < 2:
        return w.abs()
    q = w.double().square().reshape(*w.shape[:2], -1).sum(-1)
    if kind == "row_column":
        r, s = _factors(q)
        size = (r[:, None] * s).sqrt()
    else:
        along = 1 if kind == "row" else 0
        size = q.mean(along, keepdim=True).sqrt().expand_as(q)
    return size.to(w.dtype).reshape(*q.shape, *[1] * (w.dim() - 2)).expand_as(w)


def _factors(q: Tensor, steps: int = 1000) -> tuple[Tensor, Tensor]:
    """Factors by row and column whose products fit the entries of q that are not zero; 0 for rows without any."""
    there = q > 0
    logs = torch.where(there, q, 1).log()
    rows, columns = there.sum(1).clamp(min=1), there.sum(0).clamp(min=1)
    s = torch.zeros_like(logs[0])
    for _ in range(steps):      # the first round is exact where no entry is zero
        r = torch.where(there, logs - s, 0).sum(1) / rows
        s, before = torch.where(there, logs - r[:, None], 0).sum(0) / columns, s
        if float((s - before).abs().max()) < 1e-14:
            break
    return torch.where(there.any(1), r.exp(), 0), torch.where(there.any(0), s.exp(), 0)


def _least(h: Tensor, w: Tensor, kind: str) -> float:
    """The least value of Σ h s + w²/s over noise levels s > 0 of the given form."""
    if w.dim() < 2:
        return 2 * float((w.abs() * h.sqrt()).sum())
    h, q = (t.reshape(*t.shape[:2], -1).sum(-1) for t in (h, w.square()))
    if kind != "row_column":
        along = 1 if kind == "row" else 0
        return 2 * float((h.sum(along) * q.sum(along)).sqrt().sum())
    return _row_column(h, q)


def _row_column(h: Tensor, q: Tensor, steps: int = 2000, tol: float = 1e-12) -> float:
    """inf over s, t > 0 of Σ_ij h_ij sᵢtⱼ + q_ij/(sᵢtⱼ), by turns in s and t, each in closed form."""
    h, q = _with_both(h, q)
    if h.numel() == 0:
        return 0.0
    t, value = _factors(q)[1], math.inf         # a start that follows a rescaling, as all that comes after
    for _ in range(steps):
        s = ((q / t).sum(1) / (h * t).sum(1)).sqrt()
        a, b = (h * s[:, None]).sum(0), (q / s[:, None]).sum(0)
        t = (b / a).sqrt()
        before, value = value, 2 * float((a * b).sqrt().sum())
        if not before - value > tol * value:
            break
    return min(before, value)


def _with_both(h: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rows and columns in which h or q is zero throughout: there the least value is zero."""
    while h.numel():
        rows, columns = ((h.sum(i) > 0) & (q.sum(i) > 0) for i in (1, 0))
        if bool(rows.all()) and bool(columns.all()):
            break
        h, q = h[rows][:, columns], q[rows][:, columns]
    return h, q
