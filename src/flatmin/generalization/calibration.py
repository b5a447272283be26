"""Does a confidence of 0.8 mean right in 80 % of the cases? Calibration on samples or tokens, with intervals.

Functions of ``(confidence, correct)`` look at one probability a sample, those of ``(logits, targets)`` at all classes;
``top_label`` makes the former from the latter, and ``summary`` computes everything at once. Probabilities p stand in
for logits as log p. Logits have the classes last: (N, K) with targets (N,), or (B, T, K) with targets (B, T), where
positions whose target is ``ignore_index`` are left out and a sequence is resampled as a whole.

A calibration error is a sum, or maximum, of absolute gaps |d_b|. Noise only adds to it, and the plain bootstrap, whose
resamples are noisier than the data, does not cover the truth where gaps are small. The intervals here resample the
signed gaps, h = d* − d: the ends are quantiles of Σ|d_b + h_b| − |d_b|, which falls as |d_b| grows, at the smallest and
at the largest |d_b| that a simultaneous band around the data allows. They hold the truth at least as often as they
say; where gaps are small, more often. J. P. Romano et al., Econometrica 82 (2014) 1979-2002 (the two steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..results import Scalar, uncertain

IGNORE = -100
_ENTRIES = 1 << 22      # numbers of one chunk
_GRID = 1025            # points on [0, 1] where the smooth error is evaluated

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Calibration(Scalar):
    """A number about n samples in independent ``groups``; ``interval`` holds the truth with probability ``level``.

    ``chance`` is what a calibration error of so many samples would show on average if every gap were zero: estimates
    of the order of ``chance`` say that the samples are few, not that the model is miscalibrated.
    """

    interval: Interval = (math.nan, math.nan)
    level: float = 0.95
    chance: float = 0.0
    samples: int
    groups: int


@dataclass(frozen=True, kw_only=True)
class Brier(Calibration):
    """``value`` = mean Σ_k (p_k − 1[y = k])² = reliability − resolution + uncertainty + within_bins.

    ``reliability`` is 0 for calibrated probabilities, ``resolution`` how far outcomes differ between bins,
    ``uncertainty`` the score of the class frequencies, ``within_bins`` what is lost by treating a bin as one forecast.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


