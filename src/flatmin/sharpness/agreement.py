"""Whether sharpness measures and the Hessian agree, and how measures correlate over checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from .. import parallel, perturbed, vectors
from ..curvature import CurvatureOperator, Hessian, eigenpairs
from ..objective import Objective
from ..results import Scalar
from .sharpness_warnings import warn_of, warn_of_rounded_step
from .worst_case import worst_case

SMALL_SLOPE = 0.1
ORDER = 2.5


@dataclass(frozen=True, kw_only=True)
class Agreement(Scalar):
    """``value`` = the observed order of the remainder of one-step sharpness in ρ: 3 for a smooth loss, inf where the
    remainder is rounding (a quadratic), nan where it cannot be determined."""

    radii: tuple[float, ...]
    one_step: tuple[float, ...]         # S(ρ)
    remainders: tuple[float, ...]       # S(ρ) − ρ‖g‖ − ½ρ²ĝᵀHĝ
    third_order: bool | None            # whether the remainder falls as expected; None: undetermined
    largest_eigenvalue: float
    worst_case: float
    bound: float                        # ½ρ²λ₁
    applies: bool                       # whether worst case and bound are comparable: ρ‖g‖ ≪ ½ρ²λ₁
    ratio: float                        # worst case / bound where it applies, else nan
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def agreement(objective: Objective, rho: float = 0.05, *, iterations: int = 20, restarts: int = 1, tol: float = 1e-2,
              seed: int | torch.Generator = 0) -> Agreement:
    """Check sharpness against the Hessian, by two tests that hold for a right implementation.

    1. S(ρ) − ρ‖g‖ − ½ρ²ĝᵀHĝ = O(ρ³): halving ρ must divide it by about eight. It fails for a wrong Hessian, and for
       losses with kinks (ReLU) within ρ.
    2. Worst case ≈ ½ρ²λ₁, compared only where the first-order part does not lead, ρ‖g‖ ≤ 0.1 · ½ρ²λ₁. Elsewhere the
       two are different quantities, and one-step sharpness is not ½ρ²λ₁ even there, as ĝ is not the top eigenvector.

    Args:
        objective: L.
        rho: the largest radius; ρ/2 and ρ/4 are looked at too.
        iterations, restarts: of ``worst_case``.
        tol: of λ₁, relative.
        seed: of the random starts.

    Returns:
        ``.value`` (the order), ``.third_order .remainders .worst_case .bound .applies .ratio .sentence``.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(8, 1), (model.weight.detach() - 1)[:, 0].expand(8, 1)
    >>> agreement(Objective(model.double(), lambda z, y: (z - y).pow(4).mean(),
    ...                     [t.double() for t in data]), 0.01).third_order
    True
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    generator = vectors.seeded(seed)
    radii = (rho, rho / 2, rho / 4)
    with objective.session(check=True):
        at = objective.evaluate(gradient=True)
        loss, H = float(at.loss), Hessian(objective)
        length, rises, parts = _rises(objective, H, at.gradient, loss, radii)
        top = eigenpairs(H, 1, tol=tol, seed=generator).largest
        worst = worst_case(objective, rho, iterations=iterations, restarts=restarts, seed=generator).value
    warn_of(objective, at)
    checked = "error" in H.describe().get("product_check", {})
    remainders = tuple(s - p for s, p in zip(rises, parts, strict=True))
    eps = max(torch.finfo(p.dtype).eps for p in objective.parameters)
    noise = 8 * eps * (abs(loss) + max(map(abs, parts)))
    order = observed_order(remainders, noise)
    third = None if math.isnan(order) else order >= ORDER
    bound = 0.5 * rho**2 * max(top, 0.0)
    applies = bound > 0 and rho * length <= SMALL_SLOPE * bound
    ratio = worst / bound if applies else math.nan
    return Agreement(value=order, radii=radii, one_step=tuple(rises), remainders=remainders, third_order=third,
                     largest_eigenvalue=top, worst_case=worst, bound=bound, applies=applies, ratio=ratio,
                     sentence=_sentence(order, third, rho * length, bound, ratio, checked),
                     settings={"rho": rho, "mode": objective.mode, "samples": at.samples})


