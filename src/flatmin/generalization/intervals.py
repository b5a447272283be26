"""Calibration records, and their standard errors and intervals from resampling groups of samples.

A calibration error is a sum, or maximum, of absolute gaps |d_b|. Noise only adds to it, and the plain bootstrap, whose
resamples are noisier than the data, does not cover the truth where gaps are small. The intervals here resample the
signed gaps, h = d* − d: the ends are quantiles of Σ|d_b + h_b| − |d_b|, which falls as |d_b| grows, at the smallest and
at the largest |d_b| that a simultaneous band around the data allows. They hold the truth at least as often as they
say; where gaps are small, more often. J. P. Romano et al., Econometrica 82 (2014) 1979-2002 (the two steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..results import Scalar
from .predictions import CHUNK

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


class Sample:
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

    def gaps(self, cell: Tensor, cells: int, bootstrap: Bootstrap, largest: bool = False, **settings: Any
             ) -> Calibration:
        """Σ_b or max_b of |accuracy − confidence|, weighted by the share of samples in the sum."""
        residual = SumsByCell(self.groups, cell, cells, self.correct - self.confidence)
        count = SumsByCell(self.groups, cell, cells, torch.ones_like(self.correct))

        def d(w: Tensor) -> Tensor:
            mass = count(w)
            return residual(w) / (mass.clamp(min=1) if largest else mass.sum(1, keepdim=True))

        gaps = d(torch.ones(1, self.count, dtype=torch.float64, device=cell.device))[0]
        again = [d(w) for w in bootstrap.weights(self.count, max(cells, len(residual.values)), cell.device)]
        least = self._least(cell, cells) if largest else None
        found = interval_of_gaps(gaps, torch.cat(again), bootstrap.level, least) if again else {}
        value = float(gaps.abs().max() if largest else gaps.abs().sum())
        return calibration_record(value, found, self.groups, bootstrap, **settings)

    def _least(self, cell: Tensor, cells: int) -> Tensor:
        """The standard error of each bin's accuracy with two right and two wrong groups added; 0 in empty bins."""
        pairs = (self.groups * cells + cell).unique()
        m = torch.bincount(pairs % cells, minlength=cells).double()
        right, n = (torch.bincount(cell, weights=w, minlength=cells) for w in (self.correct, torch.ones_like(
            self.correct)))
        p = (right / n.clamp(min=1) * m + 2) / (m + 4)
        return (p * (1 - p) / (m + 4)).sqrt() * (m > 0)


class SumsByCell:
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


class Bootstrap:
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
        left, most = self.resamples, max(1, CHUNK // max(groups, entries))
        if groups < 2:
            return
        while left:
            c = min(left, most)
            left -= c
            draws = torch.randint(groups, (c, groups), generator=self._generator, device=self._generator.device)
            counts = torch.zeros(c, groups, dtype=torch.float64)
            yield counts.scatter_add_(1, draws.cpu(), torch.ones_like(counts)).to(device)


def interval_of_gaps(d: Tensor, again: Tensor, level: float, least: Tensor | None = None) -> dict[str, Any]:
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


def interval_of_smooth(value: float, again: Tensor, level: float) -> dict[str, Any]:
    """Standard error and basic interval of a smooth statistic from its resampled values."""
    low, high = (2 * value - float(again.quantile(q)) for q in ((1 + level) / 2, (1 - level) / 2))
    return {"stderr": float(again.std()), "interval": (max(low, 0.0), high)}


def calibration_record(value: float, found: dict[str, Any], groups: Tensor, bootstrap: Bootstrap, **settings: Any
                 ) -> Calibration:
    return Calibration(value=value, samples=len(groups), groups=distinct(groups), level=bootstrap.level,
                       settings=settings | bootstrap.settings, **found)


def mean_over_groups(values: Tensor, groups: Tensor, level: float) -> tuple[float, float, Interval]:
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


def distinct(groups: Tensor) -> int:
    return len(groups.unique())