@dataclass(frozen=True, kw_only=True)
class RiskCoverage(Calibration):
    """``value`` = the area under the risk-coverage curve: the mean error rate of the i most confident, over i.

    ``optimal`` is the area if every error came last, ``excess`` = value − optimal, ``error`` the error rate, which is
    the area of a confidence that says nothing.
    """

    optimal: float
    excess: float
    error: float
    coverage: Tensor = field(repr=False)        # (n,)
    risk: Tensor = field(repr=False)            # (n,)

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Risk against coverage, on a matplotlib axes."""
        ax = _axes(ax)
        ax.plot(self.coverage.numpy(), self.risk.numpy(), **style)
        ax.set_xlabel("share of samples answered")
        ax.set_ylabel("error rate among them")
        return ax


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Bins (lo, hi] of the confidence: how many samples, how confident and how often right on average.

    ``low`` and ``high`` are the ends of the interval of the accuracy; nan in empty bins.
    """

    lo: Tensor              # (bins,)
    hi: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    low: Tensor
    high: Tensor
    level: float
    samples: int
    groups: int

    def __str__(self) -> str:
        rows = ["   confidence        samples  mean confidence  accuracy  interval"]
        for lo, hi, n, c, a, low, high in zip(*(t.tolist() for t in (
                self.lo, self.hi, self.count, self.confidence, self.accuracy, self.low, self.high)), strict=True):
            rows.append(f"({lo:.4f}, {hi:.4f}] {int(n):10d}" + (
                f"  {c:15.4f}  {a:8.4f}  {low:.4f} to {high:.4f}" if n else ""))
        return "\n".join(rows)

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Accuracy against confidence with intervals and the diagonal, on a matplotlib axes."""
        ax, kept = _axes(ax), self.count > 0
        x, y = self.confidence[kept], self.accuracy[kept]
        spread = torch.stack([(y - self.low[kept]).clamp(min=0), (self.high[kept] - y).clamp(min=0)])
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=0)
        ax.errorbar(x.numpy(), y.numpy(), yerr=spread.numpy(), **{"marker": "o", "capsize": 2, **style})
        ax.set_xlabel("mean confidence")
        ax.set_ylabel("accuracy")
        return ax


@dataclass(frozen=True, kw_only=True)
class Temperature(Calibration):
    """``value`` = T that minimises the NLL of softmax(z / T); ``nll`` with it, ``nll_before`` at T = 1."""

    nll: float
    nll_before: float
    iterations: int


@dataclass(frozen=True, kw_only=True)
class TopLabel:
    """Valid positions as samples: the largest probability, whether its class is the target, and the sequence."""

    confidence: Tensor      # (n,) float64
    correct: Tensor         # (n,) bool
    groups: Tensor          # (n,) the row of the logits each came from
    nll: Tensor = field(repr=False)         # (n,) −log p of the target
    squared: Tensor = field(repr=False)     # (n,) Σ_k (p_k − 1[y = k])²


def top_label(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE) -> TopLabel:
    """Confidence and correctness of each sample or valid token, in float64.

    >>> found = top_label(torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]), torch.tensor([[0, -100]]))
    >>> found.correct.tolist(), found.groups.tolist(), round(found.confidence.item(), 4)
    ([True], [0], 0.8808)
    """
    columns: list[list[Tensor]] = [[] for _ in range(4)]
    rows, y, groups = _rows(logits, targets, ignore_index)
    for z, target in _chunks(rows, y):
        logs = z.log_softmax(-1)
        p = logs.exp()
        confidence, predicted = p.max(-1)
        of_target = p.gather(-1, target[:, None])[:, 0]
        for column, value in zip(columns, (confidence, predicted == target, -logs.gather(-1, target[:, None])[:, 0],
                                           p.square().sum(-1) - 2 * of_target + 1), strict=True):
            column.append(value)
    confidence, correct, nll, squared = (torch.cat(c) for c in columns)
    return TopLabel(confidence=confidence, correct=correct, groups=groups, nll=nll, squared=squared)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                               resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                               ) -> Calibration:
    """Σ_b (n_b / n) · |accuracy_b − confidence_b| over equal bins (lo, hi] of [0, 1]; 0 belongs to the first.

    It is too large for few samples (see ``chance``), and depends on ``bins``. A confidence of 1 lies in the last bin.

    Args:
        confidence: (n,) in [0, 1].
        correct: (n,) booleans, or 0 and 1.
        groups: (n,) integers: samples of one group (the tokens of a sequence) are resampled together.
        resamples: of the bootstrap; 0 for the value alone.
        level: of the interval.
        seed: of the bootstrap.

    Raises:
        ValueError: no samples, confidences outside [0, 1], or correctness other than 0 and 1.

    >>> e = expected_calibration_error(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 1, 1, 0]), resamples=0)
    >>> round(e.value, 6)                                  # half of 0.1 and half of 0.1
    0.1

    M. P. Naeini et al., AAAI 2015; C. Guo et al., arXiv 1706.04599.
    """
    s = _Sample(confidence, correct, groups)
    return s.gaps(_equal_bins(s.confidence, bins), bins, _Bootstrap(resamples, level, seed), bins=bins)


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                               resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                               ) -> Calibration:
    """As ``expected_calibration_error``, over bins that hold equally many samples; equal confidences share a bin.

    The interval is for the error in these bins, whose edges are not drawn anew.

    J. Nixon et al., arXiv 1904.01685.
    """
    s = _Sample(confidence, correct, groups)
    _check_bins(bins)
    ordered, n = s.confidence.sort().values, len(s.confidence)
    if n < bins:
        raise ValueError(f"{bins} bins of equal mass need as many samples, got {n}: pass fewer bins")
    edges = ordered[[math.ceil(k * n / bins) - 1 for k in range(1, bins)]].unique()
    return s.gaps(torch.bucketize(s.confidence, edges), len(edges) + 1, _Bootstrap(resamples, level, seed), bins=bins)


def maximum_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                              resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                              ) -> Calibration:
    """max_b |accuracy_b − confidence_b| over the bins that hold samples. A bin of few samples can decide it.

    Arguments as for ``expected_calibration_error``.
    """
    s = _Sample(confidence, correct, groups)
    return s.gaps(_equal_bins(s.confidence, bins), bins, _Bootstrap(resamples, level, seed), largest=True, bins=bins)


def classwise_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = IGNORE,
                                resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                                ) -> Calibration:
    """(1/K) Σ_k Σ_b (n_bk / n) · |frequency of class k − mean p_k| over equal bins of p_k: every class, not the top.

    The bootstrap costs resamples · n · K; pass ``resamples=0`` for a large vocabulary. Other arguments as above.

    M. Kull et al., arXiv 1910.12656.
    """
    rows, y, groups = _rows(logits, targets, ignore_index)
    _check_bins(bins)
    K = rows.shape[-1]
    bootstrap = _Bootstrap(resamples, level, seed)
    cells, residuals = [], []
    total = torch.zeros(K * bins, dtype=torch.float64, device=rows.device)
    for z, target in _chunks(rows, y):
        p = z.softmax(-1)
        cell = _equal_bins(p, bins) + bins * torch.arange(K, device=p.device)
        residual = torch.nn.functional.one_hot(target, K).double() - p
        total.index_add_(0, cell.flatten(), residual.flatten())
        if bootstrap.resamples:
            cells.append(cell.flatten())
            residuals.append(residual.flatten())
    n, d = len(y), total / K
    if bootstrap.resamples:
        sums = _Sums(groups.repeat_interleave(K), torch.cat(cells), K * bins, torch.cat(residuals) / K)
        found = _absolute(d / n, torch.cat([sums(w) / w[:, groups].sum(1, keepdim=True) for w in bootstrap.weights(
            int(groups.max()) + 1, len(sums.values), rows.device)]), bootstrap.level)
    else:
        found = {}
    return _calibration(float(d.abs().sum()) / n, found, groups, bootstrap, bins=bins)


def smooth_calibration_error(confidence: Tensor, correct: Tensor, *, groups: Tensor | None = None,
                             resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                             ) -> Calibration:
    """∫₀¹ |r_σ(t)| dt, r_σ = (1/n) Σ_i (correct_i − confidence_i) K_σ(t, confidence_i), at the σ equal to the integral.

    K is the Gaussian kernel reflected at 0 and 1, summed here in its cosine series. No bins, and continuous in the
    confidences. The interval keeps the σ of ``settings``. Arguments as for ``expected_calibration_error``.

    J. Błasiok and P. Nakkiran, arXiv 2309.12236.
    """
    s = _Sample(confidence, correct, groups)
    n, last = len(s.confidence), _GRID - 1
    at = s.confidence * last
    cell = at.floor().long().clamp(max=last - 1)
    share = at - cell
    t = torch.arange(_GRID, dtype=torch.float64, device=at.device)
    basis = torch.cos(math.pi / last * torch.outer(t, t))
    area = torch.full((_GRID,), 1 / last, dtype=torch.float64, device=at.device)
    area[0] = area[-1] = 0.5 / last
    residual = s.correct - s.confidence
    sums = _Sums(s.groups.repeat(2), torch.cat([cell, cell + 1]), _GRID,
                 torch.cat([(1 - share) * residual, share * residual]))

    def smoothed(mass: Tensor, sigma: float) -> Tensor:
        decay = torch.exp(-0.5 * (math.pi * sigma * t).square())
        decay[1:] *= 2
        return mass @ basis * decay @ basis

    mass = sums(torch.ones(1, s.count, dtype=torch.float64, device=at.device))[0] / n
    low, high = 1.0 / last, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if middle < float((smoothed(mass, middle).abs() * area).sum()):
            low = middle
        else:
            high = middle
    gaps = smoothed(mass, high) * area
    bootstrap = _Bootstrap(resamples, level, seed)
    again = [smoothed(sums(w) / w[:, s.groups].sum(1, keepdim=True), high) * area
             for w in bootstrap.weights(s.count, max(_GRID, len(sums.values)), at.device)]
    found = _absolute(gaps, torch.cat(again), level) if again else {}
    return _calibration(float(gaps.abs().sum()), found, s.groups, bootstrap, sigma=high)


def brier(logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = IGNORE, level: float = 0.95) -> Brier:
    """The Brier score, mean Σ_k (p_k − 1[y = k])², between 0 and 2, and its parts over equal bins of each p_k.

    Other definitions take half of it for two classes, or a mean over classes.

    A. H. Murphy, J. Appl. Meteor. 12 (1973) 595-600; D. B. Stephenson et al., Weather Forecast. 23 (2008) 752-757.
    """
    _check_bins(bins)
    found = top_label(logits, targets, ignore_index=ignore_index)
    rows, y, _ = _rows(logits, targets, ignore_index)
    n, K = rows.shape
    count, sure, hits = (torch.zeros(K * bins, dtype=torch.float64, device=rows.device) for _ in range(3))
    for z, target in _chunks(rows, y):
        p = z.softmax(-1)
        cell = (_equal_bins(p, bins) + bins * torch.arange(K, device=p.device)).flatten()
        count.index_add_(0, cell, torch.ones_like(p).flatten())
        sure.index_add_(0, cell, p.flatten())
        hits.index_add_(0, cell, torch.nn.functional.one_hot(target, K).double().flatten())
    base = hits.view(K, bins).sum(1) / n
    some = count.clamp(min=1)
    reliability = float((count * ((sure - hits) / some).square()).sum()) / n
    resolution = float((count * (hits / some - base.repeat_interleave(bins)).square()).sum()) / n
    uncertainty = float((base * (1 - base)).sum())
    value, stderr, interval = _mean(found.squared, found.groups, level)
    return Brier(value=value, stderr=stderr, interval=interval, level=level, samples=n, groups=_distinct(found.groups),
                 reliability=reliability, resolution=resolution, uncertainty=uncertainty,
                 within_bins=value - (reliability - resolution + uncertainty), settings={"bins": bins})


def nll(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE, level: float = 0.95) -> Calibration:
    """The mean negative log-likelihood of the targets in nats, with a standard error over samples or sequences."""
    found = top_label(logits, targets, ignore_index=ignore_index)
    value, stderr, interval = _mean(found.nll, found.groups, level)
    return Calibration(value=value, stderr=stderr, interval=interval, level=level, samples=len(found.nll),
                       groups=_distinct(found.groups))


def risk_coverage(confidence: Tensor, correct: Tensor, *, groups: Tensor | None = None, resamples: int = 200,
                  level: float = 0.95, seed: int | torch.Generator = 0) -> RiskCoverage:
    """The error rate among the most confident, as a curve over how many are answered, and the area under it.

    Equal confidences count as drawn in random order. Arguments as for ``expected_calibration_error``.

    Y. Geifman and R. El-Yaniv, arXiv 1705.08500; Y. Geifman et al., arXiv 1805.08206 (the area).
    """
    s = _Sample(confidence, correct, groups)
    order = s.confidence.argsort(descending=True, stable=True)
    sure, wrong, group = s.confidence[order], 1 - s.correct[order], s.groups[order]
    risk = _risks(sure, wrong)
    n, value = len(risk), float(risk.mean())
    optimal = float(_risks(torch.arange(n, 0, -1), wrong.sort().values).mean())
    bootstrap = _Bootstrap(resamples, level, seed)
    again = []
    for weights in bootstrap.weights(s.count, n, sure.device):
        for w in weights:
            times = w[group].long()
            again.append(_risks(sure.repeat_interleave(times), wrong.repeat_interleave(times)).mean())
    found = _spread(value, torch.stack(again), level) if again else {}
    return RiskCoverage(value=value, samples=n, groups=s.count, level=level, optimal=optimal, excess=value - optimal,
                        error=float(wrong.mean()), coverage=torch.arange(1, n + 1, dtype=torch.float64) / n,
                        risk=risk.cpu(), settings=bootstrap.settings, **found)


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0) -> Reliability:
    """The table behind the reliability diagram, with bootstrap intervals of the accuracy in each bin.

    Where all samples of a bin are right, or all wrong, the bootstrap knows no spread, and the end is the exact one for
    as many independent groups as the bin holds. Arguments as for ``expected_calibration_error``.
    """
    s = _Sample(confidence, correct, groups)
    cell = _equal_bins(s.confidence, bins)
    sums = [_Sums(s.groups, cell, bins, v) for v in (torch.ones_like(s.correct), s.confidence, s.correct)]
    one = torch.ones(1, s.count, dtype=torch.float64, device=cell.device)
    count, sure, right = (part(one)[0] for part in sums)
    accuracy = right / count
    low, high = (torch.full_like(accuracy, math.nan) for _ in range(2))
    bootstrap = _Bootstrap(resamples, level, seed)
    again = [(sums[2](w) / sums[0](w)) for w in bootstrap.weights(s.count, len(cell), cell.device)]
    if again:
        shares = torch.cat(again)
        alpha = (1 - level) / 2
        for b in (count > 0).nonzero()[:, 0].tolist():
            held = _distinct(s.groups[cell == b])
            if 0 < accuracy[b] < 1:
                seen = shares[:, b][~shares[:, b].isnan()]
                low[b], high[b] = seen.quantile(alpha), seen.quantile(1 - alpha)
            else:
                room = 1 - alpha ** (1 / held)
                low[b], high[b] = (0.0, room) if accuracy[b] == 0 else (1 - room, 1.0)
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    return Reliability(lo=edges[:-1], hi=edges[1:], count=count.cpu(), confidence=(sure / count).cpu(),
                       accuracy=accuracy.cpu(), low=low.cpu(), high=high.cpu(), level=level, samples=len(cell),
                       groups=s.count)


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
    rows, y, groups = _rows(logits, targets, ignore_index)
    n = len(y)

    def at(beta: float) -> tuple[float, Tensor, float]:
        """The NLL, the score β ↦ E_p[z] − z_y of each sample, and the mean variance of z under p."""
        loss, scores, spread = 0.0, [], 0.0
        for z, target in _chunks(rows, y):
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
    if all(bool((z.gather(-1, t[:, None])[:, 0] == z.amax(-1)).all()) for z, t in _chunks(rows, y)):
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
    stderr = _mean(scores, groups, level)[1] / curvature
    z = NormalDist().inv_cdf((1 + level) / 2)
    ends = (1 / (beta + z * stderr), 1 / (beta - z * stderr) if beta > z * stderr else math.inf)
    return Temperature(value=1 / beta, stderr=stderr / beta**2, interval=ends, level=level, samples=n,
                       groups=_distinct(groups), nll=loss, nll_before=before[0], iterations=iterations)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything about one set of predictions; ``str`` is a table."""

    accuracy: Calibration
    nll: Calibration
    brier: Brier
    expected: Calibration
    adaptive: Calibration
    classwise: Calibration
    maximum: Calibration
    smooth: Calibration
    risk_coverage: RiskCoverage
    reliability: Reliability = field(repr=False)

    def __str__(self) -> str:
        rows = [f"{'':26s}value ± standard error     interval at {100 * self.accuracy.level:g} %"]
        for name, label in _LABELS.items():
            record: Calibration = getattr(self, name)
            rows.append(f"{label:26s}{uncertain(record.value, record.stderr):26s} "
                        f"{record.interval[0]:.4f} to {record.interval[1]:.4f}")
        return "\n".join(rows)


