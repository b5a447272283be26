"""Two models side by side: every measure with its sign, and which of them may be compared at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import vectors
from ..curvature import Hessian, eigenpairs
from ..objective import Objective
from ..results import Scalar
from .cautions import DifferentScaleWarning
from .flatness import normalized_flatness
from .one_step import one_step
from .worst_case import worst_case

INVARIANT = ("adaptive_worst_case", "normalized_flatness")
MEASURES = ("one_step", "largest_eigenvalue", "worst_case", *INVARIANT)
SAME_SCALE = 1.25


@dataclass(frozen=True, kw_only=True)
class Side(Scalar):
    """One measure of two models: ``value`` = a − b, ``sign`` of it (0 within two standard errors)."""

    name: str
    a: float
    b: float
    sign: int
    invariant: bool     # whether it stays the same when a ReLU network is rescaled

    @property
    def ratio(self) -> float:
        """a / b, nan where it means nothing."""
        return self.a / self.b if self.b and self.a * self.b > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison(Scalar):
    """``value`` = a − b in the first invariant measure that was asked for (else in the first); ``rows`` all of them."""

    rows: dict[str, Side]
    scale: float            # the largest factor between the norms of two corresponding weights; inf if unlike
    same_scale: bool
    sentence: str

    @property
    def signs(self) -> dict[str, int]:
        """1 where a is sharper, −1 where b is, 0 where they cannot be told apart."""
        return {name: row.sign for name, row in self.rows.items()}

    @property
    def agree(self) -> bool:
        """Whether no two measures have opposite signs."""
        return not {1, -1} <= set(self.signs.values())


def compare(a: Objective, b: Objective, rho: float = 0.05, *, measures: Sequence[str] = MEASURES,
            names: tuple[str, str] = ("A", "B"), adaptive_rho: float | None = None, seed: int = 0) -> Comparison:
    """Measure two models alike and put the numbers side by side; disagreement is a result, not an error.

    Args:
        a, b: two objectives, on the same data if the models are to be compared rather than the data.
        rho: the radius of plain measures.
        measures: some of "one_step", "largest_eigenvalue", "worst_case" (plain: they change with the scale of the
            weights) and "adaptive_worst_case", "normalized_flatness" (which do not, for ReLU networks).
        names: how the sentence calls the models.
        adaptive_rho: the radius of the adaptive worst case; ``rho`` by default.
        seed: of random starts and probes, the same for both.

    Returns:
        ``.rows .signs .agree .scale .same_scale .sentence``. A ``DifferentScaleWarning`` is given where plain measures
        compare weights whose norms differ by more than a quarter, or models of other shapes.

    Raises:
        ValueError: an unknown measure.

    >>> import torch
    >>> data = torch.ones(8, 1), torch.zeros(8, 1)
    >>> a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    >>> with torch.no_grad(): _ = a.weight.fill_(1.0), b.weight.fill_(-1.0), a.bias.fill_(1.0), b.bias.zero_()
    >>> compare(*(Objective(m, torch.nn.MSELoss(), data) for m in (a, b)), measures=["one_step"]).signs
    {'one_step': 1}
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise ValueError(f"unknown measures {unknown}: choose from {', '.join(MEASURES)}")
    rows = {}
    for name in measures:
        (x, ex), (y, ey) = (_measure(name, o, rho, adaptive_rho or rho, seed) for o in (a, b))
        error = math.hypot(ex, ey)
        sign = 0 if not abs(x - y) > 2 * error else (1 if x > y else -1)
        rows[name] = Side(name=name, value=x - y, stderr=error if error else math.nan, a=x, b=y, sign=sign,
                          invariant=name in INVARIANT, settings={"rho": rho})
    scale = scale_between(a, b)
    plain = [name for name in rows if name not in INVARIANT]
    if scale > SAME_SCALE and plain:
        what = "models of different shapes" if math.isinf(scale) else f"weights of norms up to {scale:.3g} times apart"
        warnings.warn(f"{', '.join(plain)} compare {what}: they change with the scale of the weights even where the "
                      f"function is the same. Compare {' or '.join(INVARIANT)} instead", DifferentScaleWarning,
                      stacklevel=2)
    head = next((name for name in rows if name in INVARIANT), next(iter(rows)))
    return Comparison(value=rows[head].value, stderr=rows[head].stderr, rows=rows, scale=scale,
                      same_scale=scale <= SAME_SCALE, sentence=_sentence(rows, names, scale),
                      settings={"rho": rho, "headline": head, "names": names})


def _measure(name: str, objective: Objective, rho: float, adaptive_rho: float, seed: int) -> tuple[float, float]:
    """A measure and its error."""
    if name == "one_step":
        return one_step(objective, rho, second_order=False).value, 0.0
    if name == "largest_eigenvalue":
        found = eigenpairs(Hessian(objective), 1, seed=seed)
        return found.largest, float(found.residuals[-1])
    if name == "normalized_flatness":
        record = normalized_flatness(objective, seed=seed)
        return record.value, 0.0 if record.exact else record.stderr
    options: dict[str, Any] = {"adaptive": "element"} if name == "adaptive_worst_case" else {}
    return worst_case(objective, adaptive_rho if options else rho, seed=seed, **options).value, 0.0


def scale_between(a: Objective, b: Objective) -> float:
    """The largest factor between the norms of corresponding weights (two dimensions or more); inf for other shapes."""
    if [p.shape for p in a.parameters] != [p.shape for p in b.parameters]:
        return math.inf
    norms = [vectors.Space(o.parameters).norms([vectors.local(p.detach()) for p in o.parameters]).tolist()
             for o in (a, b)]
    factors = [max(x / y, y / x) if x and y else (1.0 if x == y else math.inf)
               for x, y, p in zip(*norms, a.parameters, strict=True) if p.dim() > 1]
    return max(factors, default=1.0)


def _sentence(rows: dict[str, Side], names: tuple[str, str], scale: float) -> str:
    said = {sign: [name for name, row in rows.items() if row.sign == sign] for sign in (1, -1, 0)}
    parts = [f"{names[0 if sign > 0 else 1]} is sharper by {', '.join(said[sign])}" for sign in (1, -1) if said[sign]]
    if said[0]:
        parts.append(f"{', '.join(said[0])} cannot tell them apart")
    text = "; ".join(parts) + "."
    if said[1] and said[-1]:
        text += " The measures disagree, which they may: they are different quantities."
    if scale > SAME_SCALE and any(not row.invariant for row in rows.values()):
        text += " The weights differ in scale, so only the invariant measures compare the functions."
    return text
