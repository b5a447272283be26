"""PAC-Bayes: bounds on the risk of a random classifier that hold with a stated probability.

P is a distribution over weights that does not depend on the n samples, Q any other one. With probability at least
1 − δ over the samples, for all Q at once, E_Q of the true risk is bounded by E_Q of the empirical risk and KL(Q‖P).
The loss must lie in [0, 1] and the samples be independent. ``posteriors`` makes Gaussian Q and estimates E_Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..results import Scalar

Values = float | Tensor | Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Divergence(Scalar):
    """``value`` = KL(Q‖P) in nats, ``bits`` in bits; ``spread`` is its part without the means, ``shift`` theirs."""

    bits: float
    spread: float
    shift: float


@dataclass(frozen=True, kw_only=True)
class Inverse(Scalar):
    """``value`` = the largest p with kl(q‖p) ≤ c."""

    q: float
    c: float


@dataclass(frozen=True, kw_only=True)
class Bound(Scalar):
    """``value`` bounds the risk with probability 1 − δ over the samples; ``vacuous`` where it says nothing (≥ 1).

    ``of`` says whose risk: a bound for a random classifier says nothing about its mean weights.
    """

    theorem: str
    empirical: float
    kl: float
    n: int
    delta: float
    vacuous: bool
    of: str = "Q"

    def __str__(self) -> str:
        text = f"risk of {self.of} ≤ {self.value:.4g} with probability {1 - self.delta:g} ({self.theorem})"
        return text + (": vacuous, since every risk is at most 1" if self.vacuous else "")


def gaussian_kl(mean: Values, variance: Values, prior_mean: Values, prior_variance: Values) -> Divergence:
    """KL(Q‖P) = ½ Σ_i [s_i/p_i + (w_i − v_i)²/p_i − 1 − ln(s_i/p_i)] for Q = N(w, diag s), P = N(v, diag p).

    Each argument is a number, a tensor, or a list of tensors in parameter order; numbers and smaller tensors broadcast
    to the largest.

    Raises:
        ValueError: a variance that is not positive, or shapes that do not fit.

    >>> round(gaussian_kl(torch.zeros(1000), 0.01, 0.0, 1.0).value, 1)
    1807.6

    The divergence of the bounds is KL(Q‖P), expectation under the posterior; KL(P‖Q) is another number.
    """
    spread = shift = 0.0
    for w_i, s, v, p in _together(mean, variance, prior_mean, prior_variance):
        for t, name in ((s, "variance"), (p, "prior_variance")):
            if not bool((t > 0).all()) or not bool(t.isfinite().all()):
                raise ValueError(f"{name} must be positive and finite everywhere, got a smallest entry of "
                                 f"{float(t.min()):.4g}: without density with respect to each other the divergence "
                                 "is infinite")
        a, b = spread_and_shift(w_i, s, v, p)
        spread, shift = spread + max(float(a), 0.0), shift + float(b)
    value = spread + shift
    return Divergence(value=value, bits=value / math.log(2), spread=spread, shift=shift)


def spread_and_shift(w: Tensor, s: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ [s/p − 1 − ln(s/p)] and ½ Σ (w − v)²/p; differentiable."""
    shape = torch.broadcast_shapes(w.shape, s.shape, v.shape, p.shape)
    ratio = (s / p).expand(shape)
    return 0.5 * (ratio - 1 - ratio.log()).sum(), 0.5 * ((w - v).square() / p).expand(shape).sum()


def kl_inverse(q: float, c: float) -> Inverse:
    """The largest p with kl(q‖p) = q ln(q/p) + (1 − q) ln((1 − q)/(1 − p)) ≤ c: the error rate that samples allow.

    Bisection down to neighbouring numbers, on a form of kl without cancellation.

    Raises:
        ValueError: q outside [0, 1], or c negative.

    >>> round(kl_inverse(0.0, 0.1).value, 6)        # 1 − exp(−c)
    0.095163
    >>> kl_inverse(0.3, 0.0).value
    0.3
    """
    q, c = float(q), float(c)
    if not 0 <= q <= 1:
        raise ValueError(f"q is a risk and must lie in [0, 1], got {q}")
    if not c >= 0:
        raise ValueError(f"c bounds a divergence and must not be negative, got {c}")
    return Inverse(value=_kl_inverse(q, c), q=q, c=c)