_LABELS = {"accuracy": "accuracy", "nll": "NLL (nats)", "brier": "Brier score", "expected": "expected error",
           "adaptive": "adaptive error", "classwise": "classwise error", "maximum": "maximum error",
           "smooth": "smooth error", "risk_coverage": "area, risk-coverage"}


def summary(logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = IGNORE, resamples: int = 200,
            level: float = 0.95, seed: int = 0) -> Summary:
    """Accuracy, NLL, Brier score, all calibration errors and the risk-coverage curve of one set of predictions.

    >>> print(str(summary(torch.eye(3).repeat(9, 1) * 2, torch.arange(27) % 3))[:60].split()[0])
    value
    """
    found = top_label(logits, targets, ignore_index=ignore_index)
    confidence, correct = found.confidence, found.correct
    o: dict[str, Any] = {"groups": found.groups, "resamples": resamples, "level": level, "seed": seed}
    value, stderr, interval = _mean(found.correct.double(), found.groups, level)
    return Summary(
        accuracy=Calibration(value=value, stderr=stderr, interval=interval, level=level, samples=len(correct),
                             groups=_distinct(found.groups)),
        nll=nll(logits, targets, ignore_index=ignore_index, level=level),
        brier=brier(logits, targets, bins, ignore_index=ignore_index, level=level),
        expected=expected_calibration_error(confidence, correct, bins, **o),
        adaptive=adaptive_calibration_error(confidence, correct, bins, **o),
        classwise=classwise_calibration_error(logits, targets, bins, ignore_index=ignore_index, resamples=resamples,
                                              level=level, seed=seed),
        maximum=maximum_calibration_error(confidence, correct, bins, **o),
        smooth=smooth_calibration_error(confidence, correct, **o),
        risk_coverage=risk_coverage(confidence, correct, **o),
        reliability=reliability(confidence, correct, bins, **o))


