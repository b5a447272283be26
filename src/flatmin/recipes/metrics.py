"""What is said of a classifier on test data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import perturbed


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor, batch_size: int = 1024) -> Tensor:
    """Outputs in eval mode; the mode comes back."""
    with perturbed.module_mode(model, training=False):
        return torch.cat([model(x) for x in inputs.split(batch_size)])


def classification(logits: Tensor, targets: Tensor, bins: int = 15) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood and expected calibration error over equal-width bins (lo, hi]."""
    logs = logits.double().log_softmax(-1)
    confidence, predicted = logs.exp().max(-1)
    correct = (predicted == targets).double()
    which = (confidence * bins).ceil().clamp(1, bins).long() - 1
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, torch.ones_like(correct))
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct - confidence)
    nll = -logs.gather(-1, targets[:, None]).mean()
    return {"accuracy": correct.mean().item(), "nll": nll.item(), "ece": (gap.abs().sum() / count.sum()).item()}
