"""Calibration errors on samples or tokens, with intervals: is a confidence of 0.8 right in 80 % of the cases?

Functions of ``(confidence, correct)`` look at one probability a sample, those of ``(logits, targets)`` at all classes;
``top_label`` makes the former from the latter, and ``summary`` computes everything at once. Probabilities p stand in
for logits as log p. Logits have the classes last: (N, K) with targets (N,), or (B, T, K) with targets (B, T), where
positions whose target is ``ignore_index`` are left out and a sequence is resampled as a whole.

``intervals`` says how the intervals are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..results import uncertain
from .intervals import (
    Bootstrap,
    Calibration,
    Interval,
    Sample,
    SumsByCell,
    calibration_record,
    distinct,
    interval_of_gaps,
    interval_of_smooth,
    mean_over_groups,
)
from .predictions import IGNORE, TopLabel, in_chunks, top_label, valid_rows
from .temperature import Temperature, fit_temperature

__all__ = ["Brier", "Calibration", "Interval", "Reliability", "RiskCoverage", "Summary", "Temperature", "TopLabel",
           "adaptive_calibration_error", "brier", "classwise_calibration_error", "expected_calibration_error",
           "fit_temperature", "maximum_calibration_error", "nll", "reliability", "risk_coverage",
           "smooth_calibration_error", "summary", "top_label"]

_GRID = 1025            # points on [0, 1] where the smooth error is evaluated


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
    s = Sample(confidence, correct, groups)
    return s.gaps(_equal_bins(s.confidence, bins), bins, Bootstrap(resamples, level, seed), bins=bins)


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                               resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                               ) -> Calibration:
    """As ``expected_calibration_error``, over bins that hold equally many samples; equal confidences share a bin.

    The interval is for the error in these bins, whose edges are not drawn anew.

    J. Nixon et al., arXiv 1904.01685.
    """
    s = Sample(confidence, correct, groups)
    _check_bins(bins)
    ordered, n = s.confidence.sort().values, len(s.confidence)
    if n < bins:
        raise ValueError(f"{bins} bins of equal mass need as many samples, got {n}: pass fewer bins")
    edges = ordered[[math.ceil(k * n / bins) - 1 for k in range(1, bins)]].unique()
    return s.gaps(torch.bucketize(s.confidence, edges), len(edges) + 1, Bootstrap(resamples, level, seed), bins=bins)


def maximum_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                              resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                              ) -> Calibration:
    """max_b |accuracy_b − confidence_b| over the bins that hold samples. A bin of few samples can decide it.

    Arguments as for ``expected_calibration_error``.
    """
    s = Sample(confidence, correct, groups)
    return s.gaps(_equal_bins(s.confidence, bins), bins, Bootstrap(resamples, level, seed), largest=True, bins=bins)


def classwise_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = IGNORE,
                                resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                                ) -> Calibration:
    """(1/K) Σ_k Σ_b (n_bk / n) · |frequency of class k − mean p_k| over equal bins of p_k: every class, not the top.

    The bootstrap costs resamples · n · K; pass ``resamples=0`` for a large vocabulary. Other arguments as above.

    M. Kull et al., arXiv 1910.12656.
    """
    rows, y, groups = valid_rows(logits, targets, ignore_index)
    _check_bins(bins)
    K = rows.shape[-1]
    bootstrap = Bootstrap(resamples, level, seed)
    cells, residuals = [], []
    total = torch.zeros(K * bins, dtype=torch.float64, device=rows.device)
    for z, target in in_chunks(rows, y):
        p = z.softmax(-1)
        cell = _equal_bins(p, bins) + bins * torch.arange(K, device=p.device)
        residual = torch.nn.functional.one_hot(target, K).double() - p
        total.index_add_(0, cell.flatten(), residual.flatten())
        if bootstrap.resamples:
            cells.append(cell.flatten())
            residuals.append(residual.flatten())
    n, d = len(y), total / K
    if bootstrap.resamples:
        sums = SumsByCell(groups.repeat_interleave(K), torch.cat(cells), K * bins, torch.cat(residuals) / K)
        weights = bootstrap.weights(int(groups.max()) + 1, len(sums.values), rows.device)
        again = torch.cat([sums(w) / w[:, groups].sum(1, keepdim=True) for w in weights])
        found = interval_of_gaps(d / n, again, bootstrap.level)
    else:
        found = {}
    return calibration_record(float(d.abs().sum()) / n, found, groups, bootstrap, bins=bins)


def smooth_calibration_error(confidence: Tensor, correct: Tensor, *, groups: Tensor | None = None,
                             resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0
                             ) -> Calibration:
    """∫₀¹ |r_σ(t)| dt, r_σ = (1/n) Σ_i (correct_i − confidence_i) K_σ(t, confidence_i), at the σ equal to the integral.

    K is the Gaussian kernel reflected at 0 and 1, summed here in its cosine series. No bins, and continuous in the
    confidences. The interval keeps the σ of ``settings``. Arguments as for ``expected_calibration_error``.

    J. Błasiok and P. Nakkiran, arXiv 2309.12236.
    """
    s = Sample(confidence, correct, groups)
    n, last = len(s.confidence), _GRID - 1
    at = s.confidence * last
    cell = at.floor().long().clamp(max=last - 1)
    share = at - cell
    t = torch.arange(_GRID, dtype=torch.float64, device=at.device)
    basis = torch.cos(math.pi / last * torch.outer(t, t))
    area = torch.full((_GRID,), 1 / last, dtype=torch.float64, device=at.device)
    area[0] = area[-1] = 0.5 / last
    residual = s.correct - s.confidence
    sums = SumsByCell(s.groups.repeat(2), torch.cat([cell, cell + 1]), _GRID,
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
    bootstrap = Bootstrap(resamples, level, seed)
    again = [smoothed(sums(w) / w[:, s.groups].sum(1, keepdim=True), high) * area
             for w in bootstrap.weights(s.count, max(_GRID, len(sums.values)), at.device)]
    found = interval_of_gaps(gaps, torch.cat(again), level) if again else {}
    return calibration_record(float(gaps.abs().sum()), found, s.groups, bootstrap, sigma=high)


def brier(logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = IGNORE, level: float = 0.95) -> Brier:
    """The Brier score, mean Σ_k (p_k − 1[y = k])², between 0 and 2, and its parts over equal bins of each p_k.

    Other definitions take half of it for two classes, or a mean over classes.

    A. H. Murphy, J. Appl. Meteor. 12 (1973) 595-600; D. B. Stephenson et al., Weather Forecast. 23 (2008) 752-757.
    """
    _check_bins(bins)
    found = top_label(logits, targets, ignore_index=ignore_index)
    rows, y, _ = valid_rows(logits, targets, ignore_index)
    n, K = rows.shape
    count, sure, hits = (torch.zeros(K * bins, dtype=torch.float64, device=rows.device) for _ in range(3))
    for z, target in in_chunks(rows, y):
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
    value, stderr, interval = mean_over_groups(found.squared, found.groups, level)
    return Brier(value=value, stderr=stderr, interval=interval, level=level, samples=n, groups=distinct(found.groups),
                 reliability=reliability, resolution=resolution, uncertainty=uncertainty,
                 within_bins=value - (reliability - resolution + uncertainty), settings={"bins": bins})


def nll(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE, level: float = 0.95) -> Calibration:
    """The mean negative log-likelihood of the targets in nats, with a standard error over samples or sequences."""
    found = top_label(logits, targets, ignore_index=ignore_index)
    value, stderr, interval = mean_over_groups(found.nll, found.groups, level)
    return Calibration(value=value, stderr=stderr, interval=interval, level=level, samples=len(found.nll),
                       groups=distinct(found.groups))


def risk_coverage(confidence: Tensor, correct: Tensor, *, groups: Tensor | None = None, resamples: int = 200,
                  level: float = 0.95, seed: int | torch.Generator = 0) -> RiskCoverage:
    """The error rate among the most confident, as a curve over how many are answered, and the area under it.

    Equal confidences count as drawn in random order. Arguments as for ``expected_calibration_error``.

    Y. Geifman and R. El-Yaniv, arXiv 1705.08500; Y. Geifman et al., arXiv 1805.08206 (the area).
    """
    s = Sample(confidence, correct, groups)
    order = s.confidence.argsort(descending=True, stable=True)
    sure, wrong, group = s.confidence[order], 1 - s.correct[order], s.groups[order]
    risk = _risks(sure, wrong)
    n, value = len(risk), float(risk.mean())
    optimal = float(_risks(torch.arange(n, 0, -1), wrong.sort().values).mean())
    bootstrap = Bootstrap(resamples, level, seed)
    again = []
    for weights in bootstrap.weights(s.count, n, sure.device):
        for w in weights:
            times = w[group].long()
            again.append(_risks(sure.repeat_interleave(times), wrong.repeat_interleave(times)).mean())
    found = interval_of_smooth(value, torch.stack(again), level) if again else {}
    return RiskCoverage(value=value, samples=n, groups=s.count, level=level, optimal=optimal, excess=value - optimal,
                        error=float(wrong.mean()), coverage=torch.arange(1, n + 1, dtype=torch.float64) / n,
                        risk=risk.cpu(), settings=bootstrap.settings, **found)


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15, *, groups: Tensor | None = None,
                resamples: int = 200, level: float = 0.95, seed: int | torch.Generator = 0) -> Reliability:
    """The table behind the reliability diagram, with bootstrap intervals of the accuracy in each bin.

    Where all samples of a bin are right, or all wrong, the bootstrap knows no spread, and the end is the exact one for
    as many independent groups as the bin holds. Arguments as for ``expected_calibration_error``.
    """
    s = Sample(confidence, correct, groups)
    cell = _equal_bins(s.confidence, bins)
    sums = [SumsByCell(s.groups, cell, bins, v) for v in (torch.ones_like(s.correct), s.confidence, s.correct)]
    one = torch.ones(1, s.count, dtype=torch.float64, device=cell.device)
    count, sure, right = (part(one)[0] for part in sums)
    accuracy = right / count
    low, high = (torch.full_like(accuracy, math.nan) for _ in range(2))
    bootstrap = Bootstrap(resamples, level, seed)
    again = [(sums[2](w) / sums[0](w)) for w in bootstrap.weights(s.count, len(cell), cell.device)]
    if again:
        shares = torch.cat(again)
        alpha = (1 - level) / 2
        for b in (count > 0).nonzero()[:, 0].tolist():
            held = distinct(s.groups[cell == b])
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
    value, stderr, interval = mean_over_groups(found.correct.double(), found.groups, level)
    return Summary(
        accuracy=Calibration(value=value, stderr=stderr, interval=interval, level=level, samples=len(correct),
                             groups=distinct(found.groups)),
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


def _axes(ax: Any) -> Any:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1]
    return ax