class _Sample:
    """Checked confidences and outcomes, with groups numbered from 0."""

    def __init__(self, confidence: Tensor, correct: Tensor, groups: Tensor | None):
        confidence, correct = (torch.as_tensor(t).detach() for t in (confidence, correct))
        if confidence.dim() != 1 or correct.shape != confidence.shape:
            raise ValueError(f"expected one confidence and one outcome a sample, got shapes {tuple(confidence.shape)} "
                             f"and {tuple(correct.shape)}: top_label(logits, targets) makes them from sequences")
        if not len(confidence):
            raise ValueError("a calibration error needs at least one sample, got none: are all targets ignored?")
        self.confidence, self.correct = confidence.double(), correct.double()
        if not bool(((self.confidence >= 0) & (self.confidence <= 1)).all()):
            raise ValueError("confidences must be probabilities in [0, 1], got "
                             f"{float(self.confidence.min()):.4g} to {float(self.confidence.max()):.4g}: pass "
                             "softmax(logits).max(-1), not logits")
        if not bool(((self.correct == 0) | (self.correct == 1)).all()):
            raise ValueError("correct must hold True and False, or 1 and 0, for right and wrong")
        if groups is None:
            self.groups, self.count = torch.arange(len(confidence), device=confidence.device), len(confidence)
            return
        if groups.shape != confidence.shape:
            raise ValueError(f"groups must have one number a sample, got shape {tuple(groups.shape)}")
        self.groups = groups.unique(return_inverse=True)[1]
        self.count = int(self.groups.max()) + 1

    def gaps(self, cell: Tensor, cells: int, bootstrap: _Bootstrap, largest: bool = False, **settings: Any
             ) -> Calibration:
        """Σ_b or max_b of |accuracy − confidence|, weighted by the share of samples in the sum."""
        residual = _Sums(self.groups, cell, cells, self.correct - self.confidence)
        count = _Sums(self.groups, cell, cells, torch.ones_like(self.correct))

        def d(w: Tensor) -> Tensor:
            mass = count(w)
            return residual(w) / (mass.clamp(min=1) if largest else mass.sum(1, keepdim=True))

        gaps = d(torch.ones(1, self.count, dtype=torch.float64, device=cell.device))[0]
        again = [d(w) for w in bootstrap.weights(self.count, max(cells, len(residual.values)), cell.device)]
        found = _absolute(gaps, torch.cat(again), bootstrap.level, self._least(cell, cells) if largest else None) \
            if again else {}
        value = float(gaps.abs().max() if largest else gaps.abs().sum())
        return _calibration(value, found, self.groups, bootstrap, **settings)

    def _least(self, cell: Tensor, cells: int) -> Tensor:
        """The standard error of each bin's accuracy with two right and two wrong groups added; 0 in empty bins."""
        pairs = (self.groups * cells + cell).unique()
        m = torch.bincount(pairs % cells, minlength=cells).double()
        right, n = (torch.bincount(cell, weights=w, minlength=cells) for w in (self.correct, torch.ones_like(
            self.correct)))
        p = (right / n.clamp(min=1) * m + 2) / (m + 4)
        return (p * (1 - p) / (m + 4)).sqrt() * (m > 0)


