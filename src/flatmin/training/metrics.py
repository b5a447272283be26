"""Metrics of a classifier, and their standard errors over the draw of test examples."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import perturbed


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor, batch_size: int = 1024) -> Tensor:
    """Outputs in eval mode; the mode is restored."""
    with perturbed.module_mode(model, training=False):
        return torch.cat([model(x) for x in inputs.split(batch_size)])


def classification(logits: Tensor, targets: Tensor, bins: int = 15) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood, expected calibration error over equal-width bins (lo, hi], confidence.

    All are nan where an output is.
    """
    if bool(logits.isnan().any()):
        return dict.fromkeys(("accuracy", "nll", "ece", "confidence"), math.nan)
    logs = logits.double().log_softmax(-1)
    confidence, predicted = logs.exp().max(-1)
    correct = (predicted == targets).double()
    which = (confidence * bins).ceil().clamp(1, bins).long() - 1
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, torch.ones_like(correct))
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct - confidence)
    nll = -logs.gather(-1, targets[:, None]).mean()
    return {"accuracy": correct.mean().item(), "nll": nll.item(), "ece": (gap.abs().sum() / count.sum()).item(),
            "confidence": confidence.mean().item()}


def standard_errors(logits: Tensor, targets: Tensor, resamples: int = 200) -> dict[str, float]:
    """Of accuracy, NLL and ECE over the draw of test examples; that of the ECE by a bootstrap with a fixed seed."""
    n = len(targets)
    if n < 2:
        return dict.fromkeys(("accuracy", "nll", "ece"), math.nan)
    logs = logits.double().log_softmax(-1)
    share = (logs.argmax(-1) == targets).double().mean().item()
    spread = logs.gather(-1, targets[:, None]).std().item()
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(n, (n,), generator=generator) for _ in range(resamples)]
    again = torch.tensor([classification(logits[i], targets[i])["ece"] for i in draws], dtype=torch.float64)
    return {"accuracy": math.sqrt(share * (1 - share) / n), "nll": spread / math.sqrt(n), "ece": again.std().item()}