def _kl_inverse(q: float, c: float) -> float:
    if q == 0:
        return -math.expm1(-c)
    if c == 0 or q == 1:
        return q
    low, high = 0.0, min(1 - q, math.sqrt(c / 2))       # Pinsker: kl ≥ 2 (p − q)²
    for _ in range(2000):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _binary_kl(q, middle) <= c else (low, middle)
    return q + high


def _binary_kl(q: float, d: float) -> float:
    """kl(q‖q + d) for 0 < d < 1 − q: the terms of first order in d cancel, so they are left out of both logarithms."""
    return -q * _log1p_rest(d / q) - (1 - q) * _log1p_rest(-d / (1 - q))


def _log1p_rest(x: float) -> float:
    """ln(1 + x) − x."""
    return math.log1p(x) - x if x > -1 else -math.inf


def mcallester(empirical: float, kl: float | Divergence, n: int, delta: float = 0.05) -> Bound:
    """E_Q L_D ≤ E_Q L_S + √((KL(Q‖P) + ln(2√n/δ)) / 2n).

    Args:
        empirical: E_Q L_S, the expected empirical risk of a loss in [0, 1], such as the error rate. The loss at the
            mean weights, or a cross-entropy, is not one.
        kl: KL(Q‖P) in nats.
        n: independent samples.
        delta: the probability over the samples that the bound fails.

    Raises:
        ValueError: empirical outside [0, 1], kl < 0, n < 1, delta outside (0, 1).

    >>> round(mcallester(0.1, 1807.6, 50_000, 0.05).value, 4)
    0.2348

    D. McAllester, COLT 1999; A. Maurer, arXiv cs/0411099 (the constant).
    """
    kl, numbers = _checked(empirical, kl, n, delta)
    value = numbers["empirical"] + math.sqrt((kl + math.log(2 * math.sqrt(n) / delta)) / (2 * n))
    return Bound(value=value, theorem="McAllester and Maurer", vacuous=value >= 1, **numbers)


def seeger(empirical: float, kl: float | Divergence, n: int, delta: float = 0.05) -> Bound:
    """E_Q L_D ≤ the largest p with kl(E_Q L_S‖p) ≤ (KL(Q‖P) + ln(2√n/δ)) / n; never above ``mcallester``.

    Arguments and errors as for ``mcallester``.

    M. Seeger, JMLR 3 (2002) 233-269; A. Maurer, arXiv cs/0411099.
    """
    kl, numbers = _checked(empirical, kl, n, delta)
    value = _kl_inverse(numbers["empirical"], (kl + math.log(2 * math.sqrt(n) / delta)) / n)
    return Bound(value=value, theorem="Seeger and Maurer", vacuous=value >= 1, **numbers)


def sam_theorem(worst: float, norm: float, rho: float, parameters: int, n: int, delta: float = 0.05) -> Bound:
    """L_D(w) ≤ max_{‖ε‖≤ρ} L_S(w + ε) + √([k ln(1 + ‖w‖²/ρ² (1 + √(ln n / k))²) + 4 ln(n/δ) + 8 ln(6n + 3k)] / (n−1)).

    It assumes a loss in [0, 1] and that random noise of standard deviation ρ does not lower the risk,
    L_D(w) ≤ E L_D(w + ε). It says nothing for nets: k parameters ask for far more than k samples.

    Args:
        worst: max_{‖ε‖≤ρ} L_S(w + ε) (``sharpness.worst_case`` of a loss in [0, 1]).
        norm: ‖w‖.
        rho: ρ.
        parameters: k.

    >>> sam_theorem(0.0, 10.0, 0.05, 10_000, 50_000).vacuous
    True

    P. Foret et al., arXiv 2010.01412, theorem 2, with the constants of its proof.
    """
    _, numbers = _checked(worst, 0.0, n, delta)
    if n < 2 or parameters < 1 or not rho > 0 or not norm >= 0:
        raise ValueError(f"the theorem needs n ≥ 2, at least one parameter, rho > 0 and norm ≥ 0, got n={n}, "
                         f"parameters={parameters}, rho={rho}, norm={norm}")
    k = parameters
    size = k * math.log1p((norm / rho) ** 2 * (1 + math.sqrt(math.log(n) / k)) ** 2)
    value = numbers["empirical"] + math.sqrt((size + 4 * math.log(n / delta) + 8 * math.log(6 * n + 3 * k)) / (n - 1))
    return Bound(value=value, theorem="Foret et al., theorem 2", vacuous=value >= 1, of="the weights",
                 settings={"rho": rho, "norm": norm, "parameters": k}, **numbers)


