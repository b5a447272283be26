"""Two models side by side: every measure with its sign, and whether plain measures may be compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import parallel, vectors
from ..curvature.measures import MEASURES as OF_CURVATURE
from ..linalg.confidence import data_stderr
from ..measures import Options, offered
from ..objective import Objective
from ..results import PerBatch, Scalar
from .cautions import DifferentScaleWarning
from .measures import MEASURES as OF_SHARPNESS

_TABLE = {**OF_CURVATURE, **OF_SHARPNESS}
MEASURES = offered("compare")
INVARIANT = tuple(name for name in MEASURES if _TABLE[name].invariant)
SAME_SCALE = 1.25


@dataclass(frozen=True, kw_only=True)
class Side(Scalar):
    """One measure of two models: ``value`` = a − b, ``sign`` of it, 0 (undecided) within two standard errors of it.

    ``stderr`` is that of the difference, of the computation and over batches together. Where there are five batches or
    more, ``data_stderr`` is its part over batches: of the differences batch by batch where the batches are the same
    (``paired``), else of both models' errors in quadrature. Where it is nan, the sign is of these data alone.
    """

    name: str
    a: float
    b: float
    sign: int
    invariant: bool     # whether it stays the same when a ReLU network is rescaled
    data_stderr: float = math.nan
    paired: bool = False

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
        """1 where a is sharper, −1 where b is, 0 where it is undecided."""
        return {name: row.sign for name, row in self.rows.items()}

    @property
    def agree(self) -> bool:
        """Whether no two measures have opposite signs."""
        return not {1, -1} <= set(self.signs.values())


def compare(a: Objective, b: Objective, rho: float = 0.05, *, measures: Sequence[str] = MEASURES,
            names: tuple[str, str] = ("A", "B"), adaptive_rho: float | None = None, seed: int = 0) -> Comparison:
    """Measure two models in the same way; measures that disagree are a result and not an error.

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
    rows = {name: _side(name, a, b, rho, adaptive_rho or rho, seed) for name in measures}
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


def _side(name: str, a: Objective, b: Objective, rho: float, adaptive_rho: float, seed: int) -> Side:
    measure = _TABLE[name]
    options = Options(rho=adaptive_rho if measure.invariant else rho, seed=seed, value_only=True)
    x, y = measure(a, options), measure(b, options)
    paired = x.per_batch.weights == y.per_batch.weights != () and not (math.isnan(x.data_stderr)
                                                                       or math.isnan(y.data_stderr))
    data = _paired_error(a, x.per_batch, y.per_batch) if paired else math.hypot(x.data_stderr, y.data_stderr)
    known = [e for e in (x.stderr, y.stderr, data) if not math.isnan(e)]
    error, difference = math.hypot(*known), x.value - y.value
    sign = 0 if not abs(difference) > 2 * error else 1 if difference > 0 else -1
    return Side(name=name, value=difference, stderr=error if error or not math.isnan(data) else math.nan, a=x.value,
                b=y.value, sign=sign, invariant=measure.invariant, data_stderr=data, paired=paired,
                settings={"rho": rho})


def _paired_error(objective: Objective, x: PerBatch, y: PerBatch) -> float:
    """The standard error over batches of the differences on the same batches."""
    differences = [p - q for p, q in zip(x.values, y.values, strict=True)]
    if not x.of_all_ranks:
        return objective.data_stderr(differences, x.weights)
    found = data_stderr((torch.tensor(x.weights).double(), torch.tensor(differences).double()))
    return math.nan if found is None else found


def scale_between(a: Objective, b: Objective) -> float:
    """The largest factor between the norms of corresponding weights (two dimensions or more); inf for other shapes."""
    if [p.shape for p in a.parameters] != [p.shape for p in b.parameters]:
        return math.inf
    norms = [vectors.Space(o.parameters).norms([parallel.local(p.detach()) for p in o.parameters]).tolist()
             for o in (a, b)]
    factors = [max(x / y, y / x) if x and y else (1.0 if x == y else math.inf)
               for x, y, p in zip(*norms, a.parameters, strict=True) if p.dim() > 1]
    return max(factors, default=1.0)


def _sentence(rows: dict[str, Side], names: tuple[str, str], scale: float) -> str:
    said = {sign: [name for name, row in rows.items() if row.sign == sign] for sign in (1, -1, 0)}
    parts = [f"{names[0 if sign > 0 else 1]} is sharper by {', '.join(said[sign])}" for sign in (1, -1) if said[sign]]
    if said[0]:
        parts.append(f"by {', '.join(said[0])} it is undecided: the difference is within two standard errors of it")
    text = "; ".join(parts) + "."
    text = text[0].upper() + text[1:] if not (said[1] or said[-1]) else text
    here = [name for name, row in rows.items() if math.isnan(row.data_stderr)]
    if here:
        which = "" if len(here) == len(rows) else f" of {', '.join(here)}"
        text += (f" No error over the data{which} is known, which takes five batches or more: this is said of these "
                 "data alone.")
    if said[1] and said[-1]:
        text += " The measures disagree, which they may: they are different quantities."
    if scale > SAME_SCALE and any(not row.invariant for row in rows.values()):
        text += " The weights differ in scale, so only the invariant measures compare the functions."
    return text
