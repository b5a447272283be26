"""Metrics of a classifier, and their standard errors over the draw of test examples."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def classification(logits: Tensor, targets: Tensor, bins: int = 15) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood, expected calibration error over equal-width bins (lo, hi], confidence.

    All are nan where an output is.
    """
    if bool(logits.isnan().any()):
        return dict.fromkeys(("accuracy", "nll", "ece", "confidence"), math.nan)
    logs = logits.double().log_softmax(-1)
    confidence, predicted = logs.exp().max(-1)
    correct = (predicted == targets).double()
    which = _bins(confidence, bins)
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, torch.ones_like(correct))
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct - confidence)
    nll = -logs.gather(-1, targets[:, None]).mean()
    return {"accuracy": correct.mean().item(), "nll": nll.item(), "ece": (gap.abs().sum() / count.sum()).item(),
            "confidence": confidence.mean().item()}


def standard_errors(logits: Tensor, targets: Tensor, resamples: int = 200, bins: int = 15) -> dict[str, float]:
    """Of accuracy, NLL and ECE over the draw of test examples; that of the ECE by a bootstrap with a fixed seed."""
    n = len(targets)
    if n < 2 or bool(logits.isnan().any()):
        return dict.fromkeys(("accuracy", "nll", "ece"), math.nan)
    logs = logits.double().log_softmax(-1)
    share = (logs.argmax(-1) == targets).double().mean().item()
    spread = logs.gather(-1, targets[:, None]).std().item()
    confidence, predicted = logs.exp().max(-1)
    gap = (predicted == targets).double() - confidence
    draws = _draws(n, resamples)
    cells = _bins(confidence, bins)[draws] + bins * torch.arange(resamples)[:, None]
    gaps = torch.zeros(bins * resamples, dtype=torch.float64).index_add_(0, cells.flatten(), gap[draws].flatten())
    again = gaps.view(resamples, bins).abs().sum(1) / n
    return {"accuracy": math.sqrt(share * (1 - share) / n), "nll": spread / math.sqrt(n), "ece": again.std().item()}


@functools.lru_cache(maxsize=2)
def _draws(n: int, resamples: int) -> Tensor:
    """Rows of examples drawn with replacement, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(n, (n,), generator=generator) for _ in range(resamples)])


def _bins(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).ceil().clamp(1, bins).long() - 1