def compute_pac_bayes_bound(train_loss: float, hessian_trace: float, n_samples: int, n_params: int,
                            prior_variance: float = 1.0, delta: float = 0.05, *,
                            posterior: Literal["inverse_trace", "laplace"] = "inverse_trace",
                            distance: float = 0.0) -> Bound:
    """``mcallester`` for Q = N(w, s I) with s from the trace of the Hessian, and P = N(v, prior_variance · I).

    Args:
        train_loss: E_Q of the empirical risk, in [0, 1].
        hessian_trace: tr H of the mean loss.
        posterior: s = 1 / tr H ("inverse_trace"), or 1 / (n tr H / d + 1 / prior_variance) ("laplace"). The bound
            holds for either.
        distance: ‖w − v‖, zero by default: say how far the weights are from the mean of the prior.

    >>> bound = compute_pac_bayes_bound(0.1, 100.0, 50_000, 1000)
    >>> round(bound.kl), round(bound.value, 4)
    (1808, 0.2348)
    """
    if not hessian_trace >= 0:
        raise ValueError(f"the posterior variance needs a trace that is not negative, got {hessian_trace}: take the "
                         "trace of the Gauss-Newton or Fisher matrix")
    if posterior not in ("inverse_trace", "laplace"):
        raise ValueError(f'posterior must be "inverse_trace" or "laplace", got {posterior!r}')
    s = 1 / (hessian_trace + 1e-8) if posterior == "inverse_trace" else \
        isotropic_variance(hessian_trace, n_params, n_samples, prior_variance)
    ratio = s / prior_variance
    kl = 0.5 * (n_params * (ratio - 1 - math.log(ratio)) + distance**2 / prior_variance)
    bound = mcallester(train_loss, kl, n_samples, delta)
    return Bound(**{**vars(bound), "settings": {"posterior": posterior, "posterior_variance": s, "distance": distance,
                                                "prior_variance": prior_variance}})


def isotropic_variance(trace: float, parameters: int, n: int, prior_variance: float, beta: float = 1.0) -> float:
    """s = 1 / (β n tr H / d + 1 / prior_variance), which minimises the linearised bound E_Q L + KL / (βn)."""
    return 1 / (beta * n * max(trace, 0.0) / parameters + 1 / prior_variance)


def _checked(empirical: float, kl: float | Divergence, n: int, delta: float) -> tuple[float, dict]:
    empirical, kl = float(empirical), float(kl)
    if not 0 <= empirical <= 1:
        raise ValueError(f"the theorem is about a loss in [0, 1], got an empirical risk of {empirical}: take the error "
                         "rate, or clip and scale the loss")
    if not kl >= 0:
        raise ValueError(f"KL(Q‖P) is never negative, got {kl}")
    if n < 1 or n != int(n):
        raise ValueError(f"n counts independent samples and must be at least 1, got {n}")
    check_delta(delta)
    return kl, {"empirical": empirical, "kl": kl, "n": int(n), "delta": float(delta)}


def check_delta(delta: float, name: str = "delta") -> None:
    if not 0 < delta < 1:
        raise ValueError(f"{name} is the probability that the bound fails and must lie in (0, 1), got {delta}")


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of a shape can be broadcast to another shape."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _together(*arguments: Values) -> list[list[Tensor]]:
    """For each tensor of the lists, one row of float64 tensors of equal shape."""
    columns = [[torch.as_tensor(t) for t in ([a] if isinstance(a, (int, float, Tensor)) else a)] for a in arguments]
    length = max(map(len, columns))
    if any(len(column) not in (1, length) for column in columns):
        raise ValueError(f"mean, variance, prior_mean and prior_variance have {', '.join(str(len(c)) for c in columns)}"
                         " tensors: pass one for each tensor of the weights, or one number")
    rows = []
    for row in zip(*(column * length if len(column) < length else column for column in columns), strict=True):
        shapes = [t.shape for t in row]
        largest = max(shapes, key=lambda shape: (shape.numel(), len(shape)))
        if not all(_expands(shape, largest) for shape in shapes):
            raise ValueError("mean, variance, prior_mean and prior_variance have the shapes "
                             f"{', '.join(str(tuple(shape)) for shape in shapes)}, which do not fit")
        rows.append([t.detach().double().expand(largest) for t in row])
    return rows
