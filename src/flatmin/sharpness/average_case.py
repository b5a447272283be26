"""The mean, and the largest, rise of the loss over random perturbations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import perturbed, vectors
from ..linalg.confidence import moments
from ..objective import Objective
from ..results import Scalar
from .norm_ball import Adaptive, check_p, scaled, scales
from .sharpness_warnings import warn_of, warn_of_rounded_step, warn_of_rounding


@dataclass(frozen=True, kw_only=True)
class AverageCase(Scalar):
    """``value`` = the mean of L(w + δ) − L(w), ``stderr`` its standard error over independent draws (or pairs)."""

    data_stderr: float = math.nan   # over batches, for these draws; nan where there are fewer than five
    loss: float
    draws: tuple[float, ...]        # the rise of each draw, or the mean rise of each pair δ, −δ
    evaluations: int
    warnings: tuple[str, ...] = ()


def average_case(objective: Objective, rho: float = 0.05, *, p: float = 2, adaptive: Adaptive | bool = "none",
                 samples: int = 100, antithetic: bool = True, seed: int | torch.Generator = 0) -> AverageCase:
    """Average-case sharpness, E L(w + δ) − L(w) with δ = c ∘ u, u ~ N(0, ρ²) in every coordinate (p = 2).

    For small ρ it is ½ρ² Σᵢ cᵢ² Hᵢᵢ. Note that ‖u‖ is about ρ√d. With p = ∞ u is uniform on [−ρ, ρ]^d, a third of
    the variance.

    Args:
        objective: L.
        rho: the standard deviation (p = 2) or the half-width (p = ∞).
        adaptive: c, as for ``worst_case``.
        samples: evaluations of the loss.
        antithetic: take δ and −δ together, which cancels the first-order term exactly: far less variance where the
            gradient is not zero.
        seed: of the draws.

    Returns:
        ``.value .stderr .data_stderr .draws .loss .evaluations``; ``data_stderr`` is the standard error over batches,
        where the data are five batches or more. Weights and everything else are bitwise what they were.

    Raises:
        ValueError: rho not positive, or fewer than two independent draws.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> s = average_case(Objective(model, torch.nn.MSELoss(), (torch.eye(2).repeat(4, 1), torch.ones(8, 1))), 0.1)
    >>> abs(s.value - 0.01) < 4 * s.stderr             # ½ρ² tr H, with tr H = 2
    True

    M. Andriushchenko et al., arXiv 2302.07011.
    """
    p = check_p(p)
    count = samples // 2 if antithetic else samples
    if not rho > 0 or count < 2:
        raise ValueError(f"rho must be positive and samples at least {4 if antithetic else 2}, got rho={rho}, "
                         f"samples={samples}")
    w, generator = objective.parameters, vectors.seeded(seed)
    space = vectors.Space(w)
    with objective.session(check=True):
        at = objective.evaluate()
        loss, c = float(at.loss), scales(w, adaptive)
        draws, realised, each = [], [], [0.0] * len(at.losses)
        for _ in range(count):
            u = space.random(generator, "normal" if p == 2 else "uniform")
            if p == math.inf:
                for t in u:
                    t.mul_(2).sub_(1)
            direction = scaled(c, u)
            rises = []
            for sign in (1, -1) if antithetic else (1,):
                with perturbed.displaced(w, direction, sign * rho) as displacement:
                    moved = objective.evaluate()
                rises.append(float(moved.loss) - loss)
                each = [total + b - a for total, a, b in zip(each, at.losses, moved.losses, strict=True)]
                realised += displacement.realised
            draws.append(math.fsum(rises) / len(rises))
        evaluations = count * (2 if antithetic else 1)
        error = objective.data_stderr([total / evaluations for total in each], at.weights)
    mean, stderr = mean_and_error(draws)
    found = warn_of(objective, at, value=mean, data_stderr=error)
    found += warn_of_rounded_step(objective, realised)[1] or warn_of_rounding(at, mean)
    return AverageCase(value=mean, stderr=stderr, data_stderr=error, loss=loss, draws=tuple(draws),
                       warnings=tuple(found), evaluations=1 + evaluations,
                       settings={"rho": rho, "p": p, "adaptive": adaptive, "samples": samples,
                                 "antithetic": antithetic, "mode": objective.mode, "data": at.samples})


@dataclass(frozen=True, kw_only=True)
class LargestRandom(Scalar):
    """``value`` = the largest rise over random directions of length ρ; ``mean`` and ``stderr`` are of all of them."""

    loss: float
    mean: float
    draws: tuple[float, ...]


def largest_random(objective: Objective, rho: float = 0.05, *, adaptive: Adaptive | bool = "none", draws: int = 20,
                   seed: int | torch.Generator = 0) -> LargestRandom:
    """max over ``draws`` random directions of L(w + ρ c∘û) − L(w), û uniform on the unit sphere.

    A weak lower bound of ``worst_case``: in high dimension random directions see ½ρ² tr H / d, not λ₁. It can be
    negative where the loss falls in all of them.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(8, 1), model.weight.detach().clone().expand(8, 1)
    >>> round(largest_random(Objective(model, torch.nn.MSELoss(), data), 0.5).value, 4)
    0.25
    """
    if not rho > 0 or draws < 1:
        raise ValueError(f"rho and draws must be positive, got rho={rho}, draws={draws}")
    w, generator = objective.parameters, vectors.seeded(seed)
    space = vectors.Space(w)
    with objective.session(check=True):
        at = objective.evaluate()
        loss, c = float(at.loss), scales(w, adaptive)
        rises, realised = [], []
        for _ in range(draws):
            u = space.random(generator)
            vectors.scale(1 / space.norm(u), u)
            with perturbed.displaced(w, scaled(c, u), rho) as displacement:
                rises.append(float(objective.value()) - loss)
            realised += displacement.realised
    warn_of(objective, at)
    warn_of_rounded_step(objective, realised)
    mean, stderr = mean_and_error(rises)
    return LargestRandom(value=max(rises), stderr=stderr, loss=loss, mean=mean, draws=tuple(rises),
                         settings={"rho": rho, "adaptive": adaptive, "draws": draws, "mode": objective.mode})


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error (nan of a single value)."""
    mean, stderr = moments(values)
    return mean, stderr if len(values) > 1 else math.nan
