"""The temperature that calibrates a classifier best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from .intervals import Calibration, distinct, mean_over_groups
from .predictions import IGNORE, in_chunks, valid_rows


@dataclass(frozen=True, kw_only=True)
class Temperature(Calibration):
    """``value`` = T that minimises the NLL of softmax(z / T); ``nll`` with it, ``nll_before`` at T = 1."""

    nll: float
    nll_before: float
    iterations: int


def fit_temperature(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE, level: float = 0.95,
                    max_iterations: int = 100) -> Temperature:
    """T that minimises the mean NLL of softmax(z / T), by Newton's method in β = 1/T, in which the NLL is convex.

    A step that leaves the bracket of the root of d NLL/dβ = mean(E_p[z] − z_y) is replaced by its middle. The standard
    error is the sandwich one, over samples or sequences: it holds also where softmax(z / T) is not the truth. Fit on
    data that the model was not trained on. The predicted class does not change.

    Raises:
        ValueError: no minimum exists: every target has the largest logit (T → 0), or the logits do not favour the
            targets at all (T → ∞).

    >>> z = torch.tensor([[3.0, 0.0]]).repeat(4, 1)
    >>> t = fit_temperature(z, torch.tensor([0, 0, 0, 1]))      # right in three of four: z / T = ln 3
    >>> abs(t.value - 3 / torch.tensor(3.0).log().item()) < 1e-6
    True

    C. Guo et al., arXiv 1706.04599.
    """
    rows, y, groups = valid_rows(logits, targets, ignore_index)
    n = len(y)

    def at(beta: float) -> tuple[float, Tensor, float]:
        """The NLL, the score β ↦ E_p[z] − z_y of each sample, and the mean variance of z under p."""
        loss, scores, spread = 0.0, [], 0.0
        for z, target in in_chunks(rows, y):
            z = z - z.amax(-1, keepdim=True)
            logs = (beta * z).log_softmax(-1)
            p = logs.exp()
            z = z.where(p > 0, torch.zeros_like(z))         # probability 0 with a logit of −∞
            mean = (p * z).sum(-1)
            of_target = z.gather(-1, target[:, None])[:, 0]
            loss -= float(logs.gather(-1, target[:, None]).sum())
            scores.append(mean - of_target)
            spread += float((p * (z - mean[:, None]).square()).sum())
        return loss / n, torch.cat(scores), spread / n

    before = at(1.0)
    if not math.isfinite(before[0]):
        raise ValueError(f"the NLL is {before[0]} before scaling: a target has probability 0, which no temperature "
                         "changes; look for logits of −inf or nan")
    if float(at(0.0)[1].mean()) >= 0:
        raise ValueError("no temperature has the smallest NLL: the logits of the targets are not above the average "
                         "logit, so that uniform probabilities (T → ∞) are best. Are targets and logits aligned?")
    if all(bool((z.gather(-1, t[:, None])[:, 0] == z.amax(-1)).all()) for z, t in in_chunks(rows, y)):
        raise ValueError("no temperature has the smallest NLL: every target has the largest logit, so that smaller "
                         "temperatures are always better (T → 0). Fit on more data, or on data with errors")
    low, high, beta, iterations, done = 0.0, math.inf, 1.0, 0, False
    while not done and iterations < max_iterations:
        iterations += 1
        _, scores, curvature = at(beta)
        slope = float(scores.mean())
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = -slope / curvature if curvature > 0 else math.inf
        following = beta + step
        if not low < following < high or following > 10 * beta:
            following = 10 * beta if math.isinf(high) else (low + high) / 2
        done = abs(following - beta) <= 1e-12 * beta
        beta = following
    loss, scores, curvature = at(beta)
    stderr = mean_over_groups(scores, groups, level)[1] / curvature
    z = NormalDist().inv_cdf((1 + level) / 2)
    ends = (1 / (beta + z * stderr), 1 / (beta - z * stderr) if beta > z * stderr else math.inf)
    return Temperature(value=1 / beta, stderr=stderr / beta**2, interval=ends, level=level, samples=n,
                       groups=distinct(groups), nll=loss, nll_before=before[0], iterations=iterations)