class _Sums:
    """Sums of values over cells, for any weights of the groups: (c, groups) → (c, cells)."""

    def __init__(self, groups: Tensor, cell: Tensor, cells: int, values: Tensor):
        self.groups, self.cell, self.cells, self.values = groups, cell, cells, values
        if int(groups.max()) + 1 < len(groups) // 2:        # sequences of tokens: add up within each first
            key, where = (groups * cells + cell).unique(return_inverse=True)
            self.values = torch.zeros(len(key), dtype=values.dtype, device=values.device).index_add_(0, where, values)
            self.groups, self.cell = key // cells, key % cells

    def __call__(self, weights: Tensor) -> Tensor:
        out = torch.zeros(len(weights), self.cells, dtype=self.values.dtype, device=self.values.device)
        return out.index_add_(1, self.cell, weights[:, self.groups] * self.values)


class _Bootstrap:
    """How often each group is drawn, ``resamples`` times."""

    def __init__(self, resamples: int, level: float, seed: int | torch.Generator):
        if resamples < 0 or resamples == 1:
            raise ValueError(f"resamples must be 0 (no interval) or at least 2, got {resamples}")
        if not 0 < level < 1:
            raise ValueError(f"level must be a probability between 0 and 1, got {level}")
        self.resamples, self.level = resamples, level
        self._generator = vectors.seeded(seed)
        self.settings = {"resamples": resamples} | ({} if isinstance(seed, torch.Generator) else {"seed": seed})

    def weights(self, groups: int, entries: int, device: torch.device) -> Iterator[Tensor]:
        """Rows of counts (c, groups), c so that c · entries numbers fit in memory."""
        left, most = self.resamples, max(1, _ENTRIES // max(groups, entries))
        if groups < 2:
            return
        while left:
            c = min(left, most)
            left -= c
            draws = torch.randint(groups, (c, groups), generator=self._generator, device=self._generator.device)
            counts = torch.zeros(c, groups, dtype=torch.float64)
            yield counts.scatter_add_(1, draws.cpu(), torch.ones_like(counts)).to(device)


def _absolute(d: Tensor, again: Tensor, level: float, least: Tensor | None = None) -> dict[str, Any]:
    """Standard error, chance and interval of Σ|d_b|, or of max |d_b| where ``least``, the smallest standard error that
    is believed of each, is given."""
    alpha = 1 - level
    h = again - d
    sigma = h.std(0) if least is None else torch.maximum(h.std(0), least)
    some = sigma > 0
    furthest = (h[:, some].abs() / sigma[some]).amax(1)     # of a resample, in standard errors
    if least is not None:
        normal = NormalDist().inv_cdf((1 + level ** (1 / int(some.sum()))) / 2)
        half = max(float(furthest.quantile(level)), normal) * sigma
        low, high = (d.abs() - half).max(), (d.abs() + half)[d != 0].max() if bool((d != 0).any()) else half.max()
        change, by_chance = again.abs().amax(1), h.abs().amax(1)
    else:
        band, value = furthest.quantile(1 - alpha / 5) * sigma, d.abs().sum()

        def shift(size: Tensor) -> Tensor:
            """Σ|d + h| − |d| for gaps of this size and the signs seen."""
            at = torch.where(d < 0, -size, size)
            return ((at + h).abs() - size).sum(1)

        low = value - shift((d.abs() - band).clamp(min=0)).quantile(1 - 0.4 * alpha)
        high = value - shift(d.abs() + band).quantile(0.4 * alpha)
        change, by_chance = again.abs().sum(1), h.abs().sum(1)
    return {"stderr": float(change.std()), "chance": float(by_chance.mean()),
            "interval": (min(max(float(low), 0.0), 1.0), min(max(float(high), 0.0), 1.0))}


def _spread(value: float, again: Tensor, level: float) -> dict[str, Any]:
    """Standard error and basic interval of a smooth statistic from its resampled values."""
    low, high = (2 * value - float(again.quantile(q)) for q in ((1 + level) / 2, (1 - level) / 2))
    return {"stderr": float(again.std()), "interval": (max(low, 0.0), high)}


def _calibration(value: float, found: dict[str, Any], groups: Tensor, bootstrap: _Bootstrap, **settings: Any
                 ) -> Calibration:
    return Calibration(value=value, samples=len(groups), groups=_distinct(groups), level=bootstrap.level,
                       settings=settings | bootstrap.settings, **found)


def _mean(values: Tensor, groups: Tensor, level: float) -> tuple[float, float, Interval]:
    """The mean, its standard error over groups, and the normal interval."""
    mean = float(values.mean())
    groups = groups.unique(return_inverse=True)[1]
    G = int(groups.max()) + 1
    if G < 2:
        return mean, math.nan, (math.nan, math.nan)
    off = torch.zeros(G, dtype=torch.float64, device=values.device).index_add_(0, groups, values.double() - mean)
    stderr = math.sqrt(G / (G - 1) * float(off.square().sum())) / len(values)
    half = NormalDist().inv_cdf((1 + level) / 2) * stderr
    return mean, stderr, (mean - half, mean + half)


def _distinct(groups: Tensor) -> int:
    return len(groups.unique())


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")


def _equal_bins(p: Tensor, bins: int) -> Tensor:
    """The bin (lo, hi] of each probability, from 0."""
    _check_bins(bins)
    return torch.bucketize(p, torch.arange(1, bins, dtype=p.dtype, device=p.device) / bins)


def _risks(sure: Tensor, wrong: Tensor) -> Tensor:
    """Error rates among the first i, where blocks of equal confidence are in random order."""
    _, block, size = sure.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(size), dtype=torch.float64, device=wrong.device).index_add_(0, block, wrong)
    return (errors / size)[block].cumsum(0) / torch.arange(1, len(sure) + 1, dtype=torch.float64, device=wrong.device)


