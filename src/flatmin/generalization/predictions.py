"""A classifier's outputs as samples: valid positions as rows, and the confidence in the predicted class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100
CHUNK = 1 << 22
"""Numbers handled at once."""


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
    rows, y, groups = valid_rows(logits, targets, ignore_index)
    for z, target in in_chunks(rows, y):
        logs = z.log_softmax(-1)
        p = logs.exp()
        confidence, predicted = p.max(-1)
        of_target = p.gather(-1, target[:, None])[:, 0]
        for column, value in zip(columns, (confidence, predicted == target, -logs.gather(-1, target[:, None])[:, 0],
                                           p.square().sum(-1) - 2 * of_target + 1), strict=True):
            column.append(value)
    confidence, correct, nll, squared = (torch.cat(c) for c in columns)
    return TopLabel(confidence=confidence, correct=correct, groups=groups, nll=nll, squared=squared)


def valid_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
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


def in_chunks(rows: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, in float64."""
    size = max(1, CHUNK // rows.shape[-1])
    for z, target in zip(rows.split(size), y.split(size), strict=True):
        yield z.double(), target