def _rises(objective: Objective, H: CurvatureOperator, g: list[Tensor], loss: float,
           radii: Sequence[float]) -> tuple[float, list[float], list[float]]:
    """‖g‖, the rises S(ρ), and what the first two orders say of them."""
    w = objective.parameters
    space = vectors.Space(w)
    length = float(space.norm(g))
    if length == 0:
        return 0.0, [0.0] * len(radii), [0.0] * len(radii)
    direction = [(t / length).to(p.dtype) for t, p in zip(g, w, strict=True)]
    curvature = float(space.dot(direction, [parallel.local(t) for t in H.matvec(direction)]))
    rises, realised = [], []
    for r in radii:
        with perturbed.displaced(w, direction, r) as displacement:
            rises.append(float(objective.value()) - loss)
        realised = displacement.realised
    warn_of_rounded_step(objective, realised, stacklevel=4)     # of the smallest step
    return length, rises, [r * length + 0.5 * r * r * curvature for r in radii]


def observed_order(remainders: Sequence[float], noise: float) -> float:
    """log₂ of how much the remainder falls when ρ is halved, from the smallest ρ where it is above the noise."""
    sizes = [abs(r) for r in remainders]
    if all(s <= noise for s in sizes):
        return math.inf
    for large, small in reversed(list(zip(sizes, sizes[1:], strict=False))):
        if small > 4 * noise:
            return math.log2(large / small)
    return math.nan


def _sentence(order: float, third: bool | None, slope: float, bound: float, ratio: float, checked: bool = False) -> str:
    if third is None:
        first = "The remainder of one-step sharpness is too near rounding to be tested; take a larger rho or float64."
    elif math.isinf(order):
        first = "One-step sharpness equals its first two orders to rounding: the loss is quadratic along the gradient."
    elif third:
        first = f"One-step sharpness and the Hessian agree: halving rho divides the remainder by {2**order:.1f}."
    else:
        doubt = "; the Hessian agrees with differences of gradients" if checked else ", or the Hessian is wrong"
        first = (f"One-step sharpness and the Hessian do not agree to third order: halving rho divides the remainder "
                 f"by {2**order:.1f}, not 8. The loss has kinks (ReLU) within rho, or rho is too large{doubt}.")
    if math.isnan(ratio):
        second = (f"Worst case and ½ρ²λ₁ = {bound:.3g} are different quantities here, since the first-order part "
                  f"ρ‖g‖ = {slope:.3g} is not small beside it." if bound > 0 else
                  "There is no positive curvature to compare the worst case with.")
    else:
        second = f"The worst case is {ratio:.2f} of ½ρ²λ₁, which leads here."
    return f"{first} {second}"


@dataclass(frozen=True, kw_only=True)
class Correlation(Scalar):
    """``value`` = r with the interval that holds the true one with probability ``confidence``."""

    interval: tuple[float, float]
    confidence: float
    n: int
    sentence: str


def correlation(x: Sequence[float], y: Sequence[float], *, rank: bool = False, confidence: float = 0.95,
                names: tuple[str, str] = ("the first measure", "the second")) -> Correlation:
    """Pearson's (or, with ``rank``, Spearman's) correlation over checkpoints, with Fisher's interval.

    atanh r ± z √(1/(n − 3)), the variance times 1 + r²/2 for ranks. Checkpoints of one run are not independent, so
    the interval is then too narrow. Below four points there is no interval.

    Args:
        x, y: one number a checkpoint; pairs that are not finite are left out.

    Raises:
        ValueError: different lengths, fewer than two pairs, or a confidence outside (0, 1).

    >>> r = correlation([1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 1.9, 3.2, 3.9, 5.1])
    >>> round(r.value, 3), r.interval[0] > 0.9
    (0.996, True)

    D. Bonett, T. Wright, Psychometrika 65 (2000) 23-28 (ranks).
    """
    if len(x) != len(y):
        raise ValueError(f"one number a checkpoint in both lists, got {len(x)} and {len(y)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    n = len(pairs)
    if n < 2:
        raise ValueError(f"a correlation needs at least two finite pairs, got {n}")
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if rank:
        a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    r = max(-1.0, min(1.0, float(a @ b) / size)) if size else math.nan
    low, high = -1.0, 1.0
    if n > 3 and not math.isnan(r):
        half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((1 + r * r / 2 if rank else 1) / (n - 3))
        z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
        low, high = math.tanh(z - half), math.tanh(z + half)
    verdict = ("nothing is decided" if low <= 0 <= high or math.isnan(r) else
               "they rise together" if low > 0 else "one falls where the other rises")
    return Correlation(value=r, interval=(low, high), confidence=confidence, n=n,
                       sentence=f"Over {n} checkpoints {names[0]} and {names[1]} correlate with r = {r:.2f}, between "
                                f"{low:.2f} and {high:.2f} at {confidence:.0%}: {verdict}.",
                       settings={"rank": rank})


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean."""
    return torch.stack([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x]).double()