def _rows(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Valid positions as rows (n, K), their targets (n,), and the first index of each, numbered from 0."""
    logits, targets = logits.detach(), targets.detach()
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError("expected logits (N, K) with targets (N,), or (B, T, K) with (B, T), got "
                         f"{tuple(logits.shape)} and {tuple(targets.shape)}: classes come last")
    group = torch.arange(len(targets), device=targets.device).view(-1, *[1] * (targets.dim() - 1)).expand_as(targets)
    valid = targets != ignore_index
    y = targets[valid].long()
    if not len(y):
        raise ValueError("no sample to look at: there are none, or every target is ignore_index")
    if bool(((y < 0) | (y >= logits.shape[-1])).any()):
        raise ValueError(f"targets must be classes 0 to {logits.shape[-1] - 1} or ignore_index={ignore_index}, got "
                         f"{int(y.min())} to {int(y.max())}")
    rows = logits.reshape(-1, logits.shape[-1]) if bool(valid.all()) else logits[valid]
    return rows, y, group[valid].unique(return_inverse=True)[1]


def _chunks(rows: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, in float64."""
    size = max(1, _ENTRIES // rows.shape[-1])
    for z, target in zip(rows.split(size), y.split(size), strict=True):
        yield z.double(), target


def _axes(ax: Any) -> Any:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1]
    return ax


